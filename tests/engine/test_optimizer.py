"""Learning rate and optimizer of a run against literal twins."""
from __future__ import annotations

import copy
from itertools import islice
from pathlib import Path

import pytest
import torch
from helpers import assert_refused, train_arguments, write_folder_dataset
from torch import nn

import train_kd
from engine.build import build_run
from engine.checkpoint import resume, save_state
from engine.optimizer import load_optimizer
from engine.run import Run, network_inputs, train_batch, training_batches
from engine.settings import parse_settings
from models.preprocess import IMAGENET_RGB
from utils.distributed import init_distributed
from utils.errors import UserError
from utils.schedule import poly_lr


def small_run(data: Path, save: Path, *more: str) -> Run:
    """A plain training of three steps whose rate decays to 0.005."""
    argv = train_arguments(data, save, "--method", "none", "--max-iterations", "3", "--min-lr", "0.005", *more)
    return build_run(parse_settings(argv), init_distributed(no_cuda=True))


def released_groups(student: nn.Module, factor: float) -> list[dict]:
    """AttnFD's two groups: backbone, and heads at a multiple of its learning rate."""
    heads = [p for name, p in student.named_parameters() if not name.startswith("pretrained.")]
    return [{"params": list(student.pretrained.parameters()), "times": 1.0}, {"params": heads, "times": factor}]


@pytest.mark.parametrize(("flags", "nesterov", "factor"), [
    ([], False, 1.0), (["--nesterov", "--head-lr-factor", "10"], True, 10.0), (["--nesterov", "--no-fast"], True, 1.0)])
def test_a_run_equals_plain_sgd(tmp_path, flags, nesterov, factor) -> None:
    run = small_run(write_folder_dataset(tmp_path / "set", train=4, val=1), tmp_path / "run", *flags)
    twin = copy.deepcopy(run.objective).train()
    optimizer = torch.optim.SGD(released_groups(twin.student, factor), lr=0.02, momentum=0.9, weight_decay=1e-4,
                                nesterov=nesterov)
    for i, batch in enumerate(training_batches(run)):
        for group in optimizer.param_groups:
            group["lr"] = group["times"] * (0.005 + (0.02 - 0.005) * (1 - i / 3) ** 0.9)
        images, _, target = network_inputs(run, batch)
        optimizer.zero_grad()
        twin(images, None, target, i, run.step_fn.seed_streams(i, target.device))["task"].backward()
        optimizer.step()
        assert train_batch(run, batch).lr == pytest.approx(0.005 + 0.015 * (1 - i / 3) ** 0.9)
        run.step += 1
    for (name, value), expected in zip(run.student.named_parameters(), twin.student.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5, msg=name)


def test_a_state_of_before_the_factors_is_taken_up(tmp_path) -> None:
    run = small_run(write_folder_dataset(tmp_path / "set", train=4, val=1), tmp_path / "run")
    state = run.optimizer.state_dict()
    for group in state["param_groups"]:
        del group["lr_factor"]
    load_optimizer(run.optimizer, state)
    assert [group["lr_factor"] for group in run.optimizer.param_groups] == [1.0]


@pytest.mark.parametrize("flags", [(), ("--no-fast",), ("--optimizer", "adamw", "--lr", "0.02")])
def test_settings_that_a_resumed_run_changes_are_applied(tmp_path, flags) -> None:
    """To the groups that have them; what the state does not hold for them is made."""
    data = write_folder_dataset(tmp_path / "set", train=4, val=1)
    of_sgd = "--optimizer" not in flags
    first, then = (["--momentum", "0"], ["--nesterov"]) if of_sgd else ([], [])
    run = small_run(data, tmp_path / "run", *flags, *first)
    other = small_run(data, tmp_path / "run", *flags, *then, "--weight-decay", "0.5", "--preprocess", "rgb")
    for batch in islice(training_batches(run), 1):
        train_batch(run, batch)
        run.step += 1
    save_state(run)
    other.files.resume_from = [other.files.state]
    assert resume(other)
    for group in other.optimizer.param_groups:
        assert group["weight_decay"] == (0.0 if not of_sgd and group["params"][0].ndim == 1 else 0.5)
        assert not of_sgd or (group["momentum"], group["nesterov"]) == (0.9, True)
        assert group["fused"] or "--no-fast" in flags
    assert other.student.preprocess == IMAGENET_RGB
    changed = {one["setting"]: (one["before"], one["after"]) for one in other.changed}
    assert changed.pop("student_preprocess") == ("bgr", "rgb")
    assert changed.keys() == {"weight_decay", *["momentum", "nesterov"] * of_sgd}
    assert all(train_batch(other, batch).fault is None for batch in training_batches(other))


def test_a_preprocessing_that_is_named_as_it_is_is_no_change(tmp_path) -> None:
    data = write_folder_dataset(tmp_path / "set", train=4, val=1)
    for given, then in (((), ("--preprocess", "bgr")), (("--preprocess", "rgb"), ())):
        run, other = (small_run(data, tmp_path / "run", *more) for more in (given, then))
        save_state(run)
        other.files.resume_from = [other.files.state]
        assert resume(other) and not other.changed and other.student.preprocess == run.student.preprocess


def test_a_state_with_other_groups_names_the_flag(tmp_path) -> None:
    data = write_folder_dataset(tmp_path / "set", train=4, val=1)
    run, other = (small_run(data, tmp_path / "run", "--head-lr-factor", factor) for factor in ("1", "10"))
    save_state(run)
    other.files.resume_from = [other.files.state]
    with pytest.raises(UserError, match="into 1 groups, this run's into 2: --head-lr-factor"):
        resume(other)


@pytest.mark.parametrize("step", [0, 1, 399, 20000, 39999])
def test_the_learning_rate_decays_to_its_floor_as_released(step) -> None:
    """MasKD and DIST: 1e-4 + (lr - 1e-4)(1 - i/N)^0.9; without a floor bit for bit lr (1 - i/N)^0.9."""
    assert poly_lr(0.02, step, 40000, 0.9, 1e-4) == pytest.approx(1e-4 + (0.02 - 1e-4) * (1 - step / 40000) ** 0.9)
    assert poly_lr(0.02, step, 40000, 0.9) == poly_lr(0.02, step, 40000, 0.9, 0.0) == 0.02 * (1 - step / 40000) ** 0.9


def test_a_floor_above_the_learning_rate_is_refused(capsys) -> None:
    assert_refused(capsys, train_kd.main, ["--method", "none", "--min-lr", "0.1"], "--min-lr 0.1", "--lr 0.02")
    assert_refused(capsys, train_kd.main, ["--method", "dist", "--teacher-pretrained", "t.pth", "--lr", "0.00005"],
                   "--min-lr 0.0001", "--lr 5e-05", "--min-lr 0 ")


def test_nesterov_without_momentum_is_refused(capsys) -> None:
    assert_refused(capsys, train_kd.main, ["--method", "none", "--nesterov", "--momentum", "0"], "--nesterov",
                   "--momentum above 0")
