"""Pixel-wise distillation of the logits (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015)."""
from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses.distiller import BuildContext, Distiller, Term, register
from losses.logits import check_logit_maps
from losses.task import at_least_float32
from models.output import SegOutput
from utils.cli import number
from utils.errors import UserError


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 times the KL divergence of the student from the teacher, summed over classes, averaged over positions.

    Both logits [B, K, h, w] at the networks' stride: every position counts, also where the label is ignored. No
    gradient reaches the teacher. Raises UserError when the shapes differ.
    """
    check_logit_maps("kd", student_logits, teacher_logits)
    batch, _, height, width = student_logits.shape
    log_q = F.log_softmax(at_least_float32(student_logits) / temperature, dim=1)
    log_p = F.log_softmax(at_least_float32(teacher_logits.detach()) / temperature, dim=1)
    divergence = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return divergence * (temperature ** 2 / (batch * height * width))


class CriterionKD(nn.Module):
    """:func:`kd_loss` with a fixed temperature."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise UserError(f"--kd-temperature {temperature:g}: expected a number above 0")
        self.temperature = temperature

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Scalar of two logit maps [B, K, h, w]."""
        return kd_loss(student_logits, teacher_logits, self.temperature)


@register("kd")
class KD(Distiller):
    """The main logits of student and teacher, compared at stride 8."""

    title = "pixel-wise logit distillation"
    paper = "Hinton et al., Distilling the Knowledge in a Neural Network"
    year = 2015
    terms = (Term("kd", 1.0, "weight of the KL divergence between the logits"),)
    student_taps = ("logits",)
    teacher_taps = ("logits",)
    # no script for KD alone was released: 1 is the row "KD" of CIRKD's tables; 0.5, on these two sets, is the weight of
    # KD inside Af-DCD
    preset = {"*": {"lambda_kd": 1.0}, "ade20k": {"lambda_kd": 0.5}, "coco_stuff_164k": {"lambda_kd": 0.5}}
    cost = "two softmaxes of the logits"

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.criterion = CriterionKD(temperature)

    @classmethod
    def add_arguments(cls, group: argparse._ArgumentGroup) -> None:
        group.add_argument("--kd-temperature", type=number(float, 0, open_low=True), default=1.0, metavar="T",
                           help="softmax temperature of the logits")

    @classmethod
    def build(cls, context: BuildContext) -> KD:
        return cls(getattr(context.options, "kd_temperature", 1.0))

    def forward(self, student: SegOutput, teacher: SegOutput, target: Tensor, step: int,
                generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"kd": self.criterion(student.logits, teacher.logits)}
