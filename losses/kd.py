"""Pixel-wise distillation of the logits (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015)."""
from __future__ import annotations

from torch import Generator, Tensor, nn

from losses.core import Batch, Distiller, Needs, NetInfo, RunFacts, Term, register
from losses.core.logit_losses import KDOptions, kd_loss
from utils.errors import UserError


class CriterionKD(nn.Module):
    """:func:`kd_loss` with a fixed temperature."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise UserError(f"kd: temperature {temperature:g}: expected a number above 0", settings=["kd_temperature"])
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
    Options = KDOptions
    terms = (Term("kd", 1.0, "weight of the KL divergence between the logits"),)
    needs = Needs.both("logits", same_classes=True)
    # no script for KD alone was released: 1 is the row "KD" of CIRKD's tables; 0.5 is the weight of KD inside Af-DCD
    preset = {"*": {"lambda_kd": 1.0}, "ade20k": {"lambda_kd": 0.5}, "coco_stuff_164k": {"lambda_kd": 0.5}}
    cost = "two softmaxes of the logits"

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.criterion = CriterionKD(temperature)

    @classmethod
    def build(cls, options: KDOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> KD:
        return cls(options.kd_temperature)

    def forward(self, batch: Batch, generator: Generator | None = None) -> dict[str, Tensor]:
        return {"kd": self.criterion(batch.student.logits, batch.teacher.logits)}
