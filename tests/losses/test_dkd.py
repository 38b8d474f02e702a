"""DKD: recorded values, the formula in loops, ignored labels, edge cases."""
from __future__ import annotations

import math

import pytest
import torch
from method_cases import batch, make
from reference import fill, golden

from losses.core import NetInfo, labels_at, methods
from losses.dkd import DKD, dkd_loss
from models.output import SegOutput
from utils.errors import UserError

DTYPES = (torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", golden.case_ids("dkd/"))
def test_golden(name, dtype):
    case = golden.load_case(name)
    inputs, config = golden.make_inputs(case, dtype), case["config"]
    loss = dkd_loss(inputs["student"], inputs["teacher"], golden.make_labels(case), config["alpha"], config["beta"],
                    config["tau"])
    golden.check_losses(case, {"dkd": loss}, inputs)


def maps(shape=(2, 4, 3, 5)):
    return fill.tensor("s", shape, 1, 2.0, torch.float64), fill.tensor("t", shape, 1, 3.0, torch.float64)


def softmax(z: list[float]) -> list[float]:
    e = [math.exp(v) for v in z]
    return [v / sum(e) for v in e]


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def loops(student, teacher, label, alpha: float, beta: float, temperature: float, ignored: set[int]) -> float:
    total, count = 0.0, 0
    for n, i, j in torch.cartesian_prod(*map(torch.arange, label.shape)).tolist():
        y = int(label[n, i, j])
        if y in ignored:
            continue
        s, t = ([v / temperature for v in x[n, :, i, j].tolist()] for x in (student, teacher))
        (p, q), others = (softmax(t), softmax(s)), [c for c in range(len(s)) if c != y]
        total += alpha * divergence([p[y], 1 - p[y]], [q[y], 1 - q[y]])
        total += beta * divergence(softmax([t[c] for c in others]), softmax([s[c] for c in others]))
        count += 1
    return total / count * temperature ** 2


@pytest.mark.parametrize("ignore", [-1, 255])
def test_formula_in_loops(ignore):
    student, teacher = maps()
    label = torch.arange(30).reshape(2, 3, 5) % 4
    label[0, 1] = ignore
    label[1, 2, 3] = -100
    target = label.repeat_interleave(8, 1).repeat_interleave(8, 2)
    got = dkd_loss(student, teacher, target, 0.7, 1.5, 2.0, ignore)
    assert got.item() == pytest.approx(loops(student, teacher, label, 0.7, 1.5, 2.0, {ignore, -100}), rel=1e-10)


def test_labels_are_those_of_the_nearest_pixel():
    target = torch.arange(35).reshape(1, 5, 7).short()
    assert labels_at(target, (2, 3))[0].tolist() == [[7 * i + j for j in (0, 2, 4)] for i in (0, 2)]
    assert labels_at(torch.full((1, 5, 7), 255), (2, 3)).unique().tolist() == [255]


def test_ignored_pixels_get_no_gradient_and_nothing_labelled_is_zero():
    student, teacher = maps()
    student.requires_grad_()
    label = torch.zeros(2, 3, 5, dtype=torch.long)
    label[1, 2, 3] = -1
    dkd_loss(student, teacher, label, 1.0, 8.0).backward()
    assert (student.grad.abs().sum(dim=1) > 0).equal(label == 0)
    student.grad = None
    loss = dkd_loss(student, teacher, torch.full_like(label, -1), 1.0, 8.0)
    loss.backward()
    assert loss.item() == 0 and student.grad.abs().max() == 0


@pytest.mark.parametrize("classes", [2, 5])
def test_certain_networks_have_finite_gradients(classes):
    teacher = torch.zeros(1, classes, 2, 2)
    teacher[:, 0] = 300.0
    for sign in (1, -1):
        student = (sign * teacher).requires_grad_()
        loss = dkd_loss(student, teacher, torch.zeros(1, 2, 2, dtype=torch.long), 1.0, 8.0)
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-4) if sign > 0 else loss > 100
        assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


def test_half_precision_is_computed_in_float32_and_the_teacher_gets_no_gradient():
    student, teacher = (x.bfloat16().requires_grad_() for x in maps())
    label = torch.ones(2, 3, 5, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = dkd_loss(student, teacher, label, 1.0, 8.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(dkd_loss(student.float(), teacher.float(), label, 1.0, 8.0).item(), rel=1e-6)
    loss.backward()
    assert teacher.grad is None and student.grad is not None


def test_method():
    assert methods()["dkd"] is DKD and DKD.terms[0].weight == 0
    net = NetInfo("net", {"logits": 4}, 4)
    outputs = [SegOutput(logits=x, aux=None, c1=x, c2=x, c3=x, c4=x, head=x) for x in maps()]
    target = fill.labels("y", (2, 24, 40), 4, ignore_frac=0.3, ignore=255)
    given = {"dkd_alpha": 2.0, "dkd_beta": 8.0, "dkd_temperature": 4.0}
    for options, settings in (({}, (1.0, 0.5, 1.0)), (given, (2.0, 8.0, 4.0))):
        method = make("dkd", net, net, ignore_label=255, group_size=0, **options)
        got = method(batch(*outputs, target))
        assert {k: v.item() for k, v in got.items()} == {"dkd": dkd_loss(*maps(), target, *settings, 255).item()}
    with pytest.raises(UserError, match="'dkd' needs at least 2 classes"):
        make("dkd", *[NetInfo("net", {"logits": 1}, 1)] * 2)
    with pytest.raises(UserError, match="dkd.*shape"):
        dkd_loss(maps()[0], maps()[1][..., :3], target, 1.0, 8.0)
