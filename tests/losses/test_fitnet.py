"""FitNet: recorded values, and the method around them."""
from __future__ import annotations

import pytest
import torch
from method_cases import batch, make
from reference import golden

from losses.core import NetInfo, methods
from losses.fitnet import CriterionFitNet, FitNet
from models.output import SegOutput
from utils.errors import UserError


def output(head: torch.Tensor) -> SegOutput:
    return SegOutput(head, None, head, head, head, head, head)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", golden.case_ids("fitnet/"))
def test_golden(name, dtype):
    case = golden.load_case(name)
    inputs = golden.make_inputs(case, dtype)
    criterion = CriterionFitNet(case["config"]["s_channels"], case["config"]["t_channels"]).to(dtype)
    golden.fill_params(criterion, case)
    golden.check_losses(case, {"fitnet": criterion(inputs["student"], inputs["teacher"])}, inputs, criterion)


def test_loop_twin_and_equal_widths_keep_the_convolution():
    torch.manual_seed(0)
    criterion = CriterionFitNet(3, 3).double()
    student, teacher = torch.randn(1, 3, 5, 7).double(), torch.randn(1, 3, 5, 7).double()
    weight, total = criterion.conv.weight[:, :, 0, 0].tolist(), 0.0
    for c in range(3):
        for y in range(5):
            for x in range(7):
                total += (sum(weight[c][k] * student[0, k, y, x] for k in range(3)) - teacher[0, c, y, x]) ** 2
    assert criterion.conv.bias is None
    assert criterion(student, teacher).item() == pytest.approx(float(total) / (3 * 5 * 7))


def test_method():
    assert methods()["fitnet"] is FitNet
    student, teacher = NetInfo("s", {"logits": 2, "head": 4}, 2), NetInfo("t", {"logits": 2, "head": 6}, 2)
    method = make("fitnet", student, teacher)
    assert [tuple(p.shape) for p in method.trained_parameters()] == [(6, 4, 1, 1)]
    s, t = torch.randn(2, 4, 5, 3, requires_grad=True), torch.randn(2, 6, 5, 3, requires_grad=True)
    terms = method(batch(output(s), output(t)))
    terms["fitnet"].backward()
    assert list(terms) == ["fitnet"] and t.grad is None and s.grad.abs().sum() > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = method(batch(output(s), output(t)))["fitnet"]
    assert half.dtype == torch.float32 and half.item() == pytest.approx(terms["fitnet"].item(), rel=0.02)


def test_what_does_not_fit_is_refused():
    net, bare = NetInfo("s", {"logits": 2, "head": 4}, 2), NetInfo("bare", {"logits": 2}, 2)
    with pytest.raises(UserError, match="'fitnet' needs head of the student, but bare offers only logits"):
        make("fitnet", bare, net)
    with pytest.raises(UserError, match=r"fitnet: .*\(1, 6, 4, 4\).*\(1, 6, 4, 5\)"):
        CriterionFitNet(4, 6)(torch.zeros(1, 4, 4, 4), torch.zeros(1, 6, 4, 5))
