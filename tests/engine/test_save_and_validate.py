"""A step is saved before it is validated, and what a run missed in between it does when it goes on."""
from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from helpers import assert_same, records, train_arguments, write_folder_dataset

import engine.validation
import train_kd

STEM = "kd_deeplab_mobile_mobilenetv2_w0.25_folder"


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_folder_dataset(tmp_path_factory.mktemp("data") / "set", train=4, val=2)


def run_of(data: Path, save: Path, *more: str) -> list[str]:
    return train_arguments(data, save, "--method", "none", "--max-iterations", "4", "--save-per-iters", "100",
                           "--val-per-iters", "2", *more)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """The folder of a run that nothing has interrupted."""
    save = tmp_path_factory.mktemp("whole")
    assert train_kd.main(run_of(data, save)) == 0
    return save


def content(save: Path, suffix: str) -> dict:
    return torch.load(save / f"{STEM}{suffix}.pth", weights_only=True)


def scores(save: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records(save, "val")]


def assert_goes_on_to(data: Path, save: Path, whole: Path) -> None:
    assert train_kd.main(run_of(data, save, "--resume", "auto")) == 0
    assert scores(save) == scores(whole) and [r["step"] for r in scores(save)] == [2, 4]
    for suffix in ("", "_best_model", "_state"):
        found, expected = content(save, suffix), content(whole, suffix)
        for one in (found, expected):
            one.pop("config", None)  # the folders differ
        assert_same(found, expected, suffix)


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("place", ["before the scores", "before the best model", "before the state"])
def test_a_validation_that_is_cut_off_is_done_again(data, whole, tmp_path, monkeypatch, step, place) -> None:
    """Killed in it, when its scores are in the log, and when the best model is written too."""
    name = {"before the scores": (engine.validation, "evaluate"), "before the state": (train_kd, "save_state"),
            "before the best model": (engine.validation, "save_state_dict")}[place]
    original, run_now = getattr(*name), []
    train_batch = train_kd.train_batch

    def remember(run, batch):
        run_now[:] = [run]
        return train_batch(run, batch)

    def dying(*arguments, **options):
        if run_now[0].step == step:
            raise Killed
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train_kd, "train_batch", remember)
        patch.setattr(*name, dying)
        try:
            train_kd.main(run_of(data, tmp_path))
        except Killed:
            assert content(tmp_path, "_state")["step"] == step and content(tmp_path, "_state")["validated"] == step - 2
        else:
            assert (place, step) == ("before the best model", 4), "only a better score is written"
    assert_goes_on_to(data, tmp_path, whole)


def test_a_signal_ends_a_validation_at_once(data, whole, tmp_path, capsys, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine.validation, "evaluate", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit) as stop:
            train_kd.main(run_of(data, tmp_path))
    assert stop.value.code == 75 and "stopped by SIGTERM outside of its steps" in capsys.readouterr().out
    assert content(tmp_path, "_state")["step"] == 2 and not records(tmp_path, "val")
    assert_goes_on_to(data, tmp_path, whole)


def test_a_finished_run_does_not_validate_again(data, whole, monkeypatch) -> None:
    before = scores(whole)
    monkeypatch.setattr(engine.validation, "evaluate", None)
    assert train_kd.main(run_of(data, whole, "--resume", "auto")) == 0
    assert scores(whole) == before


def test_states_of_earlier_programs_were_validated_first(data, whole, tmp_path, monkeypatch) -> None:
    state = content(whole, "_state")
    del state["validated"]
    torch.save(state, tmp_path / "old_state.pth")
    (tmp_path / f"{STEM}_best_model.pth").write_bytes((whole / f"{STEM}_best_model.pth").read_bytes())
    monkeypatch.setattr(engine.validation, "evaluate", None)
    assert train_kd.main(run_of(data, tmp_path, "--resume", str(tmp_path / "old_state.pth"))) == 0
