"""BPKD: edges by hand, a loop twin of both terms, labels that are ignored or of one class."""
from __future__ import annotations

import math

import pytest
import torch
from method_cases import batch, make
from reference import fill

from losses.bpkd import BPKD, BPKDOptions, body_loss, edge_loss, edge_mask
from losses.core import NetInfo, methods
from losses.cwd import cwd_loss
from models.output import SegOutput
from utils.errors import UserError

BOTH = frozenset({"bpkd_edge", "bpkd_body"})
NET = NetInfo("net", {"logits": 4}, 4)


def output(logits: torch.Tensor) -> SegOutput:
    return SegOutput(logits, None, logits, logits, logits, logits, logits)


def slow_edges(target: torch.Tensor, num_class: int, kernel: int, ignore: int) -> torch.Tensor:
    """[B, K, H, W] at label size, pixel by pixel."""
    batch, height, width = target.shape
    edges, reach = torch.zeros(batch, num_class, height, width), kernel // 2
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                window = target[b, max(y - reach, 0):y + reach + 1, max(x - reach, 0):x + reach + 1]
                seen = set(window.reshape(-1).tolist()) - {ignore}
                if target[b, y, x] != ignore and len(seen) > 1:
                    edges[b, sorted(seen), y, x] = 1
    return edges


def labels(block: int = 4, ignored: float = 0.2) -> torch.Tensor:
    coarse = fill.labels("y", (2, 96 // block, 64 // block), 4, 5, ignored, -1)[:, ::4, ::4]
    return coarse.repeat_interleave(block, 1).repeat_interleave(block, 2)


@pytest.mark.parametrize("kernel", [3, 7])
@pytest.mark.parametrize("ignored", [0.0, 0.2])
def test_edges(kernel, ignored):
    target = labels(8, ignored)
    slow = slow_edges(target, 4, kernel, -1)
    assert 0 < slow.mean() < 1
    torch.testing.assert_close(edge_mask(target, 4, (24, 16), kernel), slow)
    cells = slow.unflatten(3, (2, 8)).unflatten(2, (3, 8)).mean(dim=(3, 5))
    torch.testing.assert_close(edge_mask(target, 4, (3, 2), kernel), cells)


def test_edges_are_dilation_minus_erosion():
    """Of a half-and-half image: two columns on either side of the border belong to both classes' edges."""
    target = torch.zeros(1, 8, 16, dtype=torch.long)
    target[..., 8:] = 2
    edges = edge_mask(target, 3, (8, 16), kernel=5)
    columns = torch.zeros(16)
    columns[6:10] = 1
    assert torch.equal(edges[0, 0], columns.expand(8, 16)) and torch.equal(edges[0, 2], edges[0, 0])
    assert edges[0, 1].sum() == 0


def test_ignored_pixels_are_no_edge_and_make_none():
    target = torch.zeros(1, 8, 8, dtype=torch.long)
    target[..., 4:] = 255
    assert edge_mask(target, 3, (8, 8), 3, ignore_label=255).sum() == 0
    target[..., 3] = 1
    assert edge_mask(target, 3, (8, 8), 3, ignore_label=255)[..., 4:].sum() == 0


def slow_losses(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, tau: float) -> tuple[float, float]:
    batch, classes, height, width = student.shape
    cells = [(i, j) for i in range(height) for j in range(width)]
    edge = body = 0.0
    for b in range(batch):
        sums = [0.0] * classes
        for i, j in cells:
            m = mask[b, :, i, j]
            p, q = ((x[b, :, i, j] * m / tau).softmax(0) for x in (teacher, student))
            divergence = sum(u * math.log(u / v) for u, v in zip(p.tolist(), q.tolist(), strict=True))
            sums = [total + divergence * float(w) for total, w in zip(sums, m, strict=True)]
        for c in range(classes):
            edge += sums[c] / max(sum(bool(mask[b, c, i, j] > 0) for i, j in cells), 1)
            maps = [[float(x[b, c, i, j] * (1 - mask[b, c, i, j])) / tau for i, j in cells] for x in (teacher, student)]
            p, q = ([math.exp(v) / sum(math.exp(u) for u in z) for v in z] for z in maps)
            body += sum(u * math.log(u / v) for u, v in zip(p, q, strict=True)) / classes
    return edge * tau ** 2 / batch, body * tau ** 2 / batch


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_loop_twin(tau):
    student, teacher = (fill.tensor(n, (2, 4, 5, 3), 6, 2.0, torch.float64) for n in ("s", "t"))
    mask = edge_mask(labels(), 4, (5, 3), 3).double()
    assert 0 < (mask > 0).double().mean() < 1
    edge, body = slow_losses(student, teacher, mask, tau)
    assert edge_loss(student, teacher, mask, tau).item() == pytest.approx(edge, rel=1e-9)
    assert body_loss(student, teacher, mask, tau).item() == pytest.approx(body, rel=1e-9)


@pytest.mark.parametrize("label", [-1, 2])
def test_without_edges_the_body_is_cwd(label):
    """Nothing labelled, or one class only: no edge, and the whole map is body."""
    method = make("bpkd", NET, NET)
    student, teacher = (torch.randn(2, 4, 5, 3, requires_grad=True) for _ in range(2))
    terms = method(batch(output(student), output(teacher), torch.full((2, 40, 24), label)))
    assert terms["bpkd_edge"].item() == 0
    torch.testing.assert_close(terms["bpkd_body"], cwd_loss(student, teacher, 1.0))
    (gradient,) = torch.autograd.grad(terms["bpkd_edge"], student)
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("active", [BOTH, {"bpkd_edge"}, {"bpkd_body"}])
def test_method(active):
    assert methods()["bpkd"] is BPKD and "unofficial" in BPKD.title
    method = make("bpkd", NET, NET, "--bpkd-kernel", "3", "--bpkd-temperature", "4", active=active)
    student, teacher = (fill.tensor(n, (2, 4, 3, 2), 7, 2.0).requires_grad_() for n in ("s", "t"))
    target = labels()
    terms = method(batch(output(student), output(teacher), target))
    assert set(terms) == set(active)
    mask = edge_mask(target, 4, (3, 2), 3)
    for name, loss in (("bpkd_edge", edge_loss), ("bpkd_body", body_loss)):
        if name in active:
            assert terms[name].item() == loss(student, teacher, mask, 4.0).item() > 0
    sum(terms.values()).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = method(batch(output(student.bfloat16()), output(teacher.bfloat16()), target))
    for name in active:
        assert half[name].dtype == torch.float32 and half[name].item() == pytest.approx(terms[name].item(), rel=0.05)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="bpkd temperature 0.0: expected a number above 0"):
        BPKDOptions(bpkd_temperature=0.0)
    with pytest.raises(UserError, match="bpkd kernel 4: expected an odd"):
        make("bpkd", NET, NET, bpkd_kernel=4)
    with pytest.raises(UserError, match="bpkd"):
        make("bpkd", NET, NetInfo("other", {"logits": 5}, 5))
    with pytest.raises(UserError, match="bpkd"):
        edge_loss(torch.zeros(1, 4, 3, 2), torch.zeros(1, 4, 3, 3), torch.zeros(1, 4, 3, 2))
