"""--tracker: the scalars of TensorBoard go to another service too, which never stops a run."""
from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from helpers import assert_refused, four_steps, records

import train_kd
from engine.journal import Journal
from engine.log import RunLogger
from engine.settings import parse_settings
from engine.stopwatch import Stopwatch
from engine.tracker import Tracker


class Service:
    """What wandb and trackio have in common. begun: what runs were begun with. sent: (step, values).

    broken: the functions that raise."""

    def __init__(self, *broken: str) -> None:
        self.begun, self.sent, self.ended, self.broken = [], [], 0, broken

    def init(self, **about) -> Service:
        self.begun.append(about)
        self._check("init")
        return self

    def log(self, values: dict, step: int) -> None:
        self._check("log")
        self.sent.append((step, values))

    def finish(self) -> None:
        self._check("finish")
        self.ended += 1

    def _check(self, name: str) -> None:
        if name in self.broken:
            raise RuntimeError("no\nnetwork")


def use(monkeypatch, name: str, *broken: str) -> Service:
    """A service under the name of a tracker's package."""
    service = Service(*broken)
    monkeypatch.setitem(sys.modules, name, service)
    return service


def test_a_run_a_resumed_one_and_a_new_one(few_images, tmp_path, monkeypatch) -> None:
    """The last one in the same folder, when the network is gone."""
    arguments = four_steps(few_images, tmp_path / "student", "--tracker", "wandb", "--tracker-project", "mine")
    service = use(monkeypatch, "wandb")
    assert train_kd.main(arguments) == 0
    assert train_kd.main([*arguments, "--resume", "auto"]) == 0
    first, resumed = service.begun
    assert (first["project"], first["name"], first["resume"]) == ("mine", "student", "allow")
    assert first["dir"] == str(tmp_path / "student" / "logs") and first["config"]["max_iterations"] == 4
    assert first["id"] == resumed["id"] and service.ended == 2
    losses = [(step, values["train/loss"]) for step, values in service.sent if "train/loss" in values]
    assert losses == [(record["step"], record["loss"]) for record in records(tmp_path / "student")]
    assert [step for step, values in service.sent if "val/mIoU" in values][:2] == [2, 4]

    service = use(monkeypatch, "wandb", "log")
    assert train_kd.main(arguments) == 0
    assert service.begun[0]["id"] != first["id"] and service.sent == []
    (text,) = (tmp_path / "student" / "logs").glob("*_log.txt")
    assert text.read_text().count("--tracker wandb: nothing more is sent (RuntimeError: no network)") == 1
    assert len(records(tmp_path / "student")) == 4


def test_the_scalars_are_those_of_tensorboard(tmp_path, monkeypatch) -> None:
    service, shown = use(monkeypatch, "trackio"), []
    tracker = Tracker("trackio", "afdcd", "student", tmp_path, "run", {"lr": 0.1})
    logger = RunLogger(tmp_path, "run", tensorboard=False, tracker=tracker)
    logger._board = SimpleNamespace(add_scalar=lambda tag, value, step: shown.append((step, tag, value)),
                                    close=lambda: None)
    logger.record("train", 3, loss=1.5, raw={"task": 1.0, "kd": 2}, grad_norm={"student": None}, on=True)
    logger.close()
    assert service.sent == [(3, {"train/loss": 1.5, "train/raw/task": 1.0, "train/raw/kd": 2})]
    assert shown == [(3, tag, value) for tag, value in service.sent[0][1].items()]
    (run_id,) = json.loads((tmp_path / "run_tracker.json").read_text()).values()
    assert service.begun == [{"project": "afdcd", "name": f"student-{run_id}", "resume": "allow",
                              "config": {"lr": 0.1}}]


@pytest.mark.parametrize("broken", ["init", "finish"])
def test_a_service_that_fails_is_left_out(broken, tmp_path, monkeypatch, caplog) -> None:
    use(monkeypatch, "wandb", broken)
    tracker = Tracker("wandb", "afdcd", "student", tmp_path, "run", {})
    tracker.log({"train/loss": 1.0}, 1)
    tracker.close()
    assert caplog.text.count("--tracker wandb: nothing more is sent") == 1


def test_other_processes_send_nothing(monkeypatch) -> None:
    service = use(monkeypatch, "wandb")
    settings = parse_settings(["--method", "none", "--tracker", "wandb"])
    journal = Journal(SimpleNamespace(settings=settings, step=0, clock=Stopwatch(),
                                      distributed=SimpleNamespace(is_main_process=False)), resumed=False)
    journal.close()
    assert service.begun == []


def test_a_missing_package_is_named(few_images, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert_refused(capsys, train_kd.main, four_steps(few_images, tmp_path / "run", "--tracker", "wandb"),
                   "wandb cannot be imported", "pip install -e '.[wandb]'")
    assert not (tmp_path / "run").exists()
