"""FreeKD: recorded values, the wavelet, the loss and the prompt learning in loops, the stage, the method."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from method_cases import batch, make, preparation
from reference import fill, golden
from torch import nn
from torch.nn import functional as F

from losses.core import NetInfo, methods
from losses.core.task import SegCrossEntropyLoss
from losses.freekd import (
    FreeKD,
    freekd_loss,
    haar_bands,
    haar_join,
    haar_split,
    prompt_learning_losses,
    prompted_map,
    rest_of_network,
)
from losses.maskd import dice_overlap
from models import get_segmentation_model
from models.class_map import ClassMap, MappedTeacher
from models.output import SegOutput
from utils.errors import UserError

DTYPES = (torch.float32, torch.float64)
RENAME = {"tokens": "mask_modules.0.mask_token"}


class Tokens(nn.Module):
    def __init__(self, shape, dtype=torch.float64) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", golden.case_ids("freekd/"))
def test_golden(name, dtype):
    case = golden.load_case(name)
    inputs = golden.make_inputs(case, dtype)
    module = golden.fill_params(Tokens(case["params"]["shapes"][RENAME["tokens"]], dtype), case, RENAME)
    loss = freekd_loss(inputs["student"], inputs["teacher"], module.tokens)
    golden.check_losses(case, {"freekd": loss}, inputs, module, RENAME)


def maps(shape=(2, 4, 7, 10), tokens=3):
    return (fill.tensor("s", shape, 1, 1.0, torch.float64), fill.tensor("t", shape, 1, 1.3, torch.float64),
            fill.tensor("e", (4, tokens, shape[1]), 1, 0.5, torch.float64))


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 1), (2, 3)])
def test_the_wavelet_is_orthonormal_and_is_undone(size):
    x = maps((2, 3, *size))[0]
    low, high = haar_split(x)
    assert low.shape == (2, 3, (size[0] + 1) // 2, (size[1] + 1) // 2) and high.shape == (2, 3, 3, *low.shape[2:])
    torch.testing.assert_close(low.square().sum() + high.square().sum(), x.square().sum())
    torch.testing.assert_close(haar_join(low, high, size), x, rtol=1e-12, atol=1e-14)
    assert haar_split(torch.ones(1, 1, 4, 4))[1].abs().max() == 0


def haar_in_loops(x):
    """Low and high bands of one map of even sides, by the four products of (1, 1) / sqrt 2 and (1, -1) / sqrt 2."""
    filters = [torch.tensor(f, dtype=x.dtype) / 2 ** 0.5 for f in ((1.0, 1.0), (1.0, -1.0))]
    kernels = torch.stack([torch.outer(a, b) for a, b in ((filters[0],) * 2, (filters[1], filters[0]),
                                                          filters, (filters[1],) * 2)])
    return F.conv2d(x[:, None], kernels[:, None], stride=2)


def published_form(student, teacher, tokens):
    """Both maps under every mask, [T, C, 3, h, w] numbers each, level after level."""
    total = 0.0
    for level in range(3):
        masked = []
        ours, theirs = (torch.stack([haar_in_loops(image) for image in x]) for x in (student, teacher))
        for n in range(len(ours)):
            for token in tokens[level + 1]:
                score = sum(token[c] * theirs[n, c, 1:].sum(dim=0) for c in range(len(token)))
                mask = 1 / (1 + torch.exp(-score))
                masked.append((mask * ours[n, :, 1:] - mask * theirs[n, :, 1:]).abs())
        total = total + torch.stack(masked).mean()
        student, teacher = ours[:, :, 0], theirs[:, :, 0]
    return total


def test_fast_form_equals_the_published_form():
    student, teacher, tokens = maps((2, 4, 8, 16))
    student.requires_grad_()
    results = []
    for form in (freekd_loss, published_form):
        loss = form(student, teacher, tokens)
        results.append((loss, *torch.autograd.grad(loss, student)))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-14)


def test_half_precision_is_computed_in_float32_and_the_teacher_gets_no_gradient():
    student, teacher = (x.bfloat16().requires_grad_() for x in maps()[:2])
    tokens = maps()[2].float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = freekd_loss(student, teacher, tokens)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(freekd_loss(student.float(), teacher.float(), tokens).item(), rel=1e-6)
    got.backward()
    assert teacher.grad is None and student.grad.isfinite().all()


def test_equal_maps_and_maps_of_one_position():
    student, teacher, tokens = maps()
    assert freekd_loss(teacher, teacher, tokens).item() == 0
    even = maps((2, 4, 8, 8))[1]
    assert freekd_loss(even + 1, even, tokens).item() == pytest.approx(0, abs=1e-14)  # the low band alone differs
    assert freekd_loss(student[..., :1, :1], teacher[..., :1, :1], tokens).isfinite()


def test_shapes_must_fit():
    student, teacher, tokens = maps()
    with pytest.raises(UserError, match=r"freekd.*\(2, 4, 7, 10\).*\(2, 4, 7, 9\)"):
        freekd_loss(student, teacher[..., :9], tokens)
    for wrong in (tokens[:, :, :3], tokens[:3], tokens[0]):
        with pytest.raises(UserError, match=r"expected \[4, T, 4\]"):
            freekd_loss(student, teacher, wrong)


def test_the_prompted_map_has_the_same_low_band_and_masked_high_ones():
    feature, tokens = maps((2, 4, 8, 16))[1:]
    prompted, masks = prompted_map(feature, tokens)
    assert [tuple(m.shape) for m in masks] == [(2, 3, 4, 8), (2, 3, 2, 4), (2, 3, 1, 2)]
    (low, bands), (prompted_low, prompted_bands) = haar_bands(feature), haar_bands(prompted)
    torch.testing.assert_close(prompted_low, low, rtol=1e-12, atol=1e-14)
    for got, high, mask in zip(prompted_bands, bands, masks, strict=True):
        torch.testing.assert_close(got, high * mask.mean(dim=1)[:, None, None], rtol=1e-12, atol=1e-14)
    # the orientations of a falling ramp sum to a positive number everywhere, so these tokens open every mask
    ramp = torch.arange(70.0, 0, -1).double().view(7, 10).repeat(2, 4, 1, 1)
    opened = prompted_map(ramp, torch.full((4, 1, 4), 1e3).double())[0]
    torch.testing.assert_close(opened, ramp.contiguous(), rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    torch.manual_seed(0)
    net = get_segmentation_model(model="psp", backbone="resnet18_w0.125", num_class=4)
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize("model", ["psp", "deeplabv3", "psp_mobile", "deeplab_mobile"])
@pytest.mark.parametrize("tap", ["c4", "head"])
def test_the_rest_of_every_network_is_found(model, tap):
    backbone = "mobilenetv2_w0.25" if "mobile" in model else "resnet18_w0.125"
    net = get_segmentation_model(model=model, backbone=backbone, num_class=4).eval()
    with torch.no_grad():
        output = net(fill.tensor("x", (1, 3, 40, 56), 1))
        torch.testing.assert_close(rest_of_network(net, tap, getattr(output, tap)), output.logits)


@pytest.mark.parametrize("tap", ["c4", "head"])
def test_the_rest_of_a_teacher_of_other_classes_goes_through_its_map(teacher, tap):
    mapped = MappedTeacher(teacher, ClassMap((0, 2), ((3,), (0, 1)), 3, 4))
    output = mapped(fill.tensor("x", (1, 3, 40, 56), 1))
    assert output.logits.shape[1] == 2
    torch.testing.assert_close(rest_of_network(mapped, tap, getattr(output, tap)), output.logits)


def test_a_teacher_without_a_head_of_its_own_is_refused(teacher, tmp_path):
    other = nn.Module()
    other.name = "smp:Unet"
    method = make("freekd", *[NetInfo("n", {"c4": 8}, 4)] * 2, active=["freekd"])
    with pytest.raises(UserError, match="'freekd' learns its masks through the teacher's own head, which smp:Unet"):
        method.prepare(preparation(other, tmp_path, None))


def test_prompt_learning_step_by_step(teacher):
    feature = fill.tensor("f", (2, teacher.channels["c4"], 6, 8), 1).relu()
    tokens = fill.tensor("e", (4, 3, feature.shape[1]), 1, 0.3).requires_grad_()
    target = fill.labels("y", (2, 48, 64), 4)
    losses = prompt_learning_losses(teacher, "c4", feature, tokens, target)
    prompted, masks = prompted_map(feature, tokens)
    want = SegCrossEntropyLoss()(teacher.head(prompted)[0], target)
    assert losses["ce"].item() == pytest.approx(want.item(), rel=1e-6)
    assert losses["dice"].item() == pytest.approx(sum(dice_overlap(m.flatten(2)).item() for m in masks) / 3, rel=1e-6)
    gradient = torch.autograd.grad(sum(losses.values()), tokens)[0]
    assert gradient[0].abs().max() == 0 and all(level.abs().max() > 0 for level in gradient[1:])


NET = NetInfo("net", {"logits": 4, "c4": 5, "head": 6}, 4)


def build(student: NetInfo = NET, teacher: NetInfo = NET, **options) -> FreeKD:
    return make("freekd", student, teacher, **options)


def output(x: torch.Tensor, head: torch.Tensor) -> SegOutput:
    return SegOutput(logits=x, aux=None, c1=x, c2=x, c3=x, c4=x, head=head)


@pytest.mark.parametrize("tap", ["c4", "head"])
def test_method(tap):
    assert methods()["freekd"] is FreeKD and all(t.weight == 0 for t in FreeKD.terms)
    small = NetInfo("small", {"logits": 4, "c4": 3, "head": 2}, 4)
    s, t = (output(*(torch.randn(2, i.channels[k], 6, 9) for k in ("c4", "head"))) for i in (small, NET))
    method = build(small, freekd_tap=tap, freekd_tokens=3)
    assert method.tokens.shape == (4, 3, NET.channels[tap]) and method.tap == tap
    terms = method(batch(s, t))
    aligned = F.conv2d(getattr(s, tap), method.align.weight, method.align.bias)
    expected = freekd_loss(aligned, getattr(t, tap), method.tokens).item()
    assert terms["freekd"].item() == pytest.approx(expected, rel=1e-6)
    assert terms["freekd_mse"].item() == pytest.approx((aligned - getattr(t, tap)).square().mean().item(), rel=1e-6)
    for name in terms:
        alone = build(small, active=(name,), freekd_tap=tap)
        assert set(alone(batch(s, t))) == {name} and (alone.settings is None) == (name == "freekd_mse")


def test_networks_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="needs c4 of the teacher.*odd offers only head"):
        build(teacher=NetInfo("odd", {"head": 6}, 4))


class Batches:
    """Batches that are a function of the step; raises at a chosen one."""

    def __init__(self, dies_at: int | None = None, same: bool = False) -> None:
        self.dies_at, self.same, self.made = dies_at, same, 0

    def __call__(self, steps: int, batch_size: int, start: int, role: str = "teacher"):
        for step in range(start, steps):
            if step == self.dies_at:
                raise KeyboardInterrupt
            self.made += 1
            number = 0 if self.same else step
            yield (fill.tensor(f"images{number}", (batch_size, 3, 40, 56), 1),
                   fill.labels(f"labels{number}", (batch_size, 40, 56), 4, ignore_frac=0.2))


def learned(teacher: nn.Module, directory: Path, batches: Batches | None = None, **options) -> torch.Tensor:
    info = NetInfo("net", teacher.channels, 4)
    method = build(info, info, **{"freekd_steps": 4, "freekd_batch_size": 2, "save_per_iters": 2, "group_size": 0,
                                  **options})
    method.prepare(preparation(teacher, directory, batches or Batches()))
    return method.tokens


def test_the_stage_learns_on_the_frozen_teacher(teacher, tmp_path):
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    batches = Batches(same=True)
    images, target = next(batches(1, 2, 0))
    tokens = learned(teacher, tmp_path, batches, freekd_steps=40, freekd_lr=5.0)
    info = NetInfo("net", teacher.channels, 4)
    with torch.no_grad():
        first, last = (prompt_learning_losses(teacher, "c4", teacher(images).c4, e, target)
                       for e in (build(info, info).tokens, tokens))
    assert first["dice"] > 0.95 and sum(last.values()) < 0.98 * sum(first.values())
    assert all(v.equal(before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_a_killed_stage_goes_on_and_the_cache_is_used(teacher, tmp_path):
    whole = learned(teacher, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        learned(teacher, tmp_path / "cut", Batches(dies_at=3))
    rest = Batches()
    assert learned(teacher, tmp_path / "cut", rest).equal(whole) and rest.made == 2
    again = Batches()
    assert learned(teacher, tmp_path / "cut", again).equal(whole) and again.made == 0
    (cached,) = (tmp_path / "cut").iterdir()
    assert cached.name.startswith("freekd_masks_")
    info = NetInfo("net", teacher.channels, 4)
    given = build(info, info, freekd_masks=str(cached))
    assert given.tokens.equal(whole) and given.settings is None
    for options in ({"freekd_tap": "head"}, {"freekd_lr": 0.5}, {"freekd_tokens": 2}, {"seed": 1}):
        batches = Batches()
        learned(teacher, tmp_path / "cut", batches, **options)
        assert batches.made == 4


def test_a_resumed_run_has_the_tokens_of_its_state(tmp_path):
    """Their number too, without the file; but not those of a run that never had any."""
    torch.save({"tokens": torch.ones(4, 3, 5)}, tmp_path / "given.pth")
    first = build(freekd_masks=str(tmp_path / "given.pth"))
    for options in ({"freekd_masks": str(tmp_path / "gone.pth")}, {"freekd_tokens": 7}, {"active": {"freekd_mse"}}):
        method = build(resumed=True, **options)
        held = method.tokens
        method.load_state_dict(first.state_dict())
        assert method.tokens is held and held.equal(first.tokens) and held.shape == (4, 3, 5)
    with pytest.raises(RuntimeError, match="size mismatch for tokens"):
        build(resumed=True).load_state_dict(build(active={"freekd_mse"}).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for tokens"):
        build(resumed=True).load_state_dict({**first.state_dict(), "tokens": torch.ones(4, 3, 6)})


def test_masks_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "given.pth"
    for content, words in (({"mask_token": torch.ones(4, 6, 3)}, "tokens 4x6x3, expected 4xTx5"),
                           ({"mask_token": torch.ones(3, 6, 5)}, "tokens 3x6x5, expected 4xTx5"),
                           ({"mask_token": torch.ones(6, 5)}, "expected one tensor 4xTx5")):
        torch.save(content, path)
        with pytest.raises(UserError, match=f"given.pth.*{words}") as refused:
            build(freekd_masks=str(path))
        assert refused.value.settings == ("freekd_masks",)
    torch.save({"mask_modules.0.mask_token": torch.ones(4, 6, 5)}, path)
    assert build(freekd_masks=str(path)).tokens.eq(1).all()
