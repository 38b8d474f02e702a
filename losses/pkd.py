"""PKD: features compared after standardisation (Cao et al., "PKD: General Distillation Framework for Object Detectors
via Pearson Correlation Coefficient", NeurIPS 2022).

Each channel of either map is brought to mean 0 and variance 1 over the positions of a group of images; the loss is
half the mean squared difference, about 1 - the Pearson correlation of the channels. Scale and offset of the teacher's
features do not matter, which suits pairs of different architectures.
"""
from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses.dist import mean_over_groups
from losses.distiller import BuildContext, Distiller, Term, check_taps, register
from losses.task import at_least_float32
from models.output import SegOutput
from utils.errors import UserError

TAPS = ("head", "c4")


def standardise_channels(feature: Tensor, eps: float = 1e-6) -> Tensor:
    """(x - mean) / (std + eps) of every channel of [groups, images, C, h, w], over the images and positions.

    The standard deviation is the unbiased one; a group of a single position gives 0.
    """
    count = feature.shape[1] * feature.shape[3] * feature.shape[4]
    dim = (1, 3, 4)
    std = feature.std(dim, correction=min(1, count - 1), keepdim=True)
    return (feature - feature.mean(dim, keepdim=True)) / (std + eps)


def pkd_loss(student: Tensor, teacher: Tensor, group_size: int = 0) -> Tensor:
    """PKD of student [B, C, h, w] and teacher [B, C, H, W]; the student is resized bilinearly when the sizes differ.

    group_size: images whose positions share their statistics (0 = all). Gradients reach the student only. Raises
    UserError when batch or channels differ.
    """
    if student.shape[:2] != teacher.shape[:2]:
        raise UserError(f"pkd: student map {tuple(student.shape)} and teacher map {tuple(teacher.shape)}: expected "
                        "equal batch and channels")
    student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
    if student.shape != teacher.shape:
        student = F.interpolate(student, size=teacher.shape[-2:], mode="bilinear", align_corners=False)

    def difference(s: Tensor, t: Tensor) -> Tensor:
        return (standardise_channels(s) - standardise_channels(t)).square().mean() / 2

    return mean_over_groups(difference, student, teacher, group_size)


@register("pkd")
class PKD(Distiller):
    """One feature map of each network; a trained 1x1 convolution brings the student to the teacher's width."""

    title = "Pearson correlation of features"
    paper = "Cao et al., PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient"
    year = 2022
    terms = (Term("pkd", 0.0, "weight of PKD's standardised features"),)
    student_taps = ("head",)
    teacher_taps = ("head",)
    # the weight of the published detectors (per pyramid level); nobody published one for segmentation
    preset = {"*": {"lambda_pkd": 6.0}}
    cost = "one 1x1 conv where widths differ, channel statistics"

    def __init__(self, tap: str = "head", align: nn.Module | None = None, group_size: int = 0) -> None:
        super().__init__()
        if tap not in TAPS:
            raise UserError(f"--pkd-tap {tap}: expected one of {', '.join(TAPS)}")
        self.tap, self.group_size = tap, group_size
        self.student_taps = self.teacher_taps = (tap,)
        self.align = nn.Identity() if align is None else align

    @classmethod
    def add_arguments(cls, group: argparse._ArgumentGroup) -> None:
        group.add_argument("--pkd-tap", choices=TAPS, default="head",
                           help="feature: the last before the classifier, or of the backbone")

    @classmethod
    def build(cls, context: BuildContext) -> PKD:
        """Raises UserError when a network lacks the tap."""
        method = cls(getattr(context.options, "pkd_tap", "head"), None, getattr(context.options, "group_size", 2))
        check_taps(method, context.student, context.teacher)
        ours, theirs = (net.channels[method.tap] for net in (context.student, context.teacher))
        if ours != theirs:
            method.align = nn.Conv2d(ours, theirs, kernel_size=1)
        return method

    def forward(self, student: SegOutput, teacher: SegOutput, target: Tensor, step: int,
                generator: torch.Generator | None = None) -> dict[str, Tensor]:
        aligned = self.align(getattr(student, self.tap))
        return {"pkd": pkd_loss(aligned, getattr(teacher, self.tap), self.group_size)}
