"""Plain feature distillation: the mean squared error of aligned feature maps, with a choice of normalizations.

Ali et al. (2026) report that at equal wall-clock time plain distillation of logits and of features surpasses recent
losses made for segmentation. They released no code; ``none`` with a convolution on the head map is what FitNet does.
"""
from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor, nn

from losses.core import Batch, Distiller, Needs, NetInfo, OptionGroup, RunFacts, Term, option, register
from losses.core.feature_losses import FEATURE_NORMS, feature_mse_loss
from utils.errors import UserError

ALIGNERS = ("conv", "conv_bn", "none")


def make_aligner(kind: str, student_channels: int, teacher_channels: int) -> nn.Module:
    """conv: 1x1 convolution without bias; conv_bn: with batch norm; none: nothing, the widths must then be equal."""
    if kind == "none":
        if student_channels != teacher_channels:
            raise UserError(f"mse without alignment: the student's {student_channels} channels are not the teacher's "
                            f"{teacher_channels}; expected conv or conv_bn", settings=["mse_align"])
        return nn.Identity()
    conv = nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=False)
    return conv if kind == "conv" else nn.Sequential(conv, nn.BatchNorm2d(teacher_channels))


@dataclass(frozen=True)
class FeatureMSEOptions(OptionGroup):
    mse_norm: str = option("none", "both maps as they are; unit vectors; standardised per channel; or per position",
                           choices=FEATURE_NORMS)
    mse_tap: str = option("head", "last feature, or last backbone stage", choices=("head", "c4"))
    mse_align: str = option("conv", "how the student gets that width", choices=ALIGNERS)


@register("mse")
class FeatureMSE(Distiller):
    """Head or c4 maps of both networks through :func:`feature_mse_loss`, the student's aligned first."""
    title = "plain feature mean squared error"
    paper = "Ali et al., The Surprising Effectiveness of Canonical Knowledge Distillation for Semantic Segmentation"
    year = 2026
    cost = "one 1x1 conv, the normalisation"
    Options = FeatureMSEOptions
    terms = (Term("mse", 0.0, "weight of the squared error between aligned feature maps"),)
    needs = Needs.both("head", same_stride=True)
    preset = {"*": {"lambda_mse": 10.0}}  # unpublished: that of CIRKD's FitNet row, alone as in the study

    def __init__(self, options: FeatureMSEOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> None:
        super().__init__()
        self.norm, self.tap = options.mse_norm, options.mse_tap
        self.align = make_aligner(options.mse_align, student.channels[self.tap], teacher.channels[self.tap])

    @classmethod
    def requires(cls, options: FeatureMSEOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> Needs:
        return Needs.both(options.mse_tap, same_stride=True, tap_settings=("mse_tap",))

    def forward(self, batch: Batch, generator: Generator | None = None) -> dict[str, Tensor]:
        student, teacher = getattr(batch.student, self.tap), getattr(batch.teacher, self.tap)
        return {"mse": feature_mse_loss(self.align(student), teacher, self.norm)}
