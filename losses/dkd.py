"""DKD: the divergence of the logits taken apart (Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022), here per
labelled pixel.

    L = T^2 (alpha * KL((p_y, 1 - p_y) of teacher || student) + beta * KL(teacher || student over the other classes))

with y the label and the second divergence between the distributions of the classes other than y.
"""
from __future__ import annotations

import argparse

import torch
from torch import Tensor
from torch.nn import functional as F

from losses.distiller import BuildContext, Distiller, Term, register
from losses.logits import check_logit_maps, check_logit_nets, labels_at
from losses.task import at_least_float32, image_weights
from models.output import SegOutput
from utils.cli import number


def _decouple(logits: Tensor, index: Tensor, is_label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log p_y [B, 1, h, w], log(1 - p_y) [B, 1, h, w], log of the distribution over the others [B, K, h, w])."""
    log_p = F.log_softmax(logits, dim=1)
    others = log_p.masked_fill(is_label, float("-inf"))
    return log_p.gather(1, index), others.logsumexp(dim=1, keepdim=True), F.log_softmax(others, dim=1)


def dkd_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, alpha: float = 1.0, beta: float = 8.0,
             temperature: float = 1.0, ignore_label: int = -1, group_size: int = 0) -> Tensor:
    """DKD of two logit maps [B, K, h, w], K >= 2, averaged over the labelled positions of groups of images (0 = all).

    target: integers [B, H, W], brought to logit size by nearest neighbour; negative labels and ``ignore_label`` do not
    count, and without any label the loss is 0. Gradients reach the student only. Raises UserError when the logits'
    shapes differ.
    """
    check_logit_maps("dkd", student_logits, teacher_logits)
    label = labels_at(target, student_logits.shape[-2:])[:, None]
    counts = (label >= 0) & (label != ignore_label)
    index = label.masked_fill(~counts, 0)
    classes = torch.arange(student_logits.shape[1], device=index.device)[:, None, None]
    is_label = index == classes
    scaled = (at_least_float32(z) / temperature for z in (student_logits, teacher_logits.detach()))
    (s_y, s_rest, s_others), (t_y, t_rest, t_others) = (_decouple(z, index, is_label) for z in scaled)
    of_label = t_y.exp() * (t_y - s_y) + t_rest.exp() * (t_rest - s_rest)
    # at the label both logarithms are -inf
    of_others = (t_others.exp() * (t_others - s_others).masked_fill(is_label, 0)).sum(dim=1, keepdim=True)
    per_pixel = (alpha * of_label + beta * of_others) * counts
    weights = image_weights(counts.sum((1, 2, 3)), group_size, per_pixel.dtype)
    return (per_pixel.sum((1, 2, 3)) * weights).sum() * temperature ** 2


@register("dkd")
class DKD(Distiller):
    """The main logits of student and teacher and the labels, at stride 8."""

    title = "decoupled logit distillation"
    paper = "Zhao et al., Decoupled Knowledge Distillation"
    year = 2022
    terms = (Term("dkd", 0.0, "weight of the decoupled KL divergence of labelled pixels"),)
    student_taps = ("logits",)
    teacher_taps = ("logits",)
    # settings in use on ImageNet (alpha 1, beta 0.5, temperature 1, weight 1); none published for segmentation
    preset = {"*": {"lambda_dkd": 1.0}}
    cost = "four softmaxes of the logits"

    def __init__(self, alpha: float = 1.0, beta: float = 0.5, temperature: float = 1.0,
                 ignore_label: int = -1, group_size: int = 0) -> None:
        super().__init__()
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        self.ignore_label, self.group_size = ignore_label, group_size

    @classmethod
    def add_arguments(cls, group: argparse._ArgumentGroup) -> None:
        group.add_argument("--dkd-alpha", type=number(float, 0), default=1.0, metavar="W",
                           help="weight of the divergence of the label's class against all others")
        group.add_argument("--dkd-beta", type=number(float, 0), default=0.5, metavar="W",
                           help="weight of the divergence among the other classes (8 is usual on CIFAR)")
        group.add_argument("--dkd-temperature", type=number(float, 0, open_low=True), default=1.0, metavar="T",
                           help="softmax temperature of the logits")

    @classmethod
    def build(cls, context: BuildContext) -> DKD:
        """Raises UserError when classes or strides differ, or there is only one class."""
        check_logit_nets(cls, context, least_classes=2)
        o = context.options
        return cls(getattr(o, "dkd_alpha", 1.0), getattr(o, "dkd_beta", 0.5), getattr(o, "dkd_temperature", 1.0),
                   context.ignore_label, getattr(o, "group_size", 2))

    def forward(self, student: SegOutput, teacher: SegOutput, target: Tensor, step: int,
                generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"dkd": dkd_loss(student.logits, teacher.logits, target, self.alpha, self.beta, self.temperature,
                                self.ignore_label, self.group_size)}
