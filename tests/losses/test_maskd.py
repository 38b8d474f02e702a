"""MasKD: recorded values, the loss and the mask learning in loops, edge cases, the method."""
from __future__ import annotations

import pytest
import torch
from method_cases import batch, make
from reference import fill, golden
from torch import nn

from losses.core import NetInfo, methods
from losses.core.task import SegCrossEntropyLoss
from losses.maskd import MasKD, dice_overlap, mask_learning_losses, maskd_loss
from models.output import SegOutput
from utils.errors import UserError

DTYPES = (torch.float32, torch.float64)


class Tokens(nn.Module):
    def __init__(self, case, dtype) -> None:
        super().__init__()
        (shape,) = case["params"]["shapes"].values()
        self.tokens = nn.Parameter(torch.zeros(shape, dtype=dtype))


def load(name: str, dtype: torch.dtype):
    case = golden.load_case(name)
    (recorded,) = case["params"]["shapes"]
    rename = {"tokens": recorded}
    return case, golden.make_inputs(case, dtype), golden.fill_params(Tokens(case, dtype), case, rename), rename


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", golden.case_ids("maskd/kd_"))
def test_golden_distillation(name, dtype):
    case, inputs, module, rename = load(name, dtype)
    loss = maskd_loss(inputs["student"], inputs["teacher"], module.tokens)
    golden.check_losses(case, {"maskd": loss}, inputs, module, rename)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", golden.case_ids("maskd/mask_stage_"))
def test_golden_mask_learning(name, dtype):
    case, inputs, module, rename = load(name, dtype)
    losses = mask_learning_losses(inputs["teacher"], module.tokens, golden.make_labels(case))
    golden.check_losses(case, losses, inputs, module, rename)


def test_every_recorded_case_is_checked():
    assert set(golden.case_ids("maskd/")) == {*golden.case_ids("maskd/kd_"), *golden.case_ids("maskd/mask_stage_")}


def maps(shape=(2, 4, 3, 5), tokens=3):
    return (fill.tensor("s", shape, 1, 2.0, torch.float64), fill.tensor("t", shape, 1, 2.0, torch.float64),
            fill.tensor("e", (tokens, shape[1]), 1, 0.5, torch.float64))


def five_dimensional(student, teacher, tokens):
    """The loss as published: both maps under every mask, [B, T, K, h, w] numbers each."""
    masks = torch.sigmoid(torch.einsum("tk,bkhw->bthw", tokens, teacher))[:, :, None]
    squared = (student[:, None] * masks - teacher[:, None] * masks).square()
    return (squared.sum((3, 4)) / (masks.sum((3, 4)) + 1e-5)).mean() / 2


def test_fast_form_equals_the_published_form():
    student, teacher, tokens = maps()
    student.requires_grad_()
    results = []
    for form in (maskd_loss, five_dimensional):
        loss = form(student, teacher, tokens)
        results.append((loss, *torch.autograd.grad(loss, student)))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-14)


def test_mask_learning_in_loops():
    _, teacher, tokens = maps()
    target = fill.labels("y", (2, 24, 40), 4)
    masks, masked, dice = torch.zeros(2, 3, 15).double(), torch.zeros_like(teacher), []
    for n in range(2):
        for t in range(3):
            mask = sum(tokens[t, k] * teacher[n, k] for k in range(4)).sigmoid()
            masks[n, t] = mask.flatten()
            masked[n] += mask * teacher[n]
        dice += [2 * float(a @ b) / float(a @ a + b @ b)
                 for i, a in enumerate(masks[n]) for j, b in enumerate(masks[n]) if i != j]
    losses = mask_learning_losses(teacher, tokens, target)
    assert losses["dice"].item() == pytest.approx(sum(dice) / len(dice), rel=1e-10)
    assert losses["ce"].item() == pytest.approx(SegCrossEntropyLoss()(masked, target).item(), rel=1e-10)


def test_dice_of_one_equal_and_separate_masks():
    assert dice_overlap(torch.rand(2, 1, 6)).item() == 0
    assert dice_overlap(torch.rand(1, 1, 6).expand(1, 3, 6)).item() == pytest.approx(1)
    assert dice_overlap(torch.eye(3)[None]).item() == 0


def test_half_precision_is_computed_in_float32_and_the_teacher_gets_no_gradient():
    student, teacher = (x.bfloat16().requires_grad_() for x in maps()[:2])
    tokens, target = maps()[2].float(), fill.labels("y", (2, 24, 40), 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = [maskd_loss(student, teacher, tokens), *mask_learning_losses(teacher, tokens, target).values()]
    want = [maskd_loss(student.float(), teacher.float(), tokens),
            *mask_learning_losses(teacher.float(), tokens, target).values()]
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32 and a.item() == pytest.approx(b.item(), rel=1e-6)
    got[0].backward()
    assert teacher.grad is None and student.grad is not None


def test_shapes_must_fit():
    student, teacher, tokens = maps()
    with pytest.raises(UserError, match=r"maskd.*\(2, 4, 3, 5\).*\(2, 4, 3, 4\)"):
        maskd_loss(student, teacher[..., :4], tokens)
    with pytest.raises(UserError, match=r"tokens \(3, 3\): expected \[T, 4\]"):
        maskd_loss(student, teacher, tokens[:, :3])


def build(student: dict | None = None, teacher: dict | None = None, **options) -> MasKD:
    nets = (NetInfo(name, taps or {"logits": 4, "aux": 4}, 4)
            for name, taps in (("small", student), ("large", teacher)))
    return make("maskd", *nets, **options)


def output(logits, aux=None) -> SegOutput:
    return SegOutput(logits=logits, aux=aux, c1=logits, c2=logits, c3=logits, c4=logits, head=logits)


def test_method_adds_the_auxiliary_logits_where_both_have_them():
    assert methods()["maskd"] is MasKD and MasKD.terms[0].weight == 0
    (s, t, tokens), (s_aux, t_aux, _) = maps(), maps((2, 4, 2, 2))
    main, side = maskd_loss(s, t, tokens), maskd_loss(s_aux, t_aux, tokens)
    for method, want in ((build(maskd_tokens=3), main + 0.4 * side), (build(maskd_aux_weight=0.0), main),
                         (build({"logits": 4}), main), (build(None, {"logits": 4}), main)):
        method.double().tokens = tokens
        got = method(batch(output(s, s_aux), output(t, t_aux)))
        assert {k: v.item() for k, v in got.items()} == {"maskd": pytest.approx(want.item(), rel=1e-12)}
        assert list(method.state_dict()) == ["tokens"] and not list(method.parameters())
    with pytest.raises(UserError, match="logits 4 of the student small and 5 of the teacher large"):
        build(None, {"logits": 5})


def test_tokens_depend_on_the_seed_only():
    first, again, other = (build(seed=seed).tokens for seed in (1, 1, 2))
    assert first.shape == (8, 4) and first.equal(again) and not first.equal(other)
    assert first.std().item() == pytest.approx(0.01, rel=0.4)
