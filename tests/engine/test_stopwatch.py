"""Speed and remaining time of a run, by a clock that the tests turn."""
from __future__ import annotations

import pytest

from engine import stopwatch
from engine.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """[seconds]: what the time is."""
    now = [100.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])
    return now


def test_the_remaining_time_counts_steps_not_images(clock) -> None:
    """Images without labels join the batches, so that images per second are more than --batch-size says."""
    watch = Stopwatch()
    for _ in range(4):
        clock[0] += 1.0
        watch.got_batch()
        clock[0] += 1.5
        watch.count(12)
    assert watch.time_of(100).total_seconds() == 250
    window = watch.read()
    assert window["images_per_second"] == pytest.approx(4.8) and window["waiting_for_data"] == pytest.approx(0.4)


def test_a_validation_does_not_count(clock) -> None:
    watch = Stopwatch()
    for waits in (0.0, 60.0):
        clock[0] += 2.0
        watch.count(1)
        clock[0] += waits
        watch.skip()
    assert watch.time_of(10).total_seconds() == 20


def test_a_resumed_run_goes_on_with_the_window_of_its_state(clock) -> None:
    watch, resumed = Stopwatch(), Stopwatch()
    for _ in range(3):
        watch.got_batch()
        clock[0] += 2.0
        watch.count(4)
    held = watch.held()
    clock[0] += 1000
    resumed.take_up(held)
    assert resumed.held() == held
    clock[0] += 1000
    resumed.restart()
    clock[0] += 4.0
    resumed.count(4)
    window = resumed.read()
    assert (window["seconds"], window["steps"]) == (10.0, 4) and window["images_per_second"] == pytest.approx(1.6)
    assert resumed.held()["steps"] == 0


def test_steps_of_a_state_without_a_window_are_not_made_up(clock) -> None:
    watch = Stopwatch()
    watch.take_up({"steps": None})
    watch.restart()
    clock[0] += 2.0
    watch.count(4)
    assert watch.time_of(10).total_seconds() == 20 and watch.held()["steps"] is None
    assert watch.read()["steps"] is None and watch.held()["steps"] == 0
