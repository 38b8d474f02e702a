"""AICSD: recorded values of the released code, a loop twin of the paper's form, the schedule."""
from __future__ import annotations

import math

import pytest
import torch
from method_cases import batch, make
from reference import fill, golden
from torch import nn

from losses import SegCrossEntropyLoss
from losses.aicsd import AICSD, aicsd_kd_loss, aicsd_loss, ickd_loss
from losses.core import NetInfo, methods
from losses.core.objective import Objective
from models.output import SegOutput
from utils.errors import UserError

ALL = frozenset({"aicsd", "aicsd_kd", "aicsd_task", "ickd"})
NET = NetInfo("net", {"logits": 4}, 4)


def output(logits: torch.Tensor) -> SegOutput:
    return SegOutput(logits, None, logits, logits, logits, logits, logits)


def build(*arguments: str, active: frozenset[str] = ALL, length: int = 10, **settings) -> AICSD:
    return make("aicsd", NET, NET, *arguments, active=active, max_iterations=length, **settings)


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
    method = build()
    student, teacher = (fill.tensor(n, (2, 4, 5, 3), 4, 2.0) for n in ("s", "t"))
    target = fill.labels("y", (2, 40, 24), 4, 4, 0.2)
    terms = {k: v.item() for k, v in method(batch(output(student), output(teacher), target, step)).items()}
    assert terms == pytest.approx({"aicsd": a * aicsd_loss(student, teacher).item(),
                                   "aicsd_kd": (1 - a) * aicsd_kd_loss(student, teacher).item(),
                                   "ickd": ickd_loss(student, teacher).item()})
    assert method.task_scale(step) == pytest.approx(a)
    constant = build("--no-aicsd-schedule")
    terms = constant(batch(output(student), output(teacher), target, step))
    assert terms["aicsd"].item() == aicsd_loss(student, teacher).item()
    assert terms["aicsd_kd"].item() == aicsd_kd_loss(student, teacher).item() and constant.task_scale(step) == 1


@pytest.mark.parametrize("compat, form", [("fixed", "paper"), ("reference", "released")])
def test_the_form_follows_compat(compat, form):
    method = build("--no-aicsd-schedule", compat=compat, group_size=3)
    student, teacher = (fill.tensor(n, (4, 4, 5, 3), 4, 2.0) for n in ("s", "t"))
    got = method(batch(output(student), output(teacher)))["aicsd"].item()
    assert got == aicsd_loss(student, teacher, form, 3).item()
    other = {"paper": "released", "released": "paper"}[form]
    assert got != pytest.approx(aicsd_loss(student, teacher, other, 3).item(), rel=0.5)


class Student(nn.Module):
    """A network of one convolution with an auxiliary head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.side = nn.Conv2d(3, 4, 8, stride=8), nn.Conv2d(3, 4, 8, stride=8)

    def forward(self, images: torch.Tensor) -> SegOutput:
        logits = self.body(images)
        return output(logits)._replace(aux=self.side(images))


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("group_size", [0, 2])
def test_the_task_loss_is_scaled_by_the_schedule(weight, group_size):
    """The whole objective: a CE + 0.4 CE(aux) + a * aicsd + (1 - a) * kd, with weight 1 on the task's scale."""
    torch.manual_seed(0)
    weights = {"aicsd": 3.0, "aicsd_kd": 2.0, "aicsd_task": weight}
    method = build(active=frozenset(weights), group_size=group_size)
    objective = Objective(Student(), {"aicsd": method}, weights, 0.4, -1, group_size).double()
    images, teacher = torch.randn(3, 3, 40, 24).double(), torch.randn(3, 4, 5, 3).double()
    target = fill.labels("y", (3, 40, 24), 4, 4, 0.2)
    target[0, 5:] = -1
    entropy = SegCrossEntropyLoss(-1, group_size)
    for step in (0, 3, 9):
        a = (step + 1) / 10
        terms = objective(images, output(teacher), target, step)
        total = sum(objective.weighted(terms, step).values())
        logits, aux = objective.student(images).logits, objective.student(images).aux
        expected = ((1 + weight * (a - 1)) * entropy(logits, target) + 0.4 * entropy(aux, target)
                    + 3 * a * aicsd_loss(logits, teacher) + 2 * (1 - a) * aicsd_kd_loss(logits, teacher))
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
        assert set(terms) == {"task", "aux", "aicsd", "aicsd_kd"}


def test_the_task_loss_cannot_be_weighted_below_0(capsys):
    """With a weight above 1 its factor would be negative early in the schedule: training against the labels."""
    with pytest.raises(SystemExit):
        build("--lambda-aicsd-task", "1.5")
    assert "--lambda-aicsd-task: " in (said := capsys.readouterr().err) and "at least 0 and of at most 1" in said


@pytest.mark.parametrize("name", sorted(ALL - {"aicsd_task"}))
def test_only_active_terms(name):
    assert methods()["aicsd"] is AICSD
    method = build(active=frozenset({name}))
    student, teacher = (torch.randn(1, 4, 5, 3, requires_grad=True) for _ in range(2))
    terms = method(batch(output(student), output(teacher), step=3))
    assert list(terms) == [name]
    terms[name].backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


def test_all_ignored():
    method = build()
    logits = torch.randn(1, 4, 5, 3, requires_grad=True)
    teacher = torch.randn(1, 4, 5, 3)
    terms = method(batch(output(logits), output(teacher)))
    assert terms["aicsd"].item() == pytest.approx(0.1 * aicsd_loss(logits, teacher).item())
    sum(terms.values()).backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().sum() > 0


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="aicsd"):
        make("aicsd", NET, NetInfo("other", {"logits": 5}, 5))
    for loss in (aicsd_loss, ickd_loss, aicsd_kd_loss):
        with pytest.raises(UserError, match=r"\(1, 4, 5, 3\).*\(1, 4, 5, 4\)"):
            loss(torch.zeros(1, 4, 5, 3), torch.zeros(1, 4, 5, 4))
