"""Logit distillation and the task loss: recorded values, gradients, edge cases."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from method_cases import batch, make, options_of_method
from reference import fill, golden

from losses import KD, CriterionKD, SegCrossEntropyLoss, kd_loss, methods, task_loss
from losses.core import NetInfo
from models.output import SegOutput
from utils.errors import UserError

RECORDED = json.loads((Path(golden.__file__).parent / "losses.json").read_text())
DTYPES = (torch.float32, torch.float64)


def recorded(kind: str) -> list:
    return [pytest.param(case, id=case["id"]) for case in RECORDED["cases"] if case["spec"]["loss"] == kind]


def check(case: dict, loss: torch.Tensor, student: torch.Tensor) -> None:
    double = loss.dtype == torch.float64
    tolerance = 1e-6 if double else max(1e-4, 20 * case["f32_dev"])
    expect = case["expect64" if double else "expect"]
    assert loss.item() == pytest.approx(expect["loss"], rel=tolerance)
    (gradient,) = torch.autograd.grad(loss, student)
    assert fill.compare(fill.digest(gradient), expect["grad"]) < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", recorded("kd"))
def test_kd_recorded(case, dtype):
    spec = case["spec"]
    student, teacher = (fill.tensor(name, spec["shape"], spec["seed"], spec["scale"], dtype)
                        for name in ("pred", "soft"))
    student.requires_grad_()
    check(case, CriterionKD(spec["temperature"])(student, teacher), student)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", recorded("seg"))
def test_cross_entropy_recorded(case, dtype):
    spec = case["spec"]
    logits = fill.tensor("logits", spec["shape"], spec["seed"], spec.get("scale", 1.0), dtype).requires_grad_()
    target = fill.labels("labels", spec["label_shape"], spec["shape"][1], spec["seed"],
                         spec.get("ignore_frac", 0.1), spec["ignore_index"])
    check(case, SegCrossEntropyLoss(spec["ignore_index"])(logits, target), logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", golden.case_ids("kd/"))
def test_kd_golden(name, dtype):
    """The three reductions in use differ by constants, and the last one by the teacher's entropy."""
    case = golden.load_case(name)
    inputs = golden.make_inputs(case, dtype)
    student, teacher = inputs["student"], inputs["teacher"]
    loss = kd_loss(student, teacher, case["config"].get("temperature", 1.0))
    batch, classes, height, width = student.shape
    if name == "kd/ifvd_mean":
        loss = loss / classes
    elif name == "kd/skd_pixelwise":
        p = teacher.softmax(dim=1)
        loss = batch * loss - (p * p.log()).sum() / (height * width)
    golden.check_losses(case, {next(iter(case["losses"])): loss}, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_golden(dtype):
    case = golden.load_case("task/ce_upsample")
    inputs = golden.make_inputs(case, dtype)
    loss = SegCrossEntropyLoss(case["config"]["ignore_index"])(inputs["student"], golden.make_labels(case))
    golden.check_losses(case, {"ce": loss}, inputs)


def test_cross_entropy_of_groups_is_the_mean_of_processes():
    logits = fill.tensor("z", (5, 4, 3, 3), 1, 1.0, torch.float64)
    target = fill.labels("y", (5, 24, 24), 4, ignore_frac=0.2)
    target[1], target[2, :12], target[3] = -1, -1, target[0]
    alone = SegCrossEntropyLoss()
    for size, parts in ((2, ((0, 2), (2, 4), (4, 5))), (3, ((0, 3), (3, 5))), (0, ((0, 5),)), (9, ((0, 5),))):
        expected = sum((b - a) / 5 * alone(logits[a:b], target[a:b]).item() for a, b in parts)
        assert SegCrossEntropyLoss(group_size=size)(logits, target).item() == pytest.approx(expected, rel=1e-12)
    target[:2] = -1
    expected = sum((b - a) / 5 * alone(logits[a:b], target[a:b]).item() for a, b in ((2, 4), (4, 5)))
    assert SegCrossEntropyLoss(group_size=2)(logits, target).item() == pytest.approx(expected, rel=1e-12)


def test_kd_teacher_gets_no_gradient():
    student, teacher = (torch.randn(2, 5, 4, 4, requires_grad=True) for _ in range(2))
    kd_loss(student, teacher).backward()
    assert teacher.grad is None and student.grad is not None


def test_kd_of_equal_logits_is_zero_and_shapes_must_agree():
    logits = torch.randn(2, 5, 4, 4)
    assert kd_loss(logits, logits, 3.0).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match=r"\(2, 5, 4, 4\).*\(2, 5, 4, 3\)"):
        kd_loss(logits, logits[..., :3])
    with pytest.raises(UserError, match="kd: temperature 0: expected a number above 0"):
        CriterionKD(0.0)


def test_half_precision_is_computed_in_float32():
    student, teacher = (fill.tensor(n, (2, 19, 6, 6), 1, 4.0).bfloat16() for n in ("s", "t"))
    target = fill.labels("y", (2, 40, 40), 19)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kd, ce = kd_loss(student, teacher), SegCrossEntropyLoss()(student, target)
    for got, want in ((kd, kd_loss(student.float(), teacher.float())),
                      (ce, SegCrossEntropyLoss()(student.float(), target))):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("ignore", [-1, 255])
def test_batch_without_labels_gives_zero_and_no_gradient(ignore):
    logits = torch.randn(2, 5, 4, 4, requires_grad=True)
    loss = SegCrossEntropyLoss(ignore)(logits, torch.full((2, 32, 32), ignore))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().max() == 0


def test_small_label_types_are_accepted():
    logits, target = torch.randn(1, 5, 4, 4), fill.labels("y", (1, 32, 32), 5)
    assert SegCrossEntropyLoss()(logits, target.short()).item() == SegCrossEntropyLoss()(logits, target).item()


def output(logits, aux) -> SegOutput:
    return SegOutput(logits=logits, aux=aux, c1=logits, c2=logits, c3=logits, c4=logits, head=logits)


def test_task_terms():
    logits, aux, target = torch.randn(1, 5, 4, 4), torch.randn(1, 5, 4, 4), fill.labels("y", (1, 32, 32), 5)
    criterion = SegCrossEntropyLoss()
    both = task_loss(output(logits, aux), target, criterion)
    assert {k: v.item() for k, v in both.items()} == {"task": criterion(logits, target).item(),
                                                      "aux": criterion(aux, target).item()}
    assert list(task_loss(output(logits, None), target, criterion)) == ["task"]


def test_kd_method():
    assert methods()["kd"] is KD
    net = NetInfo("net", {"logits": 5}, 5)
    student, teacher = torch.randn(1, 5, 4, 4), torch.randn(1, 5, 4, 4)
    for method, temperature in ((make("kd", net, net, "--kd_temperature", "4"), 4.0), (make("kd", net, net), 1.0)):
        terms = method(batch(output(student, None), output(teacher, None)))
        assert {k: v.item() for k, v in terms.items()} == {"kd": kd_loss(student, teacher, temperature).item()}
        assert not list(method.parameters())
    assert KD.Options() == options_of_method("kd", kd_temperature=1.0)
