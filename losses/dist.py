"""DIST: correlation instead of equality (Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022).

With Y = softmax over the classes of logits / T, pixels as rows and classes as columns, and the Pearson correlation
rho(a, b) = <a - mean a, b - mean b> / (|a - mean a| |b - mean b| + 1e-8):

    L = T^2 (beta * (1 - mean over rows of rho) + gamma * (1 - mean over columns of rho))

A column runs over the pixels of every image of its group: in the published runs, of the two images of a GPU.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from losses import core
from losses.core import Batch, Distiller, Needs, NetInfo, OptionGroup, RunFacts, mean_over_groups, option, register
from losses.core.needs import both_have_aux


def pearson(a: Tensor, b: Tensor, dim: int | tuple[int, ...], eps: float = 1e-8) -> Tensor:
    """Pearson correlation of two tensors of one shape along ``dim``, which the result lacks; 0 of a constant."""
    a, b = (x - x.mean(dim, keepdim=True) for x in (a, b))
    norms = torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim)
    return (a * b).sum(dim) / (norms + eps)


def dist_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float, beta: float,
              gamma: float, group_size: int = 0) -> Tensor:
    """DIST of two logit maps [B, K, h, w]; every position counts, also where the label is ignored. beta, gamma: weights
    of the relation between the classes of a pixel and of that between the pixels of a class, where the pixels of
    ``group_size`` images go together. Gradients reach the student only. UserError when the shapes differ."""
    core.check_logits("dist", student_logits, teacher_logits)
    y_s, y_t = (torch.softmax(core.at_least_float32(z) / temperature, dim=1)
                for z in (student_logits, teacher_logits.detach()))
    inter = 1 - pearson(y_s, y_t, dim=1).mean()
    intra = 1 - mean_over_groups(lambda s, t: pearson(s, t, dim=(1, 3, 4)).mean(), y_s, y_t, group_size)
    return temperature ** 2 * (beta * inter + gamma * intra)


@dataclass(frozen=True)
class DISTOptions(OptionGroup):
    dist_temperature: float = option(1.0, "softmax temperature", above=0, metavar="T")
    dist_beta: float = option(1.0, "weight of the correlation over the classes of a pixel", at_least=0, metavar="W")
    dist_gamma: float = option(1.0, "weight of the correlation over the pixels of a class", at_least=0, metavar="W")
    dist_aux_weight: float = option(0.4, "share of the auxiliary logits, where both networks have them", at_least=0,
                                    metavar="W")


@register("dist")
class DIST(Distiller):
    """The main logits, and a share of the auxiliary ones where both networks have them."""
    title = "correlations between and within classes"
    paper = "Huang et al., Knowledge Distillation from A Stronger Teacher"
    year = 2022
    Options = DISTOptions
    terms = (core.Term("dist", 0.0, "weight of DIST's correlations (main and auxiliary logits)"),)
    needs = Needs.both("logits", same_classes=True)
    # the authors' Cityscapes scripts: no KD, five times the weight decay of the rows that their table compares with
    preset = {"*": {"lambda_dist": 1.0, "weight_decay": 5e-4, "min_lr": 1e-4}}
    rows = {"*": {"val_per_iters": 400, "save_per_iters": 400}}
    cost = "softmaxes and correlations of the logits"

    def __init__(self, options: DISTOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> None:
        super().__init__()
        self.settings = (options.dist_temperature, options.dist_beta, options.dist_gamma, run.group_size)
        self.aux_weight = options.dist_aux_weight if both_have_aux(student, teacher) else 0.0

    @classmethod
    def requires(cls, options: DISTOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> Needs:
        aux = ("aux",) if options.dist_aux_weight and both_have_aux(student, teacher) else ()
        return Needs.both("logits", *aux, same_classes=True)

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        loss = dist_loss(batch.student.logits, batch.teacher.logits, *self.settings)
        if self.aux_weight:
            loss = loss + self.aux_weight * dist_loss(batch.student.aux, batch.teacher.aux, *self.settings)
        return {"dist": loss}
