"""LSKD: logits standardised before they are compared (Sun et al., "Logit Standardization in Knowledge Distillation",
CVPR 2024), here per pixel.

z -> (z - mean over classes) / (std over classes + 1e-7), unbiased, for both networks; then plain logit distillation.
Gradients flow through the student's mean and standard deviation.
"""
from __future__ import annotations

import argparse

import torch
from torch import Tensor

from losses.distiller import BuildContext, Distiller, Term, register
from losses.kd import kd_loss
from losses.logits import check_logit_maps, check_logit_nets
from losses.task import at_least_float32
from models.output import SegOutput
from utils.cli import number


def standardise_logits(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """(z - mean) / (std + eps) over the classes of [B, K, h, w], K >= 2, in float32 or better."""
    logits = at_least_float32(logits)
    return (logits - logits.mean(dim=1, keepdim=True)) / (logits.std(dim=1, keepdim=True) + eps)


def lskd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0) -> Tensor:
    """:func:`losses.kd.kd_loss` of standardised logits [B, K, h, w]; every position counts.

    Gradients reach the student only. Raises UserError when the shapes differ.
    """
    check_logit_maps("lskd", student_logits, teacher_logits)
    return kd_loss(standardise_logits(student_logits), standardise_logits(teacher_logits.detach()), temperature)


@register("lskd")
class LSKD(Distiller):
    """The main logits of student and teacher, standardised, at stride 8."""

    title = "logit distillation after standardisation"
    paper = "Sun et al., Logit Standardization in Knowledge Distillation"
    year = 2024
    terms = (Term("lskd", 0.0, "weight of the KL divergence between standardised logits"),)
    student_taps = ("logits",)
    teacher_taps = ("logits",)
    # the authors' commands for image classification (base temperature 2, weight 9); none published for segmentation
    preset = {"*": {"lambda_lskd": 9.0}}
    cost = "two softmaxes of the logits"

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        self.temperature = temperature

    @classmethod
    def add_arguments(cls, group: argparse._ArgumentGroup) -> None:
        group.add_argument("--lskd-temperature", type=number(float, 0, open_low=True), default=2.0, metavar="T",
                           help="softmax temperature of the standardised logits")

    @classmethod
    def build(cls, context: BuildContext) -> LSKD:
        """Raises UserError when classes or strides differ, or there is only one class."""
        check_logit_nets(cls, context, least_classes=2)
        return cls(getattr(context.options, "lskd_temperature", 2.0))

    def forward(self, student: SegOutput, teacher: SegOutput, target: Tensor, step: int,
                generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"lskd": lskd_loss(student.logits, teacher.logits, self.temperature)}
