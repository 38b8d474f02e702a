"""AICSD: recorded values of the released code, a loop twin of the paper's form, the schedule."""
from __future__ import annotations

import math

import pytest
import torch
from reference import fill, golden

from losses import SegCrossEntropyLoss
from losses.aicsd import AICSD, aicsd_kd_loss, aicsd_loss, ickd_loss
from losses.distiller import BuildContext, NetInfo, methods
from models.output import SegOutput
from utils.cli import ArgumentParser
from utils.errors import UserError

ALL = frozenset({"aicsd", "aicsd_kd", "aicsd_task", "ickd"})
NET = NetInfo("net", {"logits": 4}, 4)


def output(logits: torch.Tensor) -> SegOutput:
    return SegOutput(logits, None, logits, logits, logits, logits, logits)


def context(*arguments: str, active: frozenset[str] = ALL, length: int = 10, **shared) -> BuildContext:
    parser = ArgumentParser(prog="test")
    AICSD.add_arguments(parser.add_argument_group("aicsd"))
    options = parser.parse_args(list(arguments))
    vars(options).update(shared, max_iterations=length)
    return BuildContext(NET, NET, 4, active=active, options=options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", golden.case_ids("aicsd/"))
def test_golden(name, dtype):
    case = golden.load_case(name)
    inputs = golden.make_inputs(case, dtype)
    pair = inputs["student"], inputs["teacher"]
    losses = {"pixel_kd": aicsd_kd_loss(*pair), "ickd": ickd_loss(*pair), "icsd": aicsd_loss(*pair, "released")}
    if dtype == torch.float32:  # differences of 1e-6, see the README of the recorded cases
        del losses["icsd"]
        case = {**case, **{key: {n: case[key][n] for n in losses} for key in ("losses", "losses_float32", "grads")}}
    golden.check_losses(case, losses, inputs)


def slow_matrix(image: torch.Tensor) -> list[list[float]]:
    """KL between the classes of one image [K, h, w], rows at unit length."""
    p = []
    for channel in image:
        weights = [math.exp(v) for v in channel.reshape(-1).tolist()]
        p.append([w / sum(weights) for w in weights])
    rows = [[sum(a * math.log(a / b) for a, b in zip(pi, pj, strict=True)) for pj in p] for pi in p]
    return [[v / math.sqrt(sum(u * u for u in row)) for v in row] for row in rows]


def test_paper_form_loop_twin():
    student, teacher = (fill.tensor(n, (2, 4, 5, 3), 1, 2.0, torch.float64) for n in ("s", "t"))
    squares = [(a - b) ** 2 for s, t in zip(student, teacher, strict=True)
               for rows in zip(slow_matrix(s), slow_matrix(t), strict=True) for a, b in zip(*rows, strict=True)]
    assert aicsd_loss(student, teacher, "paper").item() == pytest.approx(sum(squares) / len(squares), rel=1e-9)


def test_released_form_loop_twin():
    """As coded: softmax along the rows, sum(p_j log p_j - p_j p_i) for i <= j, mirrored, averaged over the batch."""
    maps = [fill.tensor(n, (2, 4, 5, 3), 2, 2.0, torch.float64) for n in ("s", "t")]
    matrices = []
    for z in maps:
        p, matrix = z.softmax(dim=2), torch.zeros(4, 4, dtype=z.dtype)
        for i in range(4):
            for j in range(i, 4):
                matrix[i, j] = matrix[j, i] = (p[:, j] * p[:, j].log() - p[:, j] * p[:, i]).sum() / 2
        matrices.append(matrix / matrix.norm(dim=1, keepdim=True))
    expected = (matrices[0] - matrices[1]).square().mean().item() / 2
    assert aicsd_loss(*maps, "released").item() == pytest.approx(expected, rel=1e-9)


def test_groups():
    """A matrix per group of neighbours, the last one of what is left; the paper's form knows no groups."""
    maps = [fill.tensor(n, (5, 4, 5, 3), 2, 2.0, torch.float64) for n in ("s", "t")]
    parts = [aicsd_loss(*group, "released").item() for group in zip(*(x.split(2) for x in maps), strict=True)]
    expected = (2 * parts[0] + 2 * parts[1] + parts[2]) / 5
    assert aicsd_loss(*maps, "released", 2).item() == pytest.approx(expected, rel=1e-9)
    whole = aicsd_loss(*maps, "released").item()
    assert whole == aicsd_loss(*maps, "released", 5).item() != pytest.approx(expected, rel=1e-2)
    assert aicsd_loss(*maps, "paper", 2).item() == aicsd_loss(*maps).item()


@pytest.mark.parametrize("form", ["released", "paper"])
def test_equal_logits_confident_logits_and_autocast(form):
    logits = fill.tensor("z", (1, 4, 5, 3), 3, 2.0).requires_grad_()
    assert aicsd_loss(logits, logits, form).item() == pytest.approx(0, abs=1e-9)
    sharp = (logits * 1e3).detach().requires_grad_()  # probabilities of exactly 0
    aicsd_loss(sharp, logits, form).backward()
    assert sharp.grad.isfinite().all() and logits.grad is None
    other = fill.tensor("y", (1, 4, 5, 3), 3, 2.0)
    want = aicsd_loss(logits.bfloat16().float(), other.bfloat16().float(), form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(aicsd_loss(logits.bfloat16(), other.bfloat16(), form), want)


@pytest.mark.parametrize("step, a", [(0, 0.1), (4, 0.5), (9, 1.0), (20, 1.0)])
def test_schedule(step, a):
    method = AICSD.build(context())
    student, teacher = (fill.tensor(n, (2, 4, 5, 3), 4, 2.0) for n in ("s", "t"))
    target = fill.labels("y", (2, 40, 24), 4, 4, 0.2)
    ce = SegCrossEntropyLoss()(student, target).item()
    terms = {k: v.item() for k, v in method(output(student), output(teacher), target, step).items()}
    assert terms == pytest.approx({"aicsd": a * aicsd_loss(student, teacher).item(),
                                   "aicsd_kd": (1 - a) * aicsd_kd_loss(student, teacher).item(),
                                   "aicsd_task": (a - 1) * ce, "ickd": ickd_loss(student, teacher).item()})
    constant = AICSD.build(context("--no-aicsd-schedule"))
    terms = constant(output(student), output(teacher), target, step)
    assert terms["aicsd"].item() == aicsd_loss(student, teacher).item()
    assert terms["aicsd_kd"].item() == aicsd_kd_loss(student, teacher).item() and terms["aicsd_task"].item() == 0


@pytest.mark.parametrize("compat, form", [("fixed", "paper"), ("reference", "released")])
def test_the_form_follows_compat(compat, form):
    method = AICSD.build(context("--no-aicsd-schedule", compat=compat, group_size=3))
    student, teacher = (fill.tensor(n, (4, 4, 5, 3), 4, 2.0) for n in ("s", "t"))
    got = method(output(student), output(teacher), fill.labels("y", (4, 40, 24), 4, 4, 0.2), 0)["aicsd"].item()
    assert got == aicsd_loss(student, teacher, form, 3).item()
    other = {"paper": "released", "released": "paper"}[form]
    assert got != pytest.approx(aicsd_loss(student, teacher, other, 3).item(), rel=0.5)


def test_the_task_term_takes_back_the_grouped_cross_entropy():
    student, teacher = (fill.tensor(n, (3, 4, 5, 3), 4, 2.0) for n in ("s", "t"))
    target = fill.labels("y", (3, 40, 24), 4, 4, 0.2)
    target[0, 5:] = -1
    ce = [SegCrossEntropyLoss(-1, size)(student, target).item() for size in (2, 0)]
    got = AICSD.build(context(group_size=2))(output(student), output(teacher), target, 0)["aicsd_task"].item()
    assert got == pytest.approx(-0.9 * ce[0]) != pytest.approx(-0.9 * ce[1], rel=1e-3)


@pytest.mark.parametrize("name", sorted(ALL))
def test_only_active_terms(name):
    assert methods()["aicsd"] is AICSD
    method = AICSD.build(context(active=frozenset({name})))
    student, teacher = (torch.randn(1, 4, 5, 3, requires_grad=True) for _ in range(2))
    terms = method(output(student), output(teacher), torch.zeros(1, 40, 24, dtype=torch.long), 3)
    assert list(terms) == [name]
    terms[name].backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


def test_all_ignored():
    method = AICSD.build(context())
    logits = torch.randn(1, 4, 5, 3, requires_grad=True)
    terms = method(output(logits), output(torch.randn(1, 4, 5, 3)), torch.full((1, 40, 24), -1), 0)
    sum(terms.values()).backward()
    assert terms["aicsd_task"].item() == 0 and logits.grad.isfinite().all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="--max-iterations 0"):
        AICSD(0)
    with pytest.raises(UserError, match="aicsd"):
        AICSD.build(BuildContext(NET, NetInfo("other", {"logits": 5}, 5), 4, active=ALL))
    for loss in (aicsd_loss, ickd_loss, aicsd_kd_loss):
        with pytest.raises(UserError, match=r"\(1, 4, 5, 3\).*\(1, 4, 5, 4\)"):
            loss(torch.zeros(1, 4, 5, 3), torch.zeros(1, 4, 5, 4))
