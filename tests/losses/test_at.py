"""Attention transfer: recorded values, a loop twin, overflow, dead features."""
from __future__ import annotations

import pytest
import torch
from method_cases import batch, make
from reference import golden

from losses.at import AT, at_loss, attention_map
from losses.core import NetInfo, methods
from models.output import SegOutput
from utils.errors import UserError


def output(head: torch.Tensor) -> SegOutput:
    return SegOutput(head, None, head, head, head, head, head)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", golden.case_ids("at/"))
def test_golden(name, dtype):
    case = golden.load_case(name)
    inputs = golden.make_inputs(case, dtype)
    golden.check_losses(case, {"at": at_loss(inputs["student"], inputs["teacher"])}, inputs)


def slow_attention(feature: torch.Tensor) -> list[list[torch.Tensor]]:
    images = []
    for image in feature:
        flat = [sum(image[c, i, j] ** 2 for c in range(image.shape[0])) / image.shape[0]
                for i in range(image.shape[1]) for j in range(image.shape[2])]
        length = sum(a ** 2 for a in flat) ** 0.5
        images.append([a / length for a in flat])
    return images


def test_loop_twin():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, 3).double(), torch.randn(2, 4, 5, 3).double()
    pairs = [(s, t) for si, ti in zip(slow_attention(student), slow_attention(teacher), strict=True)
             for s, t in zip(si, ti, strict=True)]
    torch.testing.assert_close(at_loss(student, teacher), sum((s - t) ** 2 for s, t in pairs) / len(pairs))


def test_shrinks_with_the_area():
    """Why the published weight belongs to one crop size: twice the sides, a quarter of the loss."""
    small, big = (torch.rand(2, 2, 8, n, n, generator=torch.Generator().manual_seed(1)) for n in (16, 32))
    assert at_loss(*small).item() / at_loss(*big).item() == pytest.approx(4, rel=0.15)


def test_squares_that_overflow_in_half_precision():
    student, teacher = (torch.full((1, 4, 4, 4), v).half() for v in (300.0, 400.0))
    student[..., 0] = 1
    loss = at_loss(student, teacher)
    assert loss.dtype == torch.float32 and loss.item() > 0
    torch.testing.assert_close(loss, at_loss(student.float(), teacher.float()))


def test_dead_features_have_no_gradient():
    student = torch.zeros(1, 4, 4, 4, requires_grad=True)
    at_loss(student, torch.rand(1, 4, 4, 4)).backward()
    assert student.grad.abs().max() == 0 and attention_map(student).abs().max() == 0


def test_method():
    assert methods()["at"] is AT
    net, bare = NetInfo("s", {"logits": 2, "head": 4}, 2), NetInfo("bare", {"logits": 2}, 2)
    method = make("at", net, net)
    s, t = torch.randn(2, 4, 5, 3, requires_grad=True), torch.randn(2, 6, 5, 3, requires_grad=True)
    terms = method(batch(output(s), output(t)))
    terms["at"].backward()
    assert list(terms) == ["at"] and t.grad is None and s.grad.abs().sum() > 0 and not list(method.parameters())
    with pytest.raises(UserError, match="'at' needs head of the teacher, but bare offers only logits"):
        make("at", net, bare)
    with pytest.raises(UserError, match=r"at: .*\(2, 4, 5, 3\).*\(2, 4, 5, 4\)"):
        at_loss(s, torch.zeros(2, 4, 5, 4))
