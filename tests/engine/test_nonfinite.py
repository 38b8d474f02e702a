"""A loss that is not finite: what the error says, the step that can be run again, and the steps that may be skipped."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import (
    STEM,
    assert_refused,
    assert_same,
    distil_arguments,
    four_steps,
    records,
    train_arguments,
    write_teacher,
)

import engine.nonfinite
import train_kd
from losses.core.objective import Objective
from tools import replay
from utils.cli import run_main
from utils.errors import UserError


def poison(monkeypatch, *steps: int, term: str = "task", in_gradient: bool = False) -> None:
    """In the steps after so many, a term (or only its gradient) is not finite; its forward pass still trains."""
    forward = Objective.forward

    def poisoned(self, images, teacher, target, step, generator=None):
        terms = forward(self, images, teacher, target, step, generator)
        if step in steps and in_gradient:
            zero = terms[term] * 0
            terms[term] = terms[term] + (zero.abs() + 0).sqrt()  # its derivative at 0 is infinite
        elif step in steps:
            terms[term] = terms[term] * float("inf")
        return terms

    monkeypatch.setattr(Objective, "forward", poisoned)


def state_of(save: Path) -> dict:
    return torch.load(save / f"{STEM}_state.pth", weights_only=True)


def test_a_run_that_diverges_says_where_and_can_be_replayed(few_images, tmp_path, capsys) -> None:
    """The weights are finite after the first step, and far too large for the second one."""
    argv = four_steps(few_images, tmp_path, "--lr", "1e25", "--log-iter", "3")
    assert_refused(capsys, train_kd.main, argv, "step 2: the loss term", "became NaN or infinite in process 0 of 1",
                   "no good state has been saved yet", f"{STEM}_replay.pth", "--skip-nonfinite")
    bundle = tmp_path / f"{STEM}_replay.pth"
    content = torch.load(bundle, weights_only=True)
    assert content["step"] == 1 and all(v.isfinite().all() for v in content["model"].values() if v.ndim > 1)
    assert replay.main([str(bundle)]) == 0
    said = capsys.readouterr().out
    assert "step 2, process 0 of 1" in said and "| task " in said and "nan" in said
    assert "first module with an output that is not finite: student." in said and "before the step" not in said
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_error_names_term_state_and_samples(few_images, tmp_path, capsys, monkeypatch) -> None:
    teacher = write_teacher(tmp_path / "teacher.pth")
    argv = train_arguments(few_images, tmp_path, *distil_arguments(teacher), "--log-iter", "100", "--skip-val",
                           "--save-per-iters", "2")
    with monkeypatch.context() as patch:
        poison(patch, 2, term="kd")
        assert_refused(capsys, train_kd.main, argv, "step 3: the loss term kd became NaN or infinite",
                       f"the last good state is {tmp_path / STEM}_state.pth, step 2", "0 0")
    bundle = tmp_path / f"{STEM}_replay.pth"
    assert_same(torch.load(bundle, weights_only=True)["model"].keys(), state_of(tmp_path)["model"].keys())
    for name, value in torch.load(bundle, weights_only=True)["model"].items():
        if "running" not in name and "batches" not in name:
            assert torch.equal(value, state_of(tmp_path)["model"][name]), "no step was taken since"
    assert replay.main([str(bundle)]) == 1, "without the poison"
    said = capsys.readouterr().out
    assert "everything is finite here" in said and "this step and 1 later ones" in said and "| ctr " in said
    write_teacher(tmp_path / "teacher.pth")
    changed = torch.load(teacher, weights_only=True)
    next(iter(changed.values())).mul_(2)
    torch.save(changed, teacher)
    assert_refused(capsys, replay.main, [str(bundle)], "teacher.pth", "not the teacher of the run")
    assert_refused(capsys, replay.main, [str(tmp_path / f"{STEM}_state.pth")], "not a replay bundle")


@pytest.mark.parametrize("more", [(), ("--no-fast",)])
def test_a_gradient_that_is_not_finite_changes_no_weight(few_images, tmp_path, capsys, monkeypatch, more) -> None:
    poison(monkeypatch, 2, in_gradient=True)
    assert_refused(capsys, train_kd.main, four_steps(few_images, tmp_path, *more, "--log-iter", "4"),
                   "step 3: the gradient became NaN or infinite", "step 2")
    before, now = state_of(tmp_path)["model"], torch.load(tmp_path / f"{STEM}_replay.pth", weights_only=True)["model"]
    assert all(torch.equal(now[k], v) for k, v in before.items() if "running" not in k and "batches" not in k)


def test_skipped_steps_leave_no_trace_and_are_counted(few_images, tmp_path, capsys, monkeypatch) -> None:
    """Two bad steps of four, with a loss and a gradient; the run that was cut off between them is the same."""
    poison(monkeypatch, 1, 3)
    folders = whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    argvs = [four_steps(few_images, save, "--skip-nonfinite", "2", "--save-per-iters", "1", "--skip-val")
             for save in folders]
    assert train_kd.main(argvs[0]) == 0
    assert "step 2: the loss term task became NaN or infinite: skipped, 1 of at most 2" in capsys.readouterr().out
    found, skipped = records(whole), records(whole, "skipped")
    assert [r["step"] for r in found] == [1, 3] and [r["step"] for r in skipped] == [2, 4]
    assert len(skipped[0]["samples"]) == 4 and skipped[0]["process"] == 0
    last, previous = state_of(whole), torch.load(whole / f"{STEM}_state_previous.pth", weights_only=True)
    assert (previous["step"], previous["skipped"], last["step"], last["skipped"]) == (3, 1, 4, 2)
    for part in ("model", "distillers", "optimizer"):
        if part == "optimizer":
            for one in (last, previous):
                for group in one[part]["param_groups"]:
                    group.pop("lr")
        assert_same(last[part], previous[part])

    class Killed(Exception):
        pass

    def dying(run):
        save(run)
        if run.step == 2:
            raise Killed

    save = train_kd.save_run
    with monkeypatch.context() as patch:
        patch.setattr(train_kd, "save_run", dying)
        with pytest.raises(Killed):
            train_kd.main(argvs[1])
    assert train_kd.main([*argvs[1], "--resume", "auto"]) == 0
    for suffix in ("", "_state"):
        one, two = (torch.load(folder / f"{STEM}{suffix}.pth", weights_only=True) for folder in folders)
        assert_same({**one, "config": 0}, {**two, "config": 0})
    assert records(whole, "skipped") == records(resumed, "skipped")


def test_one_bad_step_too_many_is_an_error(few_images, tmp_path, capsys, monkeypatch) -> None:
    poison(monkeypatch, 1, 2)
    argv = four_steps(few_images, tmp_path, "--skip-nonfinite", "1")
    assert run_main(train_kd.main, argv, prog="program") == 2
    said = capsys.readouterr()
    assert "skipped, 1 of at most 1" in said.out and "step 3: the loss term task" in said.err
    content = torch.load(tmp_path / f"{STEM}_replay.pth", weights_only=True)
    assert content["seen_since"] == 0
    state = state_of(tmp_path)
    assert state["step"] == 2 and state["skipped"] == 1
    assert_same(content["model"], state["model"])


def test_a_bundle_that_cannot_be_written_hides_nothing(few_images, tmp_path, capsys, monkeypatch) -> None:
    def full(path, *_) -> None:
        raise UserError(f"{path}: cannot be written (No space left on device)")

    poison(monkeypatch, 1)
    monkeypatch.setattr(engine.nonfinite, "save_tensors", full)
    assert_refused(capsys, train_kd.main, four_steps(few_images, tmp_path), "step 2: the loss term task",
                   "no replay bundle", "cannot be written")
