"""Af-DCD against recorded values: losses, gradients and every intermediate, in float32 and float64."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reference import fill, golden

from losses.afdcd import (
    OmniContrastiveFeatureLoss,
    contrast_rows,
    crop_to_patches,
    excluded_pairs,
    pairwise_similarity,
    patch_rows,
    random_keep_mask,
)

RECORDED = json.loads((Path(golden.__file__).parent / "losses.json").read_text())
CASES = {case["id"]: case for case in RECORDED["cases"] if case["spec"]["loss"] == "ocfl"}
#: 76 M parameters each
FULL_SIZE = ("ocfl_full_512_2048", "ocfl_full_320_2048")
SMALL = [name for name in CASES if name not in FULL_SIZE]


def feature(name: str, spec: dict, dtype: torch.dtype) -> torch.Tensor:
    x = fill.tensor(f"{name}_feature", spec[name], spec["seed"], spec["scale"], dtype)
    return x.clamp(min=0) if spec["relu"] else x


def setup(case: dict, dtype: torch.dtype):
    """Criterion, student, teacher and keep mask of a recorded case."""
    spec = case["spec"]
    options = dict(spec["ctor"])
    options["patch_size"] = tuple(options.get("patch_size", (4, 4)))
    criterion = fill.fill_module(OmniContrastiveFeatureLoss(**options).to(dtype), spec["seed"])
    student, teacher = feature("student", spec, dtype).requires_grad_(), feature("teacher", spec, dtype)
    keep = None
    if options["rand_mask"]:
        draw = fill.uniform("mask", (len(student), 1, *student.shape[-2:]), spec["mask_seed"])
        keep = random_keep_mask(draw, criterion.mask_ratio)
    return criterion, student, teacher, keep


def check(criterion, student, losses: dict, expect: dict, tolerance: float) -> None:
    """Compare both losses, the student's gradient and the norm of every parameter's gradient."""
    leaves = dict(criterion.named_parameters())
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expect[name], rel=tolerance)
        gradient, *rest = torch.autograd.grad(loss, [student, *leaves.values()], retain_graph=name == "fd")
        assert fill.compare(fill.digest(gradient), expect[f"{name}_grad_student"]) < tolerance
        for parameter, grad in zip(leaves, rest, strict=True):
            norm = float(grad.double().norm())
            assert norm == pytest.approx(expect[f"{name}_gradnorm:{parameter}"], rel=tolerance), parameter
    recorded = {key.partition(":")[2] for key in expect if key.startswith("fd_gradnorm:")}
    assert recorded == set(leaves)


def check_float32(case: dict, criterion, student, teacher, keep) -> None:
    fd, ctr = criterion(student, teacher, keep=keep)
    assert fd.dtype == ctr.dtype == torch.float32
    check(criterion, student, {"fd": fd, "ctr": ctr}, case["expect"], max(1e-4, 20 * case["f32_dev"]))


def check_float64(case: dict, criterion, student, teacher, keep) -> None:
    fd, ctr = criterion(student, teacher, keep=keep)
    assert fd.dtype == ctr.dtype == torch.float64
    check(criterion, student, {"fd": fd, "ctr": ctr}, case["expect64"], 1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_float32(name):
    check_float32(CASES[name], *setup(CASES[name], torch.float32))


@pytest.fixture(params=["apart", "folded"])
def alignment(request, monkeypatch) -> None:
    """Aligned and projected one after the other, or in one convolution, whatever the size of the map would call for."""
    monkeypatch.setattr("losses.core.feature_losses.fold_pays", lambda *_: request.param == "folded")


@pytest.mark.parametrize("name", SMALL)
def test_float64(name, alignment):
    check_float64(CASES[name], *setup(CASES[name], torch.float64))


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size(name):
    """The published widths; the wider student in float32 only, to save time."""
    case = CASES[name]
    criterion, student, teacher, keep = setup(case, torch.float32)
    check_float32(case, criterion, student, teacher, keep)
    if name == "ocfl_full_320_2048":
        check_float64(case, criterion.double(), student.detach().double().requires_grad_(), teacher.double(), keep)


@pytest.mark.parametrize("name", SMALL)
def test_intermediates(name):
    """The steps in order, from the public functions; they end in the very value that ``forward`` returns."""
    case = CASES[name]
    criterion, student, teacher, keep = setup(case, torch.float32)
    student = student.detach()
    keep = criterion.keep_mask(student) if keep is None else keep
    keep = keep.expand(len(student), -1, -1, -1)
    aligned = criterion.align(student)
    projected = criterion.projetor(aligned * keep)
    pooled = [crop_to_patches(criterion.contrast_map(x), criterion.patch) for x in (projected, teacher)]
    rows = [patch_rows(x, criterion.groups, criterion.patch) for x in pooled]
    steps = {"aligned": aligned, "keep_mask": keep.float(), "projected": projected, "pooled_student": pooled[0],
             "pooled_teacher": pooled[1], "rows_student": rows[0], "rows_teacher": rows[1],
             "similarity": pairwise_similarity(*rows)}
    expect = case["intermediates"]
    assert set(expect) == {*steps, "kept_fraction"}
    assert float(keep.float().mean()) == pytest.approx(expect["kept_fraction"])
    for step, got in steps.items():
        assert fill.compare(fill.digest(got), expect[step]) < max(1e-4, 20 * case["f32_dev"]), step
    excluded = excluded_pairs(criterion.groups, criterion.patch)
    ctr = contrast_rows(*rows, excluded, criterion.tau) / (len(student) * pooled[0][0, 0].numel())
    torch.testing.assert_close(ctr, criterion(student, teacher, keep=keep)[1])


def test_worked_example():
    """The written-out case: every row, similarity, positive and negative, and the loss."""
    example = RECORDED["worked_example"]
    numbers = {k: torch.tensor(json.loads(v) if isinstance(v, str) else v, dtype=torch.float64)
               for k, v in example.items() if k in ("student", "teacher", "rows_student", "rows_teacher", "similarity")}
    groups, patch = example["M"], tuple(example["patch"])
    student_rows, teacher_rows = (patch_rows(numbers[k], groups, patch) for k in ("student", "teacher"))
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(student_rows, numbers["rows_student"], **close)
    torch.testing.assert_close(teacher_rows, numbers["rows_teacher"], **close)
    torch.testing.assert_close(pairwise_similarity(student_rows, teacher_rows), numbers["similarity"], **close)
    excluded = excluded_pairs(groups, patch)
    for row, (positive, negatives) in enumerate(zip(example["positive_columns"], example["negative_columns"],
                                                    strict=True)):
        assert positive == [row]
        allowed = (~excluded[row]).nonzero().flatten().tolist()
        assert sorted(positive + negatives) == allowed
    # recorded before the division by the batch, after that by the 2 * 4 positions
    loss = contrast_rows(student_rows, teacher_rows, excluded, example["tau"]) / 8
    assert loss.item() == pytest.approx(example["loss_before_batch_division"], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", golden.case_ids("afdcd/"))
def test_method_golden(name, dtype, alignment):
    case = golden.load_case(name)
    c = case["config"]
    criterion = OmniContrastiveFeatureLoss(c["cs"], c["ct"], c["rand"], c["ratio"], c["enh"], c["tau"], c["M"],
                                           c["pool"], tuple(c["patch"]), c["ds"]).to(dtype)
    golden.fill_params(criterion, case)
    inputs = golden.make_inputs(case, dtype)
    keep = None
    if c["rand"]:
        draw = golden.uniform(case, "mask_u", (c["n"], 1, c["h"], c["w"]), torch.float32)
        keep = random_keep_mask(draw, c["ratio"])
    fd, ctr = criterion(inputs["student"], inputs["teacher"], keep=keep)
    golden.check_losses(case, {"fd": fd, "ctr": ctr}, inputs, criterion)


def test_random_stream_is_the_recorded_one():
    fill.selfcheck()
