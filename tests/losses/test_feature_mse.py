"""Feature MSE: every normalisation against a loop, aligners, taps, refusals."""
from __future__ import annotations

import pytest
import torch
from method_cases import batch, make

from losses.core import NetInfo, methods
from losses.core.feature_losses import FEATURE_NORMS as NORMS
from losses.core.feature_losses import normalize_map
from losses.feature_mse import ALIGNERS, FeatureMSE, FeatureMSEOptions, feature_mse_loss
from models.output import SegOutput
from utils.errors import UserError

STUDENT = NetInfo("s", {"logits": 2, "c4": 3, "head": 4}, 2)
TEACHER = NetInfo("t", {"logits": 2, "c4": 5, "head": 6}, 2)


def output(c4: torch.Tensor, head: torch.Tensor) -> SegOutput:
    return SegOutput(head, None, c4, c4, c4, c4, head)


def maps(net: NetInfo, **more) -> SegOutput:
    return output(*(torch.randn(2, net.channels[tap], 5, 3, **more) for tap in ("c4", "head")))


def slow_normalize(x: torch.Tensor, norm: str) -> torch.Tensor:
    out = x.clone()
    batch, channels, height, width = x.shape
    vectors = ([(b, slice(None), i, j) for b in range(batch) for i in range(height) for j in range(width)]
               if norm in ("l2", "position") else [(b, c) for b in range(batch) for c in range(channels)])
    for where in vectors if norm != "none" else ():
        v = x[where]
        mean = v.sum() / v.numel()
        variance = ((v - mean) ** 2).sum() / v.numel()
        out[where] = v / (v * v).sum().sqrt() if norm == "l2" else (v - mean) / (variance + 1e-6).sqrt()
    return out


@pytest.mark.parametrize("norm", NORMS)
def test_loop_twin(norm):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 5, 3).double(), torch.randn(2, 4, 5, 3).double()
    total = (slow_normalize(student, norm) - slow_normalize(teacher, norm)).square().sum() / student.numel()
    torch.testing.assert_close(feature_mse_loss(student, teacher, norm), total)


@pytest.mark.parametrize("norm", NORMS[1:])
def test_normalised_errors_ignore_the_scale_and_survive_dead_maps(norm):
    student = torch.randn(1, 4, 3, 3, requires_grad=True)
    teacher = student.detach() * 100
    assert feature_mse_loss(student, teacher, norm).item() < 1e-4
    assert feature_mse_loss(student, student.detach()).item() == 0
    dead = torch.zeros(1, 4, 3, 3, requires_grad=True)
    feature_mse_loss(dead, teacher, norm).backward()
    assert dead.grad.isfinite().all() and normalize_map(dead, norm).isfinite().all()


@pytest.mark.parametrize("align", ALIGNERS)
@pytest.mark.parametrize("tap", ["head", "c4"])
def test_method(tap, align):
    assert methods()["mse"] is FeatureMSE
    teacher = STUDENT if align == "none" else TEACHER
    method = make("mse", STUDENT, teacher, "--mse-tap", tap, "--mse-norm", "channel", "--mse-align", align)
    assert method.tap == tap and bool(method.trained_parameters()) == (align != "none")
    s, t = maps(STUDENT, requires_grad=True), maps(teacher, requires_grad=True)
    loss = method(batch(s, t))["mse"]
    loss.backward()
    used, other = (s.head, s.c4) if tap == "head" else (s.c4, s.head)
    assert used.grad.abs().sum() > 0 and other.grad is None and t.head.grad is None and t.c4.grad is None
    assert all(p.grad is not None for p in method.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = method(batch(s, t))["mse"]
    assert half.dtype == torch.float32 and half.item() == pytest.approx(loss.item(), rel=0.03)


def test_what_does_not_fit_is_refused():
    bare = NetInfo("bare", {"logits": 2, "head": 4}, 2)
    with pytest.raises(UserError, match="'mse' needs c4 of the teacher, but bare offers only logits, head"):
        make("mse", STUDENT, bare, mse_tap="c4")
    with pytest.raises(UserError, match="mse without alignment: the student's 4 channels"):
        make("mse", STUDENT, TEACHER, mse_align="none")
    with pytest.raises(UserError, match="mse norm 'l1': expected one of none, l2"):
        FeatureMSEOptions(mse_norm="l1")
    with pytest.raises(UserError, match=r"mse: .*\(1, 4, 4, 4\).*\(1, 5, 4, 4\)"):
        feature_mse_loss(torch.zeros(1, 4, 4, 4), torch.zeros(1, 5, 4, 4))
