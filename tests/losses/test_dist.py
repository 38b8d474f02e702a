"""DIST: recorded values, the formula in loops, groups of images, edge cases."""
from __future__ import annotations

from functools import partial

import pytest
import torch
from method_cases import batch, make
from reference import fill, golden

from losses.core import NetInfo, methods
from losses.dist import DIST, DISTOptions, dist_loss, mean_over_groups
from models.output import SegOutput
from utils.errors import UserError

DTYPES = (torch.float32, torch.float64)
plain_loss = partial(dist_loss, temperature=1.0, beta=1.0, gamma=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", golden.case_ids("dist/"))
def test_golden(name, dtype):
    case = golden.load_case(name)
    config, inputs = case["config"], golden.make_inputs(case, dtype)
    loss = dist_loss(inputs["student"], inputs["teacher"], config.get("temperature", config.get("tau")),
                     config.get("beta", config.get("inter")), config.get("gamma", config.get("intra")))
    golden.check_losses(case, {"dist": loss}, inputs)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.flatten() - a.mean(), b.flatten() - b.mean()
    return float(a @ b / (a.norm() * b.norm() + 1e-8))


def loops(student, teacher, temperature: float, beta: float, gamma: float, groups: list[list[int]]) -> float:
    """One pixel, and one class of one group of images, at a time; groups weigh by their images."""
    y, z = ((x / temperature).softmax(dim=1) for x in (student, teacher))
    batch, classes, height, width = y.shape
    rows = [correlation(y[n, :, i, j], z[n, :, i, j])
            for n in range(batch) for i in range(height) for j in range(width)]
    columns = sum(len(g) / batch * sum(correlation(y[g, c], z[g, c]) for c in range(classes)) / classes
                  for g in groups)
    return temperature ** 2 * (beta * (1 - sum(rows) / len(rows)) + gamma * (1 - columns))


def maps(shape=(5, 4, 3, 5)):
    return fill.tensor("s", shape, 1, 2.0, torch.float64), fill.tensor("t", shape, 1, 2.0, torch.float64)


@pytest.mark.parametrize(("size", "groups"), [
    (0, [[0, 1, 2, 3, 4]]), (2, [[0, 1], [2, 3], [4]]), (1, [[0], [1], [2], [3], [4]]), (9, [[0, 1, 2, 3, 4]])])
def test_formula_in_loops(size, groups):
    got = dist_loss(*maps(), 2.0, 0.7, 1.5, size)
    assert got.item() == pytest.approx(loops(*maps(), 2.0, 0.7, 1.5, groups), rel=1e-10)


def test_a_batch_in_groups_is_the_mean_of_small_batches():
    student, teacher = maps((6, 4, 3, 5))
    parts = [plain_loss(s, t) for s, t in zip(student.split(2), teacher.split(2), strict=True)]
    assert plain_loss(student, teacher, group_size=2).item() == pytest.approx(torch.stack(parts).mean().item())
    assert plain_loss(student, teacher).item() != pytest.approx(torch.stack(parts).mean().item(), rel=1e-6)


def test_groups_weigh_by_their_images():
    a = torch.arange(5.0)
    assert mean_over_groups(lambda s, t: s.mean(), a, a, 2).item() == pytest.approx(2.0)


def test_equal_and_constant_logits():
    student, teacher = maps()
    assert plain_loss(teacher, teacher, group_size=2).item() == pytest.approx(0, abs=1e-5)
    for flat in (torch.zeros(1, 4, 3, 3), torch.zeros(2, 1, 3, 3), torch.zeros(1, 4, 1, 1)):
        flat.requires_grad_()
        loss = plain_loss(flat, torch.randn(flat.shape), group_size=2)
        loss.backward()
        assert loss.item() == pytest.approx(2, abs=1e-5) and torch.isfinite(flat.grad).all()


def test_half_precision_is_computed_in_float32_and_the_teacher_gets_no_gradient():
    student, teacher = (x.bfloat16().requires_grad_() for x in maps())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = plain_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain_loss(student.float(), teacher.float()).item(), rel=1e-6)
    loss.backward()
    assert teacher.grad is None and student.grad is not None


def test_shapes_must_agree():
    with pytest.raises(UserError, match=r"dist.*\(5, 4, 3, 5\).*\(5, 4, 3, 4\)"):
        plain_loss(maps()[0], maps()[1][..., :4])
    with pytest.raises(UserError, match="dist temperature 0.0: expected a number above 0"):
        DISTOptions(dist_temperature=0.0)


def output(logits, aux=None) -> SegOutput:
    return SegOutput(logits=logits, aux=aux, c1=logits, c2=logits, c3=logits, c4=logits, head=logits)


def test_method_adds_the_auxiliary_logits_where_both_have_them():
    assert methods()["dist"] is DIST and DIST.terms[0].weight == 0
    with_aux, without = (NetInfo("net", {"logits": 4, **more}, 4) for more in ({"aux": 4}, {}))
    logits, aux = maps(), maps((5, 4, 2, 3))
    student, teacher = (output(x, a) for x, a in zip(logits, aux, strict=True))
    main, side = plain_loss(*logits, group_size=2), plain_loss(*aux, group_size=2)
    for net, flags, want in ((with_aux, ["--group-size", "2"], main + 0.4 * side),
                             (with_aux, [], main + 0.4 * side),
                             (with_aux, ["--dist-aux-weight", "0"], main),
                             (without, [], main),
                             (without, ["--dist-beta", "0", "--dist-gamma", "2", "--dist-temperature", "3",
                                        "--group-size", "0"], dist_loss(*logits, 3.0, 0.0, 2.0))):
        method = make("dist", net, with_aux, *flags)
        assert method(batch(student, teacher))["dist"].item() == pytest.approx(want.item())
        assert not method.state_dict()


def test_method_refuses_other_classes():
    with pytest.raises(UserError, match="logits 4 of the student net and 5"):
        make("dist", NetInfo("net", {"logits": 4}, 4), NetInfo("big", {"logits": 5}, 5))
