"""FitNet: the teacher's feature as a hint (Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015)."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from losses.distiller import BuildContext, Distiller, Term, check_taps, register
from losses.feature_mse import feature_mse_loss
from models.output import SegOutput


class CriterionFitNet(nn.Module):
    """Mean squared error of the teacher's map and the student's after a 1x1 convolution without bias.

    The convolution is there also when the widths are equal, as in the CIRKD code.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=False)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Scalar: mean over B, C_t, h, w. student [B, C_s, h, w], teacher [B, C_t, h, w]; UserError if they do not fit.

        The error is computed in float32 or better; no gradient reaches the teacher.
        """
        return feature_mse_loss(self.conv(student), teacher, method="fitnet")


@register("fitnet")
class FitNet(Distiller):
    """The head maps of both networks through :class:`CriterionFitNet`."""

    title = "feature hint through a 1x1 convolution"
    paper = "Romero et al., FitNets: Hints for Thin Deep Nets"
    year = 2015
    cost = "one 1x1 conv"
    terms = (Term("fitnet", 0.0, "weight of FitNet's squared error between the head maps"),)
    student_taps = ("head",)
    teacher_taps = ("head",)
    preset = {"*": {"lambda_kd": 1.0, "lambda_fitnet": 10.0}}  # train_scripts of CIRKD (Cityscapes)

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.criterion = CriterionFitNet(student_channels, teacher_channels)

    @classmethod
    def build(cls, context: BuildContext) -> FitNet:
        """Raises UserError when a network has no head feature."""
        check_taps(cls, context.student, context.teacher)
        return cls(context.student.channels["head"], context.teacher.channels["head"])

    def forward(self, student: SegOutput, teacher: SegOutput, target: Tensor, step: int,
                generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"fitnet": self.criterion(student.head, teacher.head)}
