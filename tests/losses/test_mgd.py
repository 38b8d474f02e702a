"""MGD: recorded values, the formula step by step, the mask, edge cases."""
from __future__ import annotations

import pytest
import torch
from method_cases import batch, make
from reference import fill, golden
from torch.nn import functional as F

from losses.afdcd import random_keep_mask
from losses.core import NetInfo, methods
from losses.mgd import MGD, MaskedGeneration, MGDOptions
from models.output import SegOutput
from utils.errors import UserError

DTYPES = (torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", golden.case_ids("mgd/"))
@pytest.mark.parametrize("fold", [False, True])
def test_golden(name, dtype, fold, monkeypatch):
    monkeypatch.setattr("losses.core.feature_losses.fold_pays", lambda *_: fold)
    case = golden.load_case(name)
    inputs, config = golden.make_inputs(case, dtype), case["config"]
    widths = [inputs[role].shape[1] for role in ("student", "teacher")]
    criterion = golden.fill_params(MaskedGeneration(*widths, config["lambda_mask"]).to(dtype), case)
    batch, _, height, width = inputs["student"].shape
    keep = random_keep_mask(golden.uniform(case, "mask_u", (batch, 1, height, width), torch.float32),
                            config["lambda_mask"])
    loss = config["alpha"] * criterion(inputs["student"], inputs["teacher"], keep=keep)
    golden.check_losses(case, {"mgd": loss}, inputs, criterion)


def maps(student=(2, 3, 5, 7), teacher=(2, 4, 5, 7), dtype=torch.float64):
    return (fill.tensor("student", student, 1, dtype=dtype).requires_grad_(),
            fill.tensor("teacher", teacher, 1, dtype=dtype))


def test_formula_step_by_step():
    student, teacher = maps()
    criterion = fill.fill_module(MaskedGeneration(3, 4, 0.75).double(), 3)
    keep = random_keep_mask(fill.uniform("u", (2, 1, 5, 7)), 0.75)
    p, total = dict(criterion.named_parameters()), 0.0
    for image, target, kept in zip(student, teacher, keep, strict=True):
        x = torch.einsum("oi,ihw->ohw", p["align.weight"][..., 0, 0], image) + p["align.bias"][:, None, None]
        for i in range(5):
            for j in range(7):
                if not kept[0, i, j]:
                    x[:, i, j] = 0
        x = F.conv2d(x[None], p["generation.0.weight"], p["generation.0.bias"], padding=1).relu()
        x = F.conv2d(x, p["generation.2.weight"], p["generation.2.bias"], padding=1)[0]
        total += sum((a - b) ** 2 for a, b in zip(x.flatten().tolist(), target.flatten().tolist(), strict=True)) / 2
    assert criterion(student, teacher, keep=keep).item() == pytest.approx(total, rel=1e-12)


def test_mask_follows_the_generator_and_hides_positions():
    student, teacher = maps()
    criterion = fill.fill_module(MaskedGeneration(3, 4, 0.5).double(), 3)
    values = [criterion(student, teacher, generator=torch.Generator().manual_seed(seed)).item() for seed in (1, 1, 2)]
    assert values[0] == values[1] != values[2]
    keep = random_keep_mask(fill.uniform("u", (2, 1, 5, 7)), 0.5)
    criterion(student, teacher, keep=keep).backward()
    assert (student.grad.abs().sum(dim=1, keepdim=True) > 0).equal(keep)


def test_autocast_keeps_the_loss_in_float32_and_the_teacher_gets_no_gradient():
    student, teacher = (x.detach().float().requires_grad_() for x in maps())
    criterion = fill.fill_module(MaskedGeneration(3, 4, 0.75), 3)
    keep = torch.ones(2, 1, 5, 7)
    exact = criterion(student, teacher, keep=keep)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = criterion(student, teacher, keep=keep)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(exact.item(), rel=2e-2)
    half.backward()
    assert teacher.grad is None and student.grad is not None


def test_misfits_are_named():
    with pytest.raises(UserError, match=r"\(2, 4, 5, 7\).*3 and 4 channels"):
        MaskedGeneration(3, 4, 0.75)(maps()[1].float(), maps()[1].float())
    with pytest.raises(UserError, match=r"\(2, 3, 5, 6\).*same batch, height and width"):
        MaskedGeneration(3, 4, 0.75)(*maps((2, 3, 5, 6), dtype=torch.float32))
    with pytest.raises(UserError, match="mgd mask ratio 2.0: expected a number of at least 0 and of at most 1"):
        MGDOptions(mgd_mask_ratio=2.0)


def test_method():
    assert methods()["mgd"] is MGD and MGD.terms[0].weight == 0
    small, large = NetInfo("small", {"c4": 3}, 5), NetInfo("large", {"c4": 4}, 5)
    method = make("mgd", small, large, mgd_mask_ratio=0.25)
    assert method.criterion.mask_ratio == 0.25
    assert make("mgd", small, large).criterion.mask_ratio == 0.75
    assert method.criterion.fast and not make("mgd", small, large, fast=False).criterion.fast
    s, t = maps(dtype=torch.float32)
    outputs = [SegOutput(logits=x, aux=None, c1=x, c2=x, c3=x, c4=x, head=x) for x in (s, t)]
    terms = method(batch(*outputs), torch.Generator().manual_seed(1))
    terms["mgd"].backward()
    assert all(p.grad is not None for p in method.parameters()) and len(list(method.parameters())) == 6
    assert len(list(make("mgd", large, large).parameters())) == 4
    with pytest.raises(UserError, match="needs c4 of the student"):
        make("mgd", NetInfo("none", {"logits": 5}, 5), large)
