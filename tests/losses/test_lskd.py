"""LSKD: recorded values, the formula in loops, edge cases."""
from __future__ import annotations

import math

import pytest
import torch
from method_cases import batch, make
from reference import fill, golden

from losses.core import NetInfo, methods
from losses.lskd import LSKD, lskd_loss
from models.output import SegOutput
from utils.errors import UserError

DTYPES = (torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", golden.case_ids("lskd/"))
def test_golden(name, dtype):
    case = golden.load_case(name)
    inputs = golden.make_inputs(case, dtype)
    loss = lskd_loss(inputs["student"], inputs["teacher"], case["config"]["temperature"])
    golden.check_losses(case, {"kd": loss}, inputs)


def maps(shape=(2, 4, 3, 5)):
    return fill.tensor("s", shape, 1, 2.0, torch.float64), fill.tensor("t", shape, 1, 3.0, torch.float64)


def probabilities(z: list[float], temperature: float) -> list[float]:
    mean = sum(z) / len(z)
    std = math.sqrt(sum((v - mean) ** 2 for v in z) / (len(z) - 1)) + 1e-7
    e = [math.exp((v - mean) / std / temperature) for v in z]
    return [v / sum(e) for v in e]


def test_formula_in_loops():
    student, teacher = maps()
    total = 0.0
    for n in range(2):
        for i in range(3):
            for j in range(5):
                q, p = (probabilities(x[n, :, i, j].tolist(), 3.0) for x in (student, teacher))
                total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert lskd_loss(student, teacher, 3.0).item() == pytest.approx(9 * total / 30, rel=1e-10)


def test_scale_and_offset_do_not_matter():
    student, _ = maps()
    assert lskd_loss(student, 5 * student + 2, 2.0).item() == pytest.approx(0, abs=1e-10)


def test_equal_logits_of_all_classes_have_finite_gradients():
    flat = torch.full((1, 3, 2, 2), 4.0, requires_grad=True)
    teacher = torch.randn(1, 3, 2, 2)
    loss = lskd_loss(flat, teacher, 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(lskd_loss(torch.zeros_like(flat), teacher, 2.0).item()) and loss > 0
    assert torch.isfinite(flat.grad).all()


def test_half_precision_is_computed_in_float32_and_the_teacher_gets_no_gradient():
    student, teacher = (x.bfloat16().requires_grad_() for x in maps())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = lskd_loss(student, teacher, 2.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(lskd_loss(student.float(), teacher.float(), 2.0).item(), rel=1e-6)
    loss.backward()
    assert teacher.grad is None and student.grad is not None


def test_method():
    assert methods()["lskd"] is LSKD and LSKD.terms[0].weight == 0
    net = NetInfo("net", {"logits": 4}, 4)
    outputs = [SegOutput(logits=x, aux=None, c1=x, c2=x, c3=x, c4=x, head=x) for x in maps()]
    for options, temperature in (({}, 2.0), ({"lskd_temperature": 4.0}, 4.0)):
        method = make("lskd", net, net, **options)
        got = method(batch(*outputs))
        assert {k: v.item() for k, v in got.items()} == {"lskd": lskd_loss(*maps(), temperature).item()}
    with pytest.raises(UserError, match="'lskd' needs at least 2 classes"):
        make("lskd", *[NetInfo("net", {"logits": 1}, 1)] * 2)
    with pytest.raises(UserError, match="lskd.*shape"):
        lskd_loss(maps()[0], maps()[1][:, :3], 2.0)
