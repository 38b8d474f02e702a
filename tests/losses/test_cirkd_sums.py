"""The faster form of the relations against their plain twin, its pieces and edges, and its matrix products."""
from __future__ import annotations

import pytest
import torch
from helpers import set_blocks
from method_cases import batch, make
from torch.nn import functional as F

from losses.core import NetInfo, relation_sums
from losses.core.relation_sums import KEPT, Pair, pair_sums, sums_suffice
from losses.core.relations import grouped_relation_loss, queue_relation_loss
from losses.kernels.matmul import SMALLEST, products, suits_onednn
from models.output import SegOutput

TAU = 0.1


def unit(*shape, dtype=torch.float64, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(x, dim=-1).to(dtype)


def images(count=3, rows=13, widths=(4, 6), dtype=torch.float64):
    """Rows of student (a leaf) and teacher."""
    student, teacher = (unit(count, rows, width, dtype=dtype, seed=width) for width in widths)
    return student.requires_grad_(), teacher


def queued(rows=11, keys=9, dtype=torch.float64):
    """Rows of student (a leaf) and teacher, keys, weights (some 0)."""
    student, teacher, vectors = (unit(n, 6, dtype=dtype, seed=n + i) for i, n in enumerate((rows, rows, keys)))
    weight = torch.arange(rows).remainder(4).to(dtype) / 7
    return student.requires_grad_(), teacher, vectors, weight


def check_equal(fast, plain, leaf):
    """Two losses and their gradients, in float64."""
    torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad(-3 * x, leaf)[0] for x in (fast, plain)]
    assert gradients[1].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("widths", [(4, 6), (6, 4)])
@pytest.mark.parametrize("group_size", [0, 1, 2])
@pytest.mark.parametrize("tile, kept", [(1, 0), (13 * 3, 100), (13 * 5, 10 ** 6), (13 * 13, 0), (2 ** 21, 200)])
def test_images_equal_the_plain_form(widths, group_size, tile, kept, monkeypatch):
    monkeypatch.setattr(relation_sums, "TILE_CPU", tile)
    monkeypatch.setattr(relation_sums, "KEPT", kept)
    student, teacher = images(widths=widths)
    check_equal(*(grouped_relation_loss(student, teacher, group_size, TAU, fast) for fast in (True, False)), student)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tile", [1, 9 * 3, 9 * 11, 2 ** 21])
def test_queued_keys_equal_the_plain_form(masked, tile, monkeypatch):
    monkeypatch.setattr(relation_sums, "TILE_CPU", tile)
    inputs, usable = queued(), torch.arange(9) % 3 != 1 if masked else None
    check_equal(*(queue_relation_loss(*inputs, TAU, usable, fast) for fast in (True, False)), inputs[0])


@pytest.mark.parametrize("rows", [1, 2])
def test_one_or_two_rows(rows):
    student, teacher = images(2, rows)
    losses = [grouped_relation_loss(student, teacher, 0, TAU, fast) for fast in (True, False)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in losses), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("what", ["no rows", "no usable key", "no weight", "zeros"])
def test_edges_of_queued_keys_give_zero_and_a_zero_gradient(what):
    student, teacher, keys, weight = queued(0 if what == "no rows" else 11)
    usable = torch.zeros(9, dtype=torch.bool) if what == "no usable key" else None
    if what == "no weight":
        weight.zero_()
    if what == "zeros":
        keys.zero_()
    loss = queue_relation_loss(student, teacher, keys, weight, TAU, usable)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, student)[0].equal(torch.zeros_like(student))


def rounding(got, want, leaf):
    """A float32 loss and its gradient are those of float64 up to a few roundings."""
    assert got.item() == pytest.approx(want.item(), rel=2e-6)
    gradients = [torch.autograd.grad(x, leaf)[0] for x in (got, want)]
    torch.testing.assert_close(*gradients, rtol=0, atol=2e-6 * gradients[1].abs().max().item())


@pytest.mark.parametrize("tau", [TAU, 1 / 40])
def test_float32_rounds_and_autocast_does_not_touch_it(tau, monkeypatch):
    """Large enough for the products to go through oneDNN."""
    set_blocks(monkeypatch, 60 * 400)
    student, teacher = images(2, 400, (64, 80), torch.float32)
    plain = grouped_relation_loss(student, teacher, 0, tau)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = grouped_relation_loss(student, teacher, 0, tau)
    assert cast.dtype == torch.float32 and cast.equal(plain)
    rounding(plain, grouped_relation_loss(student.double(), teacher.double(), 0, tau, fast=False), student)
    rows, taught, keys = student.flatten(0, 1), unit(800, 64, dtype=torch.float32), unit(330, 64, dtype=torch.float32)
    weight = torch.full((800,), 1 / 800)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        queue = queue_relation_loss(rows, taught, keys, weight, tau)
    doubles = [x.double() for x in (rows, taught, keys, weight)]
    rounding(queue, queue_relation_loss(*doubles, tau, fast=False), student)


def test_equal_networks_give_exactly_zero():
    student, _ = images(dtype=torch.float32)
    assert grouped_relation_loss(student, student.detach(), 0, TAU).item() == 0


def test_a_small_temperature_takes_the_plain_form(monkeypatch):
    assert sums_suffice(1 / 40) and not sums_suffice(0.0249)
    for name in ("pair_relation_loss", "key_relation_loss"):
        monkeypatch.setattr(f"losses.core.relations.{name}", None)
    student, teacher = images(dtype=torch.float32)
    inputs = queued(dtype=torch.float32)
    for form, given in ((grouped_relation_loss, (student, teacher, 2)), (queue_relation_loss, inputs)):
        assert form(*given, 1e-3).equal(form(*given, 1e-3, fast=False))
        with pytest.raises(TypeError):
            form(*given, TAU)


def test_the_fast_switch_of_a_run_reaches_every_relation(monkeypatch):
    """The fast forms are gone: with the switch off nobody misses them, with it on each term does."""
    for name in ("pair_relation_loss", "key_relation_loss"):
        monkeypatch.setattr(f"losses.core.relations.{name}", None)
    nets = NetInfo("s", {"head": 6}, 4), NetInfo("t", {"head": 9}, 4)
    heads = [SegOutput(*[None] * 6, head=torch.randn(2, width, 5, 7)) for width in (6, 9)]
    given = batch(*heads, torch.randint(0, 4, (2, 40, 56)))
    small = {"cirkd_pixel_queue": 40, "cirkd_region_queue": 6}
    for method, terms in (("cirkd", ("batch", "pixel", "region")),
                          ("cirkdv2", ("batch", "pixel", "region", "channel", "channel_memory"))):
        for term in terms:
            name = f"{method}_{term}"
            off, on = (make(method, *nets, active=[name], crop=(40, 56), fast=x, **small) for x in (False, True))
            assert off(given)[name].item() > 0
            with pytest.raises(TypeError, match="NoneType"):
                on(given)


def test_only_the_student_gets_a_gradient_once_and_only_if_wanted(monkeypatch):
    student, teacher = images()
    rows, taught, keys, weight = queued()
    for leaf, others, form in ((student, [teacher], lambda: grouped_relation_loss(student, teacher, 2, TAU)),
                               (rows, [taught, keys, weight],
                                lambda: queue_relation_loss(rows, taught, keys, weight, TAU))):
        loss = form()
        with torch.no_grad():
            assert form().equal(loss) and not form().requires_grad
        for x in others:
            x.requires_grad_()
        gradient = torch.autograd.grad(form().square(), [leaf, *others], create_graph=True, allow_unused=True)
        assert gradient[0].abs().max() > 0 and set(gradient[1:]) == {None}
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient[0].sum().backward()
    monkeypatch.setattr(relation_sums, "add_gradients", None)
    monkeypatch.setattr(torch, "mm", None)
    with torch.no_grad():
        assert grouped_relation_loss(student, teacher, 2, TAU) > 0
        assert queue_relation_loss(rows, taught, keys, weight, TAU) > 0


def test_what_is_left_for_the_backward_pass_has_the_size_of_the_student():
    student, teacher = images()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = grouped_relation_loss(student, teacher, 2, TAU)
    assert [x.shape for x in kept] == [student.shape]
    for _ in range(2):
        assert torch.autograd.grad(loss, student, retain_graph=True)[0].equal(kept[0])


@pytest.mark.parametrize("widths, longer", [((4, 6), 1), ((6, 4), 0), ((4, 4), 1)])
@pytest.mark.parametrize("room, longer_kept, other_kept", [(0, 0, 0), (60, 1, 0), (169, 4, 0), (230, 4, 1),
                                                            (338, 4, 4)])
def test_exponentials_are_kept_first_of_the_longer_vectors(widths, longer, room, longer_kept, other_kept, monkeypatch):
    """Tiles of 13 times 4, 4, 4 and 1 similarities."""
    monkeypatch.setattr(relation_sums, "TILE_CPU", 13 * 4)
    monkeypatch.setattr(relation_sums, "KEPT", room)
    student, teacher = images(2, widths=widths)
    pair = Pair(*((s, t) for s, t in zip(student.detach(), teacher, strict=True)), same=False)
    _, kept = pair_sums(pair, keep=True)
    networks = [network for network, _ in kept]
    assert (networks.count(longer), networks.count(1 - longer)) == (longer_kept, other_kept)
    assert sum(x.numel() for x in kept.values()) <= room <= KEPT
    assert pair_sums(pair, keep=False)[1] == {}


def test_products_of_onednn_round_like_the_plain_ones(monkeypatch):
    x, y = (torch.randn(n, 70, generator=torch.Generator().manual_seed(n)) for n in (401, 33))
    exact, calls, convolution = x.double() @ y.double().T, [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *a, **k: calls.append(a) or convolution(*a, **k))
    got = products(x, y)
    assert len(calls) == 1 and got.shape == (401, 33) and got.is_contiguous()
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=70 * 2 ** -23 * exact.abs().max().item())
    assert products(x, y.T.contiguous().T).sub(got).abs().max() < 1e-4 and len(calls) == 2


@pytest.mark.parametrize("change", ["float64", "small", "strided", "no columns", "no oneDNN"])
def test_other_products_are_plain(change, monkeypatch):
    x, y = torch.randn(401, 70), torch.randn(33, 70)
    if change == "float64":
        x, y = x.double(), y.double()
    elif change == "small":
        x = x[:SMALLEST // 70]
    elif change == "strided":
        x = x.T.contiguous().T
    elif change == "no columns":
        y = y[:0]
    elif change == "no oneDNN":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not suits_onednn(x, y)
    monkeypatch.setattr(F, "conv2d", None)
    assert products(x, y).equal(x @ y.T)
