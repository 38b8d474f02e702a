"""Af-DCD: properties that no recorded value covers."""
from __future__ import annotations

import inspect
import math
from dataclasses import asdict

import pytest
import torch
from method_cases import batch, make
from reference import fill

from losses.afdcd import (
    AfDCD,
    AfDCDOptions,
    OmniContrastiveFeatureLoss,
    center_keep_mask,
    masked_feature_loss,
    omni_contrastive_loss,
    positive_rank,
    random_keep_mask,
)
from losses.core import NetInfo, methods
from models.output import SegOutput
from utils.errors import UserError

BOTH = ("fd", "ctr")
STUDENT, TEACHER = NetInfo("small", {"logits": 5, "c4": 6}, 5), NetInfo("large", {"logits": 5, "c4": 16}, 5)


def maps(student=(2, 6, 16, 24), teacher=(2, 8, 16, 24), dtype=torch.float64):
    return (fill.tensor("student", student, 1, dtype=dtype).requires_grad_(),
            fill.tensor("teacher", teacher, 1, dtype=dtype))


def criterion(student=6, teacher=8, dtype=torch.float64, **options):
    options = {"M_ocd": 4, "pool_size": 2, "patch_size": (2, 4), **options}
    return fill.fill_module(OmniContrastiveFeatureLoss(student, teacher, **options).to(dtype), 3)


def loops(y: torch.Tensor, t: torch.Tensor, tau: float, groups: int, ph: int, pw: int) -> float:
    """The contrastive loss written out: one position, one group, one negative at a time."""
    batch, channels, height, width = y.shape
    depth, total = channels // groups, 0.0

    def part(x, b, i, j, m):
        return x[b, m * depth:(m + 1) * depth, i, j]

    anchors = [(b, i, j, m) for b in range(batch) for i in range(height) for j in range(width) for m in range(groups)]
    for b, i, j, m in anchors:
        top, left = i - i % ph, j - j % pw
        anchor = part(y, b, i, j, m)
        logits = [-(anchor - part(t, b, i, j, m)).abs().sum().item() / tau]
        logits += [-(anchor - part(t, b, ii, jj, mm)).abs().sum().item() / tau
                   for ii in range(top, top + ph) for jj in range(left, left + pw) for mm in range(groups) if mm != m]
        peak = max(logits)
        total += peak + math.log(sum(math.exp(x - peak) for x in logits)) - logits[0]
    return total / (batch * height * width)


@pytest.mark.parametrize(("groups", "patch", "tau"), [(2, (2, 2), 1.0), (4, (2, 3), 0.3), (3, (1, 2), 5.0)])
def test_formula_in_loops(groups, patch, tau):
    shape = (2, 12, 4, 6)
    y, t = fill.tensor("y", shape, 5, dtype=torch.float64), fill.tensor("t", shape, 5, dtype=torch.float64)
    got = omni_contrastive_loss(y, t, tau, groups, patch)
    assert got.item() == pytest.approx(loops(y, t, tau, groups, *patch), rel=1e-12)


def test_feature_loss_is_a_sum_over_the_map_and_a_mean_over_the_batch():
    y, t = maps((2, 3, 2, 2), (2, 3, 2, 2))
    assert masked_feature_loss(y, t).item() == pytest.approx(sum((a - b) ** 2 for a, b in zip(
        y.flatten().tolist(), t.flatten().tolist(), strict=True)) / 2)


@pytest.mark.parametrize("chunk", [5, 1000])
def test_chunks_change_nothing(chunk):
    student, teacher = maps()
    results = []
    for size in (0, chunk):
        module = criterion(contrast_chunk=size, rand_mask=False)
        _, ctr = module(student, teacher)
        results.append((ctr, *torch.autograd.grad(ctr, [student, *module.parameters()]), module.positive_rank()))
    for plain, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, plain, rtol=1e-10, atol=1e-12)


def test_equal_channels_need_no_alignment():
    student, teacher = maps((2, 8, 16, 24))
    module = criterion(8, 8, rand_mask=False)
    assert not any(name.startswith("align") for name, _ in module.named_parameters())
    fd, ctr = module(student, teacher)
    projected = module.projetor(student * module.keep_mask(student))
    pooled = (module.contrast_map(x) for x in (projected, teacher))
    want = masked_feature_loss(projected, teacher), omni_contrastive_loss(*pooled, 0.07, 4, (2, 4))
    assert fd.item() == pytest.approx(want[0].item(), rel=1e-12) and ctr.item() == want[1].item()
    (fd + ctr).backward()
    assert student.grad.isfinite().all() and student.grad.abs().sum() > 0


def test_maps_that_patches_do_not_divide_are_cut():
    student, teacher = maps((2, 8, 7, 11), (2, 8, 7, 11))
    whole = omni_contrastive_loss(student, teacher, 0.5, 4, (2, 4))
    cut = omni_contrastive_loss(student[..., :6, :8], teacher[..., :6, :8], 0.5, 4, (2, 4))
    assert whole.item() == cut.item()
    odd_student, odd_teacher = maps((1, 6, 15, 23), (1, 8, 15, 23))
    module = criterion(rand_mask=False)
    fd, ctr = module(odd_student, odd_teacher)
    projected = module.projetor(module.align(odd_student) * module.keep_mask(odd_student))
    assert fd.item() == pytest.approx(masked_feature_loss(projected, odd_teacher).item(), rel=1e-12)
    cut = (module.contrast_map(x)[..., :6, :8] for x in (projected, odd_teacher))
    assert ctr.item() == omni_contrastive_loss(*cut, 0.07, 4, (2, 4)).item() > 0


def test_camvid_ignores_the_pool_size():
    student, teacher = maps()
    camvid = criterion(dataset="camvid", pool_size=2, rand_mask=False)(student, teacher)[1]
    unpooled = criterion(pool_size=0, rand_mask=False)(student, teacher)[1]
    assert camvid.item() == unpooled.item()


def test_mismatched_maps_are_named():
    student, teacher = maps((2, 6, 16, 16))
    with pytest.raises(UserError, match=r"\(2, 6, 16, 16\).*\(2, 8, 16, 24\)"):
        criterion()(student, teacher)
    with pytest.raises(UserError, match="6 and 8 channels"):
        criterion()(teacher, teacher)
    with pytest.raises(UserError, match="3x24 map.*by 2 and patches of 2x4 need 4x8 or more") as refused:
        criterion()(*maps((2, 6, 3, 24), (2, 8, 3, 24)))
    assert refused.value.settings == ("crop_size", "pool_size", "patch_size")


@pytest.mark.parametrize(("options", "message"), [
    ({"M_ocd": 3}, "3 channel groups.*8 channels"), ({"M_ocd": 1}, "at least 2"), ({"tau_ocd": 0.0}, "above 0"),
    ({"mask_ratio": 1.5}, "mask ratio 1.5.*at most 1"), ({"patch_size": (0, 4)}, "at least 1"),
    ({"pool_size": -1}, "pool size -1.*at least 0")])
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message) as refused:
        criterion(**options)
    assert refused.value.settings == tuple(name.lower() for name in options)


def test_random_mask_keeps_the_rest_of_the_ratio_and_follows_the_generator():
    module = criterion(mask_ratio=0.75)
    feature = torch.zeros(4, 6, 64, 64)
    masks = [module.keep_mask(feature, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert masks[0].shape == (4, 1, 64, 64) and masks[0].equal(masks[1]) and not masks[0].equal(masks[2])
    assert masks[0].float().mean().item() == pytest.approx(0.25, abs=0.02)
    student, teacher = maps()
    once, again = (module(student, teacher, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert once[0].item() == again[0].item() and once[1].item() == again[1].item()
    draw = torch.tensor([0.0, 0.25, 0.2501, 0.9])
    assert random_keep_mask(draw, 0.75).tolist() == [True, True, False, False]


def test_center_mask_drops_the_middle_third():
    keep = center_keep_mask(7, 9)[0, 0]
    assert [(i, j) for i in range(7) for j in range(9) if not keep[i, j]] == [
        (i, j) for i in (2, 3) for j in (3, 4, 5)]


def test_masked_positions_do_not_reach_the_loss():
    module = criterion()
    student, teacher = maps()
    keep = center_keep_mask(16, 24)
    module(student, teacher, keep=keep)[0].backward()
    touched = student.grad.abs().sum(dim=(0, 1)) > 0
    assert touched.equal(keep[0, 0])


def test_no_gradient_reaches_the_teacher():
    student, teacher = maps()
    teacher.requires_grad_()
    fd, ctr = criterion()(student, teacher)
    (fd + ctr).backward()
    assert teacher.grad is None and student.grad is not None


def test_autocast_keeps_the_losses_in_float32():
    student, teacher = (x.detach().float() for x in maps())
    module = criterion(dtype=torch.float32, rand_mask=False, tau_ocd=2.0)
    exact = module(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = module(student, teacher)
    for a, b in zip(half, exact, strict=True):
        # aligner and projector are in half precision
        assert a.dtype == torch.float32 and a.item() == pytest.approx(b.item(), rel=1e-3)
    # in half precision these distances would round to steps of 8 and more
    far = fill.tensor("far", (1, 64, 4, 4), 1, 100.0).bfloat16()
    near = far + 3
    loss, want = (omni_contrastive_loss(*x, 500.0, 4, (4, 4)) for x in ((far, near), (far.float(), near.float())))
    assert loss.dtype == torch.float32 and loss.item() == want.item() > 0


def test_positive_rank():
    t = fill.tensor("t", (1, 8, 4, 4), 2)
    assert positive_rank(t, t, 4, (2, 2)).item() == 0
    assert 0.4 < positive_rank(fill.tensor("y", (1, 8, 4, 4), 2), t, 4, (2, 2)).item() < 0.6
    # two positions, two groups of one channel: the student of group 0 sits on the teacher of group 1 and vice versa
    teacher = torch.tensor([[0.0, 0.0], [5.0, 5.0]]).reshape(1, 2, 1, 2)
    assert positive_rank(teacher.flip(1), teacher, 2, (1, 2)).item() == 1


def build(*flags: str, student=STUDENT, teacher=TEACHER, crop=(128, 128), **changes) -> AfDCD:
    return make("afdcd", student, teacher, *flags, crop=crop, **changes)


def output(c4: torch.Tensor) -> SegOutput:
    return SegOutput(logits=c4, aux=None, c1=c4, c2=c4, c3=c4, c4=c4, head=c4)


def test_the_options_have_the_defaults_of_the_reference_class():
    signature = inspect.signature(OmniContrastiveFeatureLoss).parameters
    stated = {name.lower(): p.default for name, p in signature.items() if p.default is not p.empty}
    options = asdict(AfDCDOptions())
    assert options.pop("clip_distiller") == 15.0
    assert options == {name: stated[name] for name in options}
    assert options == {"rand_mask": True, "mask_ratio": 0.75, "enhance_projector": False, "tau_ocd": 0.07, "m_ocd": 16,
                       "pool_size": 4, "patch_size": (4, 4), "contrast_chunk": 0}


def test_method_defaults_and_options():
    assert methods()["afdcd"] is AfDCD and AfDCD.method == "afdcd"
    method = build()
    c = method.criterion
    assert (c.rand_mask, c.mask_ratio, c.tau, c.groups, c.pool, c.patch) == (True, 0.75, 0.07, 16, 4, (4, 4))
    assert method.clip_norm == 15.0 and c.fast and not build(fast=False).criterion.fast
    changed = build("--no-rand-mask", "--enhance_projector", "True", "--m-ocd", "8", "--patch-size", "2", "4",
                    "--pool-size", "0", "--tau-ocd", "0.1", "--contrast-chunk", "3", "--clip-distiller", "0")
    c = changed.criterion
    assert (c.rand_mask, c.tau, c.groups, c.pool, c.patch, c.chunk) == (False, 0.1, 8, 0, (2, 4), 3)
    assert hasattr(c.projetor, "adpator_1") and changed.clip_norm is None
    assert build("--dataset", "camvid", "--pool-size", "2").criterion.pool == 0


def test_method_forward_state_and_diagnostics():
    method = build()
    assert method.diagnostics() == {}
    student, teacher = torch.rand(2, 6, 16, 16, requires_grad=True), torch.rand(2, 16, 16, 16)
    target = torch.zeros(2, 128, 128, dtype=torch.long)
    terms = method(batch(output(student), output(teacher), target), torch.Generator().manual_seed(1))
    assert set(terms) == {t.name for t in AfDCD.terms} and all(t.ndim == 0 for t in terms.values())
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in method.parameters())
    rank = method.diagnostics()["positive_rank"]
    assert 0 <= rank.item() <= 1 and not rank.requires_grad
    assert list(method.state_dict()) == [f"criterion.{n}" for n, _ in method.criterion.named_parameters()]


@pytest.mark.parametrize("term", sorted(BOTH))
def test_a_term_without_weight_is_not_computed(term, monkeypatch):
    """And the other one is what it was, with the same state."""
    both, one = (build(active=a) for a in (BOTH, [term]))
    one.load_state_dict(both.state_dict())
    student, teacher = torch.rand(2, 6, 16, 16), torch.rand(2, 16, 16, 16)
    step = batch(output(student), output(teacher))
    expected = both(step, torch.Generator().manual_seed(1))[term].item()
    for skipped in {"fd": ["omni_contrastive_loss"], "ctr": ["masked_feature_loss", "error_and_pool"]}[term]:
        monkeypatch.setattr(f"losses.afdcd.{skipped}", None)
    terms = one(step, torch.Generator().manual_seed(1))
    assert list(terms) == [term] and terms[term].item() == expected
    assert list(one.diagnostics()) == (["positive_rank"] if term == "ctr" else [])
    terms[term].backward()
    assert all(p.grad is not None for p in one.parameters())


def test_without_the_contrast_its_limits_do_not_hold():
    method = build(active=["fd"], crop=(64, 64), teacher=NetInfo("large", {"c4": 20}, 5))
    terms = method(batch(output(torch.rand(1, 6, 8, 8)), output(torch.rand(1, 20, 8, 8))))
    assert list(terms) == ["fd"] and terms["fd"] > 0


def test_method_refuses_what_cannot_work():
    with pytest.raises(UserError, match="needs c4 of the student, but small offers only logits"):
        build(student=NetInfo("small", {"logits": 5}, 5))
    with pytest.raises(UserError, match="method 'afdcd' needs a teacher: it reads c4 of it, but there is none"):
        build(teacher=None)
    with pytest.raises(UserError, match="crops of 96x512 give 12x64: use crops of 128x128 or more") as refused:
        build(crop=(96, 512))
    assert refused.value.settings == ("crop_size", "pool_size", "patch_size")
    build(crop=(96, 512), pool_size=3)
    with pytest.raises(UserError, match="16 channel groups.*20 channels") as refused:
        build(teacher=NetInfo("large", {"c4": 20}, 5))
    assert refused.value.settings == ("m_ocd",)
