"""LSKD: logits standardized before they are compared (Sun et al., "Logit Standardization in Knowledge Distillation",
CVPR 2024), here per pixel.

z -> (z - mean) / (unbiased std + 1e-7) over the classes, with gradients through all three; then plain distillation.
"""
from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from losses.core import Batch, Distiller, Needs, NetInfo, OptionGroup, RunFacts, Term, option, register
from losses.core.checks import at_least_float32
from losses.core.logit_losses import kd_loss


def standardize_logits(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """(z - mean) / (std + eps) over the classes of [B, K, h, w], K >= 2, in float32 or better."""
    logits = at_least_float32(logits)
    return (logits - logits.mean(dim=1, keepdim=True)) / (logits.std(dim=1, keepdim=True) + eps)


def lskd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """``core.kd_loss`` of standardized logits [B, K, h, w]; UserError when the shapes differ."""
    return kd_loss(standardize_logits(student_logits), standardize_logits(teacher_logits.detach()), temperature, "lskd")


@dataclass(frozen=True)
class LSKDOptions(OptionGroup):
    lskd_temperature: float = option(2.0, "softmax temperature of the standardised logits", above=0, metavar="T")


@register("lskd")
class LSKD(Distiller):
    """The main logits of student and teacher, standardized, at stride 8."""
    title = "logit distillation after standardisation"
    paper = "Sun et al., Logit Standardization in Knowledge Distillation"
    year = 2024
    Options = LSKDOptions
    terms = (Term("lskd", 0.0, "weight of the KL divergence between standardised logits"),)
    needs = Needs.both("logits", same_classes=True, least_classes=2)
    preset = {"*": {"lambda_lskd": 9.0}}  # the authors' for image classification; none published for segmentation
    cost = "two softmaxes of the logits"

    def __init__(self, options: LSKDOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> None:
        super().__init__()
        self.temperature = options.lskd_temperature

    def forward(self, batch: Batch, generator: Generator | None = None) -> dict[str, Tensor]:
        return {"lskd": lskd_loss(batch.student.logits, batch.teacher.logits, self.temperature)}
