"""DIST: correlation instead of equality (Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022).

With Y = softmax over the classes of logits / T, pixels as rows and classes as columns, and the Pearson correlation
rho(a, b) = <a - mean a, b - mean b> / (|a - mean a| |b - mean b| + 1e-8):

    L = T^2 (beta * (1 - mean over rows of rho) + gamma * (1 - mean over columns of rho))

A column runs over the pixels of every image of its group: in the published runs, of the two images of a GPU.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from losses import core
from losses.core import Batch, Distiller, Needs, NetInfo, OptionGroup, RunFacts, mean_over_groups, option, register
from losses.core.needs import both_have_aux

__all__ = ["DIST", "CriterionDIST", "dist_loss", "mean_over_groups", "pearson"]


def pearson(a: Tensor, b: Tensor, dim: int | tuple[int, ...], eps: float = 1e-8) -> Tensor:
    """Pearson correlation of two tensors of one shape along ``dim``, which the result lacks; 0 of a constant."""
    a, b = (x - x.mean(dim, keepdim=True) for x in (a, b))
    norms = torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim)
    return (a * b).sum(dim) / (norms + eps)


def dist_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, beta: float = 1.0,
              gamma: float = 1.0, group_size: int = 0) -> Tensor:
    """DIST of two logit maps [B, K, h, w]; every position counts, also where the label is ignored.

    beta, gamma: weights of the relation between the classes of a pixel and of that between the pixels of a class.
    group_size: images whose pixels go together in the latter. Gradients reach the student only. Raises UserError when
    the shapes differ.
    """
    core.check_logits("dist", student_logits, teacher_logits)
    y_s, y_t = (torch.softmax(core.at_least_float32(z) / temperature, dim=1)
                for z in (student_logits, teacher_logits.detach()))
    inter = 1 - pearson(y_s, y_t, dim=1).mean()
    intra = 1 - mean_over_groups(lambda s, t: pearson(s, t, dim=(1, 3, 4)).mean(), y_s, y_t, group_size)
    return temperature ** 2 * (beta * inter + gamma * intra)


@dataclass(frozen=True)
class DISTOptions(OptionGroup):
    """Settings of DIST."""

    dist_temperature: float = option(1.0, "softmax temperature", above=0, metavar="T")
    dist_beta: float = option(1.0, "weight of the correlation over the classes of a pixel", at_least=0, metavar="W")
    dist_gamma: float = option(1.0, "weight of the correlation over the pixels of a class", at_least=0, metavar="W")
    dist_aux_weight: float = option(0.4, "share of the auxiliary logits, where both networks have them", at_least=0,
                                    metavar="W")


class CriterionDIST(nn.Module):
    """:func:`dist_loss` with fixed settings."""

    def __init__(self, options: DISTOptions, group_size: int = 0) -> None:
        super().__init__()
        self.options, self.group_size = options, group_size

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Scalar of two logit maps [B, K, h, w]."""
        o = self.options
        return dist_loss(student_logits, teacher_logits, o.dist_temperature, o.dist_beta, o.dist_gamma, self.group_size)


@register("dist")
class DIST(Distiller):
    """The main logits, and a share of the auxiliary ones where both networks have them."""

    title = "correlations between and within classes"
    paper = "Huang et al., Knowledge Distillation from A Stronger Teacher"
    year = 2022
    Options = DISTOptions
    terms = (core.Term("dist", 0.0, "weight of DIST's correlations (main and auxiliary logits)"),)
    needs = Needs.both("logits", same_classes=True)
    # the authors' Cityscapes scripts: 1 on the main and 0.4 on the auxiliary logits, T = beta = gamma = 1, no KD, and
    # five times the weight decay of the rows that their table compares with
    preset = {"*": {"lambda_dist": 1.0, "weight_decay": 5e-4}}
    cost = "softmaxes and correlations of the logits"

    def __init__(self, criterion: CriterionDIST, aux_weight: float) -> None:
        super().__init__()
        self.criterion, self.aux_weight = criterion, aux_weight

    @classmethod
    def requires(cls, options: DISTOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> Needs:
        aux = ("aux",) if options.dist_aux_weight and both_have_aux(student, teacher) else ()
        return Needs.both("logits", *aux, same_classes=True)

    @classmethod
    def build(cls, options: DISTOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> DIST:
        aux_weight = options.dist_aux_weight if both_have_aux(student, teacher) else 0.0
        return cls(CriterionDIST(options, run.group_size), aux_weight)

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        loss = self.criterion(batch.student.logits, batch.teacher.logits)
        if self.aux_weight:
            loss = loss + self.aux_weight * self.criterion(batch.student.aux, batch.teacher.aux)
        return {"dist": loss}
