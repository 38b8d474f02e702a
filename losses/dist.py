"""DIST: correlation instead of equality (Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022).

With Y = softmax over the classes of logits / T, pixels as rows and classes as columns, and the Pearson correlation
rho(a, b) = <a - mean a, b - mean b> / (|a - mean a| |b - mean b| + 1e-8):

    L = T^2 (beta * (1 - mean over rows of rho) + gamma * (1 - mean over columns of rho))

A column runs over the pixels of every image of its group: in the published runs, of the two images of a GPU.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from losses.distiller import BuildContext, Distiller, Term, register
from losses.logits import check_logit_maps, check_logit_nets
from losses.task import at_least_float32
from models.output import SegOutput
from utils.cli import number
from utils.errors import UserError


def mean_over_groups(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor,
                     group_size: int) -> Tensor:
    """Mean of a loss over groups of ``group_size`` images in a row (0 = one group of all).

    student, teacher: [B, ...]. loss takes two tensors [groups, images, ...] and returns the mean over the groups. When
    the groups do not divide the batch, the images that remain form a smaller group, weighted by their number.
    """
    batch = len(student)
    size = min(group_size or batch, batch)
    whole = batch - batch % size
    total = loss(student[:whole].unflatten(0, (-1, size)), teacher[:whole].unflatten(0, (-1, size))) * (whole / batch)
    if whole < batch:
        total = total + loss(student[None, whole:], teacher[None, whole:]) * ((batch - whole) / batch)
    return total


def pearson(a: Tensor, b: Tensor, dim: int | tuple[int, ...], eps: float = 1e-8) -> Tensor:
    """Pearson correlation of two tensors of one shape along ``dim``, which the result lacks; 0 of a constant."""
    a, b = (x - x.mean(dim, keepdim=True) for x in (a, b))
    norms = torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim)
    return (a * b).sum(dim) / (norms + eps)


def dist_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, beta: float = 1.0,
              gamma: float = 1.0, group_size: int = 0) -> Tensor:
    """DIST of two logit maps [B, K, h, w]; every position counts, also where the label is ignored.

    beta, gamma: weights of the relation between the classes of a pixel and of that between the pixels of a class.
    group_size: images whose pixels go together in the latter (:func:`mean_over_groups`). Gradients reach the student
    only. Raises UserError when the shapes differ.
    """
    check_logit_maps("dist", student_logits, teacher_logits)
    y_s, y_t = (torch.softmax(at_least_float32(z) / temperature, dim=1)
                for z in (student_logits, teacher_logits.detach()))
    inter = 1 - pearson(y_s, y_t, dim=1).mean()
    intra = 1 - mean_over_groups(lambda s, t: pearson(s, t, dim=(1, 3, 4)).mean(), y_s, y_t, group_size)
    return temperature ** 2 * (beta * inter + gamma * intra)


class CriterionDIST(nn.Module):
    """:func:`dist_loss` with fixed settings."""

    def __init__(self, temperature: float = 1.0, beta: float = 1.0, gamma: float = 1.0, group_size: int = 0) -> None:
        super().__init__()
        if temperature <= 0:
            raise UserError(f"--dist-temperature {temperature:g}: expected a number above 0")
        self.temperature, self.beta, self.gamma, self.group_size = temperature, beta, gamma, group_size

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Scalar of two logit maps [B, K, h, w]."""
        return dist_loss(student_logits, teacher_logits, self.temperature, self.beta, self.gamma, self.group_size)


@register("dist")
class DIST(Distiller):
    """The main logits, and a share of the auxiliary ones where both networks have them."""

    title = "correlations between and within classes"
    paper = "Huang et al., Knowledge Distillation from A Stronger Teacher"
    year = 2022
    terms = (Term("dist", 0.0, "weight of DIST's correlations (main and auxiliary logits)"),)
    student_taps = ("logits",)
    teacher_taps = ("logits",)
    # the authors' Cityscapes scripts: 1 on the main and 0.4 on the auxiliary logits, T = beta = gamma = 1, no KD, and
    # five times the weight decay of the rows that their table compares with
    preset = {"*": {"lambda_dist": 1.0, "weight_decay": 5e-4}}
    cost = "softmaxes and correlations of the logits"

    def __init__(self, criterion: CriterionDIST, aux_weight: float = 0.0) -> None:
        super().__init__()
        self.criterion, self.aux_weight = criterion, aux_weight
        if aux_weight:
            self.student_taps = self.teacher_taps = ("logits", "aux")

    @classmethod
    def add_arguments(cls, group: argparse._ArgumentGroup) -> None:
        group.add_argument("--dist-temperature", type=number(float, 0, open_low=True), default=1.0, metavar="T",
                           help="softmax temperature")
        group.add_argument("--dist-beta", type=number(float, 0), default=1.0, metavar="W",
                           help="weight of the correlation over the classes of a pixel")
        group.add_argument("--dist-gamma", type=number(float, 0), default=1.0, metavar="W",
                           help="weight of the correlation over the pixels of a class")
        group.add_argument("--dist-aux-weight", type=number(float, 0), default=0.4, metavar="W",
                           help="share of the auxiliary logits, where both networks have them")

    @classmethod
    def build(cls, context: BuildContext) -> DIST:
        """Raises UserError when classes or strides differ."""
        check_logit_nets(cls, context)
        o = context.options
        criterion = CriterionDIST(getattr(o, "dist_temperature", 1.0), getattr(o, "dist_beta", 1.0),
                                  getattr(o, "dist_gamma", 1.0), getattr(o, "group_size", 2))
        both = "aux" in context.student.channels and "aux" in context.teacher.channels
        return cls(criterion, getattr(o, "dist_aux_weight", 0.4) if both else 0.0)

    def forward(self, student: SegOutput, teacher: SegOutput, target: Tensor, step: int,
                generator: torch.Generator | None = None) -> dict[str, Tensor]:
        loss = self.criterion(student.logits, teacher.logits)
        if self.aux_weight:
            loss = loss + self.aux_weight * self.criterion(student.aux, teacher.aux)
        return {"dist": loss}
