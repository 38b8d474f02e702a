"""What is measured of a term's gradient, by hand; and that a run which is measured stays the same run."""
from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import assert_same, distil_arguments, records, train_arguments, write_folder_dataset, write_teacher
from method_cases import run_arguments, write_run_teacher
from torch import nn

import train_kd
from engine.build import build_run
from engine.diagnose import compare_gradients, diagnose, inner
from engine.ready import get_ready
from engine.run import Run, train_batch, training_batches
from engine.settings import parse_settings
from losses.core.objective import Objective
from utils.distributed import init_distributed
from utils.module_state import modules_kept


def made(weights: dict[str, float]) -> tuple[Objective, torch.Tensor, torch.Tensor]:
    """An objective whose student is a single vector (2, 1); that vector; a weight that is no part of it."""
    student = nn.Module()
    student.w = nn.Parameter(torch.tensor([2.0, 1.0]))
    return Objective(student, {}, weights, aux_weight=0.5), student.w, nn.Parameter(torch.ones(()))


def test_gradients_known_by_hand() -> None:
    objective, w, other = made({"same": 2.0, "against": 3.0, "across": 1.0, "own": 1.0, "constant": 1.0})
    terms = {"task": w @ torch.tensor([3.0, 4.0]),  # norm 5
             "aux": w @ torch.tensor([6.0, 8.0]), "same": w @ torch.tensor([0.3, 0.4]),
             "against": -w.sum() * 0 - w @ torch.tensor([3.0, 4.0]), "across": w @ torch.tensor([-4.0, 3.0]),
             "own": other * w.detach().sum(), "constant": torch.tensor(7.0)}
    found = compare_gradients(objective, terms, 0)
    expected = {"task": (10, 10, 1, 1), "aux": (20, 10, 1, 1), "same": (1, 2, 0.2, 1), "against": (-10, -30, 3, -1),
                "across": (-5, -5, 1, 0), "own": (3, 3, 0, 0), "constant": (7, 7, 0, 0)}
    assert {name: tuple(x.values()) for name, x in found.items()} == {
        name: pytest.approx(values, abs=1e-6) for name, values in expected.items()}
    assert list(found["task"]) == ["raw", "weighted", "gradient", "cosine"]
    assert w.grad is None and other.grad is None


def test_the_scale_of_float16_leaves_no_trace() -> None:
    objective, w, _ = made({"kd": 2.0})
    terms = {"task": w.square().sum(), "kd": w[0]}
    assert compare_gradients(objective, terms, 0, scale=1024.0) == compare_gradients(objective, terms, 0)


@pytest.mark.parametrize(("task", "kd"), [(0.0, 1.0), (0.0, 0.0), (math.inf, 1.0), (1.0, math.nan)])
def test_what_cannot_be_compared_is_none(task, kd) -> None:
    objective, w, _ = made({"kd": 1.0})
    found = compare_gradients(objective, {"task": w.sum() * task, "kd": w.sum() * kd}, 0)
    assert found["kd"]["gradient"] is None and found["kd"]["cosine"] is None
    assert (found["task"]["gradient"] is None) == (task != 1)
    json.dumps(found, allow_nan=False)


def test_inner_products_are_summed_in_float64(monkeypatch) -> None:
    monkeypatch.setattr("engine.diagnose.SLICE", 3)
    a = torch.tensor([1.0, 1e4, 1e-4, 2.0])
    assert inner(a, a) == pytest.approx(1 + 1e8 + 1e-8 + 4, rel=1e-15, abs=0)


def test_modules_are_put_back() -> None:
    norm = nn.BatchNorm1d(2)
    norm.counts, norm.last = {"a": [1]}, None
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    with pytest.raises(KeyError), modules_kept(norm):
        norm(torch.randn(4, 2))
        norm.counts["b"], norm.last, norm.extra = 1, torch.ones(1), 2
        norm.eval()
        raise KeyError
    assert norm.training and norm.counts == {"a": [1]} and norm.last is None and not hasattr(norm, "extra")
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("diagnose")
    write_folder_dataset(folder / "data")
    write_teacher(folder / "teacher.pth")
    write_run_teacher(folder / "run_teacher.pth")
    return folder


def arguments(place: Path, method: str, save: str, *more: str) -> list[str]:
    if method == "afdcd":
        method = distil_arguments(place / "teacher.pth", "--skip-val", *more)
        return train_arguments(place / "data", place / save, *method)
    teacher = place / "run_teacher.pth"
    return run_arguments(method, place / "data", teacher, place / save, "--max-iterations", "4", *more)


def trained(folder: Path) -> dict:
    """The state at the end of a run, without the settings."""
    (path,) = folder.glob("*_state.pth")
    state = torch.load(path, weights_only=True)
    return {name: state[name] for name in ("model", "distillers", "optimizer", "step")}


@pytest.mark.parametrize("method", ["afdcd", "cirkd"])
def test_a_measured_run_is_the_same_run(place, method, monkeypatch) -> None:
    plain, measured = f"{method}-plain", f"{method}-measured"
    assert train_kd.main(arguments(place, method, plain)) == 0
    argv = arguments(place, method, measured, "--diagnose-every", "1", "--save-per-iters", "2")
    with monkeypatch.context() as patch:
        patch.setattr(train_kd, "train_batch", dying_at(3))
        with pytest.raises(KeyboardInterrupt):
            train_kd.main(argv)
    assert train_kd.main([*argv, "--resume", "auto"]) == 0
    assert_same(trained(place / measured), trained(place / plain))
    own, steps = records(place / measured, "diagnose"), records(place / measured)
    assert [r["step"] for r in own] == [r["step"] for r in steps]
    for one, step in zip(own, steps, strict=True):
        assert {name: x["raw"] for name, x in one["terms"].items()} == pytest.approx(step["raw"], rel=1e-12)
        assert {name: x["weighted"] for name, x in one["terms"].items()} == pytest.approx(step["weighted"], rel=1e-12)
        assert (one["terms"]["task"]["gradient"], one["terms"]["task"]["cosine"]) == pytest.approx((1, 1))
        assert all(x["gradient"] > 0 and -1 <= x["cosine"] <= 1.000001 for x in one["terms"].values())


def dying_at(step: int):
    def dying(run, batch):
        if run.step == step:
            raise KeyboardInterrupt
        return train_batch(run, batch)

    return dying


def test_it_is_measured_every_so_many_steps_and_in_the_last(place) -> None:
    argv = train_arguments(place / "data", place / "often", "--method", "none", "--diagnose-every", "4")
    assert train_kd.main(argv) == 0
    assert [r["step"] for r in records(place / "often", "diagnose")] == [4, 6]


def ready(argv: list[str]) -> Run:
    run = build_run(parse_settings(argv), init_distributed(True))
    get_ready(run)
    return run


def test_compiled_networks_are_run_as_they_were(place) -> None:
    """Their backward pass can be made only once. They stay in place."""
    def compiled(images):
        raise AssertionError("not this one")

    run = ready(train_arguments(place / "data", place / "compiled", "--method", "none"))
    run.objective.run_student = compiled
    assert diagnose(run, next(iter(training_batches(run))))["task"]["gradient"] == pytest.approx(1)
    assert run.objective.run_student is compiled


@pytest.mark.parametrize("flags", [["--amp", "bf16"], ["--no-fast"], ["--grad-accumulation", "2"]])
def test_other_forms_of_the_step(place, flags) -> None:
    run, reference = (ready(arguments(place, "afdcd", "forms", "--lambda-ctr", "0", *more)) for more in (flags, []))
    batch = next(iter(training_batches(run)))
    before = {name: x.clone() for name, x in run.objective.state_dict().items()}
    found, again = diagnose(run, batch), diagnose(run, batch)
    assert found == again and set(found) == {"task", "fd", "kd"}
    assert_same(dict(run.objective.state_dict()), before)
    assert all(p.grad is None for p in run.objective.parameters())
    expected = diagnose(reference, batch)
    if "--grad-accumulation" not in flags:  # there it is another batch; bf16 keeps 8 bits in each of many layers
        assert gradients(found) == pytest.approx(gradients(expected), rel=0.5 if "bf16" in flags else 0.05)


def gradients(found: dict) -> dict[str, float]:
    return {name: term["gradient"] for name, term in found.items()}


def test_the_plain_forms_have_the_same_gradients(place, in_float64) -> None:
    """In float32 the network makes up to a percent of the fast forms' other rounding, on some kinds of CPU."""
    plain, fast = (ready(arguments(place, "afdcd", "float64", "--lambda-ctr", "0", *more))
                   for more in (["--no-fast"], []))
    batch = next(iter(training_batches(plain)))
    assert gradients(diagnose(plain, batch)) == pytest.approx(gradients(diagnose(fast, batch)), rel=1e-9)
