"""A step is saved before it is validated, and what a run missed in between it does when it goes on."""
from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import STEM, assert_refused, assert_same, assert_same_run, four_steps, records

import engine.validation
import train_kd


class Killed(Exception):
    pass


def content(save: Path, suffix: str) -> dict:
    return torch.load(save / f"{STEM}{suffix}.pth", weights_only=True)


def assert_goes_on_to(few_images: Path, save: Path, whole_run: Path) -> None:
    assert train_kd.main(four_steps(few_images, save, "--resume", "auto")) == 0
    assert_same_run(save, whole_run)
    assert [r["step"] for r in records(save, "val")] == [2, 4]


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("place", ["before the scores", "before the best model", "before the state"])
def test_a_validation_that_is_cut_off_is_done_again(few_images, whole_run, tmp_path, monkeypatch, step, place) -> None:
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
            train_kd.main(four_steps(few_images, tmp_path))
        except Killed:
            assert content(tmp_path, "_state")["step"] == step and content(tmp_path, "_state")["validated"] == step - 2
        else:
            assert (place, step) == ("before the best model", 4), "only a better score is written"
    assert_goes_on_to(few_images, tmp_path, whole_run)


def scored(monkeypatch, scores: dict[int, float]) -> None:
    """From now on a validation after so many steps gives such an mIoU."""
    validate = engine.validation.Validator.__call__

    def call(self, net, step, *more, **options):
        with monkeypatch.context() as patch:
            evaluate = engine.validation.evaluate
            patch.setattr(engine.validation, "evaluate", lambda *a, **o: {**evaluate(*a, **o), "mIoU": scores[step]})
            return validate(self, net, step, *more, **options)

    monkeypatch.setattr(engine.validation.Validator, "__call__", call)


def test_a_run_that_goes_back_has_the_best_model_of_its_state(few_images, tmp_path, capsys, monkeypatch) -> None:
    """Where that is the state itself: what came after it was better, and has been given up."""
    with monkeypatch.context() as patch:
        scored(patch, {2: 0.1, 4: 0.2})
        assert train_kd.main(four_steps(few_images, tmp_path)) == 0
    old = shutil.copy(tmp_path / f"{STEM}_state_previous.pth", tmp_path / "old.pth")
    scored(monkeypatch, {4: 0.05})
    capsys.readouterr()
    assert train_kd.main(four_steps(few_images, tmp_path, "--resume", str(old), "--lr", "0.5")) == 0
    said = capsys.readouterr().out
    assert "best 10.00 at step 2, last 5.00 at step 4" in said and "lost" not in said
    best, wanted = content(tmp_path, "_best_model"), torch.load(old, weights_only=True)["model"]
    assert_same({**best}, {**wanted})
    assert content(tmp_path, "_state")["best"] == 0.1


@pytest.mark.parametrize("damaged", [False, True])
def test_a_best_model_that_is_lost_is_not_reported(few_images, tmp_path, capsys, monkeypatch, damaged) -> None:
    six = ("--max-iterations", "6", "--results", str(tmp_path / "results"))
    with monkeypatch.context() as patch:
        scored(patch, {2: 0.3, 4: 0.1, 6: 0.4})
        assert train_kd.main(four_steps(few_images, tmp_path, *six)) == 0
    scored(monkeypatch, {6: 0.05})
    previous = str(tmp_path / f"{STEM}_state_previous.pth")
    if damaged:
        (tmp_path / f"{STEM}_best_model.pth").write_bytes(b"PK")
    capsys.readouterr()
    assert train_kd.main(four_steps(few_images, tmp_path, *six, "--resume", previous)) == 0
    said = capsys.readouterr().out
    assert "_best_model.pth is not the best model of this state, which is lost" in said
    assert "best 5.00 at step 6" in said and content(tmp_path, "_state")["best"] == 0.05
    (result,) = (tmp_path / "results").rglob("0.json")
    result = json.loads(result.read_text())
    assert result["best_step"] == 6 and [p["mIoU"] for p in result["curve"]] == [0.3, 0.1, 0.05]


@pytest.mark.parametrize("fault", ["killed after the best model", "a damaged state"])
def test_a_better_model_that_is_made_again_is_the_best(few_images, tmp_path, capsys, monkeypatch, fault) -> None:
    scored(monkeypatch, {2: 0.1, 4: 0.2})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train_kd.main(four_steps(few_images, whole)) == 0
    shutil.copytree(whole, cut)
    if fault == "a damaged state":
        (cut / f"{STEM}_state.pth").write_bytes(b"PK")
    else:
        (cut / f"{STEM}_state.pth").unlink()
        (cut / f"{STEM}_state_previous.pth").unlink()
        with monkeypatch.context() as patch:
            save_state, saved = train_kd.save_state, []

            def dying(run, *more):
                saved.append(run.step)
                if saved == [2, 4]:
                    raise Killed
                save_state(run, *more)

            patch.setattr(train_kd, "save_state", dying)
            with pytest.raises(Killed):
                train_kd.main(four_steps(few_images, cut))
        assert content(cut, "_state")["best"] == 0.1
    capsys.readouterr()
    assert_goes_on_to(few_images, cut, whole)
    assert content(cut, "_state")["best"] == 0.2
    assert "lost" not in capsys.readouterr().out


def test_a_state_without_a_digest_takes_any_best_model(few_images, whole_run, tmp_path, monkeypatch) -> None:
    state = content(whole_run, "_state")
    del state["best_weights"]
    torch.save(state, tmp_path / f"{STEM}_state.pth")
    (tmp_path / f"{STEM}_best_model.pth").write_bytes(b"some file")
    monkeypatch.setattr(engine.validation, "evaluate", None)
    assert train_kd.main(four_steps(few_images, tmp_path, "--resume", "auto")) == 0
    assert content(tmp_path, "_state")["best"] == state["best"] > 0


def test_a_signal_ends_a_validation_at_once(few_images, whole_run, tmp_path, capsys, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine.validation, "evaluate", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit) as stop:
            train_kd.main(four_steps(few_images, tmp_path))
    assert stop.value.code == 75 and "stopped by SIGTERM outside of its steps" in capsys.readouterr().out
    assert content(tmp_path, "_state")["step"] == 2 and not records(tmp_path, "val")
    assert_goes_on_to(few_images, tmp_path, whole_run)


def test_a_finished_run_does_not_validate_again(few_images, whole_run, monkeypatch) -> None:
    before = records(whole_run, "val")
    monkeypatch.setattr(engine.validation, "evaluate", None)
    assert train_kd.main(four_steps(few_images, whole_run, "--resume", "auto")) == 0
    assert records(whole_run, "val") == before


def test_states_of_earlier_programs_were_validated_first(few_images, whole_run, tmp_path, monkeypatch) -> None:
    state = content(whole_run, "_state")
    del state["validated"]
    torch.save(state, tmp_path / "old_state.pth")
    (tmp_path / f"{STEM}_best_model.pth").write_bytes((whole_run / f"{STEM}_best_model.pth").read_bytes())
    monkeypatch.setattr(engine.validation, "evaluate", None)
    assert train_kd.main(four_steps(few_images, tmp_path, "--resume", str(tmp_path / "old_state.pth"))) == 0


def test_nothing_is_written_after_a_validation_in_which_another_run_took_the_folder(few_images, tmp_path, capsys,
                                                                                   monkeypatch) -> None:
    evaluate = engine.validation.evaluate

    def taken(*arguments, **options):
        (tmp_path / f".{STEM}.lock").write_text('{"host": "elsewhere", "process": 7}')
        return evaluate(*arguments, **options)

    monkeypatch.setattr(engine.validation, "evaluate", taken)
    assert_refused(capsys, train_kd.main, four_steps(few_images, tmp_path), "process 7 on elsewhere")
    assert content(tmp_path, "_state")["validated"] == 0 and not (tmp_path / f"{STEM}_best_model.pth").exists()


def test_a_run_repeats_from_its_own_file(whole_run, tmp_path) -> None:
    save = tmp_path / "again"
    assert train_kd.main(["--config", str(whole_run), "--save-dir", str(save), "--log-dir", str(save / "logs")]) == 0
    assert_same_run(save, whole_run)
