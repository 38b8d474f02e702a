"""PKD: recorded values, the formula in loops, groups of images, edge cases."""
from __future__ import annotations

import pytest
import torch
from method_cases import batch, make
from reference import fill, golden

from losses.core import NetInfo, methods
from losses.pkd import PKD, PKDOptions, pkd_loss
from models.output import SegOutput
from utils.errors import UserError

DTYPES = (torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", golden.case_ids("pkd/"))
def test_golden(name, dtype):
    case = golden.load_case(name)
    inputs = golden.make_inputs(case, dtype)
    golden.check_losses(case, {"pkd": pkd_loss(inputs["student"], inputs["teacher"])}, inputs)


def maps(shape=(5, 4, 3, 5)):
    return fill.tensor("s", shape, 1, 2.0, torch.float64), fill.tensor("t", shape, 1, 3.0, torch.float64) + 7


def loops(student, teacher, groups: list[list[int]]) -> float:
    """One channel of one group at a time; groups weigh by their images."""
    total = 0.0
    for group in groups:
        for channel in range(student.shape[1]):
            s, t = (x[group, channel].flatten().tolist() for x in (student, teacher))
            count = len(s)
            means = [sum(x) / count for x in (s, t)]
            stds = [(sum((v - m) ** 2 for v in x) / (count - 1)) ** 0.5 + 1e-6 for x, m in zip((s, t), means,
                                                                                               strict=True)]
            squares = [((a - means[0]) / stds[0] - (b - means[1]) / stds[1]) ** 2 for a, b in zip(s, t, strict=True)]
            total += len(group) * sum(squares) / count / 2
    return total / student.shape[0] / student.shape[1]


@pytest.mark.parametrize(("size", "groups"), [
    (0, [[0, 1, 2, 3, 4]]), (2, [[0, 1], [2, 3], [4]]), (1, [[0], [1], [2], [3], [4]])])
def test_formula_in_loops(size, groups):
    assert pkd_loss(*maps(), size).item() == pytest.approx(loops(*maps(), groups), rel=1e-10)


def test_scale_and_offset_do_not_matter():
    student, _ = maps()
    assert pkd_loss(student, 4 * student - 3).item() == pytest.approx(0, abs=1e-10)
    assert pkd_loss(student, -student).item() == pytest.approx(2, rel=0.05)


def test_dead_channels_and_single_positions_have_finite_gradients():
    # a standardized dead channel is 0, so half the teacher's variance is left: 1, or 0 at a single position
    for shape, value in (((2, 3, 4, 5), 0.5), ((1, 3, 1, 1), 0.0)):
        student = torch.zeros(shape, requires_grad=True)
        loss = pkd_loss(student, torch.randn(shape), 2)
        loss.backward()
        assert loss.item() == pytest.approx(value, rel=0.05)
        assert torch.isfinite(student.grad).all()


def test_half_precision_is_computed_in_float32_and_the_teacher_gets_no_gradient():
    student, teacher = (x.bfloat16().requires_grad_() for x in maps())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pkd_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(pkd_loss(student.float(), teacher.float()).item(), rel=1e-6)
    loss.backward()
    assert teacher.grad is None and student.grad is not None


def test_shapes_must_agree():
    with pytest.raises(UserError, match=r"\(5, 4, 3, 5\).*\(5, 3, 3, 5\)"):
        pkd_loss(maps()[0], maps()[1][:, :3])
    with pytest.raises(UserError, match="pkd tap 'c2': expected one of head, c4"):
        PKDOptions(pkd_tap="c2")


def build(student: dict, teacher: dict, **options) -> PKD:
    return make("pkd", NetInfo("small", student, 5), NetInfo("large", teacher, 5), **options)


def test_method_aligns_widths_and_follows_the_tap():
    assert methods()["pkd"] is PKD and PKD.terms[0].weight == 0
    small, large = {"head": 4, "c4": 6}, {"head": 4, "c4": 8}
    fields = {f: torch.randn(2, 1, 1, 1) for f in ("logits", "aux", "c1", "c2", "c3")}
    student = SegOutput(**fields, c4=torch.randn(2, 6, 5, 7), head=torch.randn(2, 4, 5, 7))
    teacher = SegOutput(**fields, c4=torch.randn(2, 8, 3, 4), head=torch.randn(2, 4, 5, 7))
    same = build(small, large)
    assert not same.state_dict() and same.group_size == 2
    assert same(batch(student, teacher))["pkd"].item() == pkd_loss(student.head, teacher.head).item()
    wider = build(small, large, pkd_tap="c4", group_size=1)
    assert {n: tuple(p.shape) for n, p in wider.named_parameters()} == {"align.weight": (8, 6, 1, 1),
                                                                        "align.bias": (8,)}
    wider(batch(student, teacher))["pkd"].backward()
    assert wider.align.weight.grad.abs().sum() > 0
    with pytest.raises(UserError, match="needs c4 of the student, but small offers only head"):
        build({"head": 4}, large, pkd_tap="c4")
