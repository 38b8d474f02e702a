"""DKD: the divergence of the logits taken apart (Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022), here per
labeled pixel, with y its label.

    L = T^2 (alpha * KL((p_y, 1 - p_y) of teacher || student) + beta * KL(teacher || student over the other classes))
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from losses import core
from losses.core import Batch, Distiller, Needs, NetInfo, OptionGroup, RunFacts, option, register


def _decouple(logits: Tensor, index: Tensor, is_label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log p_y [B, 1, h, w], log(1 - p_y) [B, 1, h, w], log of the distribution over the others [B, K, h, w])."""
    log_p = F.log_softmax(logits, dim=1)
    others = log_p.masked_fill(is_label, float("-inf"))
    return log_p.gather(1, index), others.logsumexp(dim=1, keepdim=True), F.log_softmax(others, dim=1)


def dkd_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, alpha: float, beta: float,
             temperature: float = 1.0, ignore_label: int = -1, group_size: int = 0) -> Tensor:
    """DKD of two logit maps [B, K, h, w], K >= 2, averaged over the labeled positions of groups of images (0 = all).
    target: integers [B, H, W], resized by nearest neighbor; negative labels and ``ignore_label`` do not count, without
    any label the loss is 0. Gradients reach the student only. UserError when the shapes differ."""
    core.check_logits("dkd", student_logits, teacher_logits)
    label = core.labels_at(target, student_logits.shape[-2:])[:, None]
    counts = (label >= 0) & (label != ignore_label)
    index = label.masked_fill(~counts, 0)
    is_label = index == torch.arange(student_logits.shape[1], device=index.device)[:, None, None]
    scaled = (core.at_least_float32(z) / temperature for z in (student_logits, teacher_logits.detach()))
    (s_y, s_rest, s_others), (t_y, t_rest, t_others) = (_decouple(z, index, is_label) for z in scaled)
    of_label = t_y.exp() * (t_y - s_y) + t_rest.exp() * (t_rest - s_rest)
    # at the label both logarithms are -inf
    of_others = (t_others.exp() * (t_others - s_others).masked_fill(is_label, 0)).sum(dim=1, keepdim=True)
    per_pixel = (alpha * of_label + beta * of_others) * counts
    weights = core.image_weights(counts.sum((1, 2, 3)), group_size, per_pixel.dtype)
    return (per_pixel.sum((1, 2, 3)) * weights).sum() * temperature ** 2


@dataclass(frozen=True)
class DKDOptions(OptionGroup):
    dkd_alpha: float = option(1.0, "weight of the divergence of the label's class against all others", at_least=0,
                              metavar="W")
    dkd_beta: float = option(0.5, "weight of the divergence among the other classes (8 is usual on CIFAR)", at_least=0,
                             metavar="W")
    dkd_temperature: float = option(1.0, "softmax temperature of the logits", above=0, metavar="T")


@register("dkd")
class DKD(Distiller):
    """The main logits of student and teacher and the labels, at stride 8."""
    title = "decoupled logit distillation"
    paper = "Zhao et al., Decoupled Knowledge Distillation"
    year = 2022
    Options = DKDOptions
    terms = (core.Term("dkd", 0.0, "weight of the decoupled KL divergence of labelled pixels", needs_labels=True),)
    needs = Needs.both("logits", same_classes=True, least_classes=2)
    preset = {"*": {"lambda_dkd": 1.0}}  # as the defaults of the options: of ImageNet; none published for segmentation
    cost = "four softmaxes of the logits"

    def __init__(self, options: DKDOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> None:
        super().__init__()
        self.settings = (options.dkd_alpha, options.dkd_beta, options.dkd_temperature, run.ignore_label, run.group_size)

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"dkd": dkd_loss(batch.student.logits, batch.teacher.logits, batch.target, *self.settings)}
