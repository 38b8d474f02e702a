"""The faster projector against its plain twin: results and gradients, precision, operations, memory."""
from __future__ import annotations

import pytest
import torch
from reference import fill
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from losses.afdcd import EnhancedProjector, OmniContrastiveFeatureLoss
from losses.core import feature_losses
from losses.core.feature_losses import PlainProjector, aligner, masked_feature_loss, random_keep_mask, restore
from losses.kernels.masked_error import error_and_pool
from losses.kernels.projector import fold_pays
from losses.mgd import MaskedGeneration
from utils.memory import MemoryTracker

PROJECTORS = {"plain": PlainProjector, "enhanced": EnhancedProjector}


def maps(student, teacher, dtype=torch.float64):
    return (fill.tensor("student", student, 1, dtype=dtype).requires_grad_(),
            fill.tensor("teacher", teacher, 1, dtype=dtype))


def keep_mask(kind: str, batch: int, height: int, width: int) -> torch.Tensor:
    """Random positions per image, the same for all images, or positions that count to a degree."""
    if kind == "shared":
        return random_keep_mask(fill.uniform("u", (1, 1, height, width)), 0.5)
    draw = fill.uniform("u", (batch, 1, height, width), dtype=torch.float64)
    return random_keep_mask(draw, 0.75) if kind == "random" else draw


def assert_equal_results(fast: list, plain: list, tolerance: float = 1e-9) -> None:
    assert len(fast) == len(plain)
    for got, want in zip(fast, plain, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.detach().abs().max()))


def criterion_results(widths, shape, keep, terms, **options) -> list[list]:
    """[fast, plain] of both losses that ``terms`` name and of the gradients of student and parameters."""
    student, teacher = maps((shape[0], widths[0], *shape[1:]), (shape[0], widths[1], *shape[1:]))
    results = []
    for fast in (True, False):
        criterion = OmniContrastiveFeatureLoss(*widths, M_ocd=4, pool_size=2, patch_size=(2, 3), tau_ocd=2.0, fast=fast,
                                               feature="fd" in terms, contrast="ctr" in terms, **options).double()
        fill.fill_module(criterion, 3)
        losses = [x for x in criterion(student, teacher, keep=keep) if x is not None]
        total = sum(weight * x for weight, x in zip((0.7, 30.0), losses, strict=False))
        results.append([*losses, *torch.autograd.grad(total, [student, *criterion.parameters()])])
    return results


@pytest.mark.parametrize("terms", [("fd", "ctr"), ("fd",), ("ctr",)], ids="+".join)
@pytest.mark.parametrize("enhanced", [False, True], ids=["plain", "enhanced"])
@pytest.mark.parametrize(("shape", "mask", "dataset"), [
    ((2, 7, 9), "random", "citys"), ((1, 12, 8), "graded", "citys"), ((2, 5, 7), "shared", "camvid")])
def test_criterion_equals_its_plain_twin(shape, mask, dataset, enhanced, terms):
    batch, height, width = shape
    assert fold_pays(3, 32, batch * height * width)
    results = criterion_results((3, 32), shape, keep_mask(mask, *shape), terms, enhance_projector=enhanced,
                                dataset=dataset)
    assert len(results[0]) == len(terms) + 1 + (10 if enhanced else 6)
    assert_equal_results(*results)


@pytest.mark.parametrize("enhanced", [False, True], ids=["plain", "enhanced"])
@pytest.mark.parametrize("widths", [(12, 12), (16, 12)], ids=["no alignment", "narrow teacher"])
def test_criterion_without_fold_equals_its_plain_twin(widths, enhanced):
    shape = (2, 7, 9)
    assert_equal_results(*criterion_results(widths, shape, keep_mask("random", *shape), ("fd", "ctr"),
                                            enhance_projector=enhanced))


def test_mgd_equals_its_plain_twin():
    student, teacher = maps((2, 3, 7, 9), (2, 32, 7, 9))
    keep, results = keep_mask("random", 2, 7, 9), []
    for fast in (True, False):
        criterion = fill.fill_module(MaskedGeneration(3, 32, 0.75, fast).double(), 3)
        loss = criterion(student, teacher, keep=keep)
        results.append([loss, *torch.autograd.grad(loss, [student, *criterion.parameters()])])
    assert_equal_results(*results)


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("of_map", [torch.contiguous_format, torch.channels_last])
def test_the_restored_map_has_the_memory_format_of_the_weights(projector, of_map):
    student, _ = maps((2, 3, 7, 9), (2, 32, 7, 9))
    keep, results = keep_mask("random", 2, 7, 9), []
    for of_weights in (torch.contiguous_format, torch.channels_last):
        modules = fill.fill_module(nn.ModuleList([aligner(3, 32), PROJECTORS[projector](32)]).double(), 3)
        modules.to(memory_format=of_weights)
        out = restore(student.contiguous(memory_format=of_map), keep, *modules, True)
        assert out.is_contiguous(memory_format=of_weights)
        results.append([out, *torch.autograd.grad(out.square().sum(), [student, *modules.parameters()])])
    assert_equal_results(*results)


@pytest.mark.parametrize("projector", PROJECTORS)
def test_half_precision_is_as_exact_as_that_of_the_plain_twin(projector):
    """Distance of results under autocast from those in float32, of the output and of every gradient."""
    student, _ = maps((2, 24, 12, 12), (2, 64, 12, 12), torch.float32)
    keep = keep_mask("random", 2, 12, 12)
    modules = fill.fill_module(nn.ModuleList([aligner(24, 64), PROJECTORS[projector](64)]), 3)
    assert fold_pays(24, 64, 2 * 12 * 12)

    def results(fast: bool, half: bool) -> list:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = restore(student, keep, *modules, fast)
        assert out.dtype == (torch.bfloat16 if half else torch.float32)
        gradients = torch.autograd.grad(out.float().square().sum(), [student, *modules.parameters()])
        assert all(g.dtype == torch.float32 for g in gradients)
        return [out.float(), *gradients]

    exact, fast, plain = results(False, False), results(True, True), results(False, True)
    for want, got, twin in zip(exact, fast, plain, strict=True):
        error, allowed = ((x - want).norm() / want.norm() for x in (got, twin))
        assert 0 < error < 1.5 * allowed < 0.05


def test_weights_without_gradient_and_a_student_without_one():
    student, _ = maps((1, 3, 7, 9), (1, 32, 7, 9))
    keep = keep_mask("random", 1, 7, 9)
    modules = fill.fill_module(nn.ModuleList([aligner(3, 32), EnhancedProjector(32)]).double(), 3)
    wanted = [modules[0].bias, modules[1].first.weight, modules[1].adpator_2.weight]
    expected = torch.autograd.grad(restore(student, keep, *modules, True).square().sum(), wanted)
    found = torch.autograd.grad(restore(student.detach(), keep, *modules, True).square().sum(), wanted)
    assert_equal_results(found, expected)
    of_student, = torch.autograd.grad(restore(student, keep, *modules, True).square().sum(), student)
    frozen, = torch.autograd.grad(restore(student, keep, *modules.requires_grad_(False), True).square().sum(), student)
    assert_equal_results([frozen], [of_student])


@pytest.mark.parametrize("uses", [("error",), ("pooled",), ("error", "pooled")], ids="+".join)
@pytest.mark.parametrize("pool", [2, 3])
def test_error_and_pool_equal_their_plain_twins(pool, uses):
    x, teacher = maps((2, 40, 7, 8), (2, 40, 7, 8))
    plain = {"error": masked_feature_loss(x, teacher), "pooled": F.max_pool2d(x, pool)}
    fast = dict(zip(plain, error_and_pool(x, teacher, pool), strict=True))
    weights = {"error": 0.3, "pooled": fill.tensor("w", plain["pooled"].shape, 2, dtype=torch.float64)}
    results = []
    for values in (fast, plain):
        total = sum((values[use] * weights[use]).sum() for use in uses)
        results.append([*values.values(), *torch.autograd.grad(total, x, retain_graph=True),
                        *torch.autograd.grad(2 * total, x)])  # a second time, from what the first has left
    assert_equal_results(*results)


def test_error_is_made_in_full_precision():
    x, teacher = (fill.tensor(name, (2, 5, 6, 6), 1, 50.0).bfloat16() for name in ("x", "t"))
    x.requires_grad_()
    error, none = error_and_pool(x, teacher)
    want = masked_feature_loss(x, teacher)
    assert none is None and error.dtype == torch.float32
    torch.testing.assert_close(error, want)
    assert torch.autograd.grad(error, x)[0].equal(torch.autograd.grad(want, x)[0])


def _flops(fast: bool, widths, shape, projector: str, monkeypatch, backward: bool = False) -> int:
    """Of the restored map; fast: folded whatever the rule says."""
    monkeypatch.setattr(feature_losses, "fold_pays", lambda *_: True)
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        student = torch.randn(shape[0], widths[0], *shape[1:], requires_grad=True)
        out = restore(student, torch.ones(1, 1, *shape[1:]), aligner(*widths), PROJECTORS[projector](widths[1]), fast)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("widths", "shape", "pays"), [
    ((512, 2048), (1, 64, 128), True), ((512, 2048), (2, 32, 32), True), ((512, 2048), (1, 24, 24), False),
    ((320, 2048), (1, 16, 24), True), ((320, 2048), (1, 16, 16), False),
    ((256, 512), (8, 64, 128), True), ((504, 512), (8, 64, 128), True), ((2048, 512), (8, 64, 128), False)])
def test_the_fold_is_used_where_it_saves_operations(widths, shape, pays, monkeypatch):
    assert fold_pays(*widths, shape[0] * shape[1] * shape[2]) is pays
    folded, plain = (_flops(fast, widths, shape, "plain", monkeypatch) for fast in (True, False))
    assert (folded < plain) is pays


@pytest.mark.parametrize(("projector", "plain", "folded"), [("plain", 1881, 1222), ("enhanced", 3737, 3078)])
def test_operations_at_the_published_size(projector, plain, folded, monkeypatch):
    """Billions of multiply-accumulates of a forward and backward pass for one image of 512x1024."""
    counts = [_flops(fast, (512, 2048), (1, 64, 128), projector, monkeypatch, True) / 2e9 for fast in (False, True)]
    assert counts == [pytest.approx(plain, abs=1), pytest.approx(folded, abs=1)]


def _peak(fast: bool, batch: int, enhanced: bool, half: bool = False) -> int:
    with FakeTensorMode(allow_non_fake_inputs=True):
        criterion = OmniContrastiveFeatureLoss(512, 2048, enhance_projector=enhanced, fast=fast)
        student, teacher = torch.randn(batch, 512, 64, 128, requires_grad=True), torch.randn(batch, 2048, 64, 128)
        teacher = teacher.bfloat16() if half else teacher
        known = [student, teacher, *criterion.parameters(), *criterion.buffers()]
        with MemoryTracker("cpu", workspaces=False, known=known) as memory:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = sum(criterion(student, teacher))
            loss.backward()
        return memory.peak


@pytest.mark.parametrize(("batch", "enhanced", "half", "ratio"), [
    (2, False, False, 0.65), (8, False, False, 0.5), (8, True, False, 0.63),
    (2, False, True, 0.51), (4, False, True, 0.37), (8, True, True, 0.4)])
def test_memory_at_the_published_size(batch, enhanced, half, ratio):
    """Peak beyond parameters and the two maps, gradients of the parameters included, for images of 512x1024. half: of
    the faster form under bf16; the plain one is in float32."""
    fast, plain = _peak(True, batch, enhanced, half), _peak(False, batch, enhanced)
    assert plain > 7 * batch * 2048 * 64 * 128 * 4
    assert fast <= ratio * plain
