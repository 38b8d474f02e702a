"""Plain feature distillation: the mean squared error of aligned feature maps, with a choice of normalisations.

A baseline that is hard to beat: Ali et al. (2026) report that at equal wall-clock time plain logit distillation and
plain feature distillation surpass recent losses made for segmentation. They released no code, so neither weight nor
normalisation are published; ``none`` with a convolution on the head map is what FitNet does.
"""
from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses.distiller import BuildContext, Distiller, Term, register
from losses.task import at_least_float32
from models.output import SegOutput
from utils.errors import UserError

NORMS = ("none", "l2", "channel", "position")
ALIGNERS = ("conv", "conv_bn", "none")
TAPS = ("head", "c4")


def check_maps(method: str, student: Tensor, teacher: Tensor, *, channels: bool = False) -> None:
    """Raise UserError unless two maps [B, C, h, w] agree in B, h and w, and with ``channels`` in C as well."""
    agree = len(student) == len(teacher) and student.shape[-2:] == teacher.shape[-2:]
    if not agree or channels and student.shape[1] != teacher.shape[1]:
        raise UserError(f"{method}: student map {tuple(student.shape)} and teacher map {tuple(teacher.shape)}: "
                        f"expected the same batch, height and width{' and channels' if channels else ''}")


def normalise(x: Tensor, norm: str) -> Tensor:
    """A map [B, C, h, w] on the scale that the error is measured in.

    none: as it is. l2: the C-vector of each position at unit length. channel: each channel of each image with mean 0
    and variance 1 over the positions. position: each position's vector with mean 0 and variance 1 over the channels.
    """
    if norm == "none":
        return x
    if norm == "l2":
        return F.normalize(x, dim=1)
    axes = {"channel": (2, 3), "position": (1,)}[norm]
    variance, mean = torch.var_mean(x, dim=axes, correction=0, keepdim=True)
    return (x - mean) * (variance + 1e-6).rsqrt()


def feature_mse_loss(student: Tensor, teacher: Tensor, norm: str = "none", method: str = "mse") -> Tensor:
    """Mean over images, channels and positions of (n(student) - n(teacher))^2, n = :func:`normalise`.

    student, teacher: [B, C, h, w], of equal shapes, or UserError that begins with ``method``. Computed in float32 or
    better; no gradient reaches the teacher.
    """
    check_maps(method, student, teacher, channels=True)
    student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
    return F.mse_loss(normalise(student, norm), normalise(teacher, norm))


def make_aligner(kind: str, student_channels: int, teacher_channels: int) -> nn.Module:
    """conv: 1x1 convolution without bias; conv_bn: with batch norm; none: nothing, the widths must then be equal."""
    if kind == "none":
        if student_channels != teacher_channels:
            raise UserError(f"--mse-align none: the student's {student_channels} channels are not the teacher's "
                            f"{teacher_channels}; expected conv or conv_bn")
        return nn.Identity()
    conv = nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=False)
    return conv if kind == "conv" else nn.Sequential(conv, nn.BatchNorm2d(teacher_channels))


@register("mse")
class FeatureMSE(Distiller):
    """Head or c4 maps of both networks through :func:`feature_mse_loss`, the student's aligned first."""

    title = "plain feature mean squared error"
    paper = "Ali et al., The Surprising Effectiveness of Canonical Knowledge Distillation for Semantic Segmentation"
    year = 2026
    cost = "one 1x1 conv, the normalisation"
    terms = (Term("mse", 0.0, "weight of the squared error between aligned feature maps"),)
    student_taps = ("head",)
    teacher_taps = ("head",)
    # nothing is published: the weight of CIRKD's FitNet row, alone, as the study compares feature and logit terms
    preset = {"*": {"lambda_mse": 10.0}}

    def __init__(self, student_channels: int, teacher_channels: int, norm: str = "none", tap: str = "head",
                 align: str = "conv") -> None:
        super().__init__()
        for flag, value, known in (("norm", norm, NORMS), ("tap", tap, TAPS), ("align", align, ALIGNERS)):
            if value not in known:
                raise UserError(f"--mse-{flag} {value}: expected one of {', '.join(known)}")
        self.norm, self.tap = norm, tap
        self.student_taps = self.teacher_taps = (tap,)
        self.align = make_aligner(align, student_channels, teacher_channels)

    @classmethod
    def add_arguments(cls, group: argparse._ArgumentGroup) -> None:
        group.add_argument("--mse-norm", choices=NORMS, default="none",
                           help="both maps as they are; unit vectors; standardised per channel; or per position")
        group.add_argument("--mse-tap", choices=TAPS, default="head", help="last feature, or last backbone stage")
        group.add_argument("--mse-align", choices=ALIGNERS, default="conv", help="how the student gets that width")

    @classmethod
    def build(cls, context: BuildContext) -> FeatureMSE:
        """Raises UserError when a network lacks the tap, or the widths differ without an aligner."""
        options = context.options
        tap = getattr(options, "mse_tap", "head")
        for role, net in (("student", context.student), ("teacher", context.teacher)):
            if tap not in net.channels:
                raise UserError(f"--mse-tap {tap}: the {role} {net.name} offers only {', '.join(net.channels)}")
        return cls(context.student.channels[tap], context.teacher.channels[tap], getattr(options, "mse_norm", "none"),
                   tap, getattr(options, "mse_align", "conv"))

    def forward(self, student: SegOutput, teacher: SegOutput, target: Tensor, step: int,
                generator: torch.Generator | None = None) -> dict[str, Tensor]:
        student_map, teacher_map = getattr(student, self.tap), getattr(teacher, self.tap)
        return {"mse": feature_mse_loss(self.align(student_map), teacher_map, self.norm)}
