"""PKD: features compared after standardization (Cao et al., "PKD: General Distillation Framework for Object Detectors
via Pearson Correlation Coefficient", NeurIPS 2022).

Each channel of either map is brought to mean 0 and variance 1 over the positions of a group of images; the loss is
half the mean squared difference, about 1 - the Pearson correlation. Scale and offset of the teacher do not matter.
"""
from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor
from torch.nn import functional as F

from losses import core
from losses.core import Batch, Distiller, Needs, NetInfo, OptionGroup, RunFacts, option, register
from losses.core.feature_losses import aligner
from utils.errors import UserError


def standardize_channels(feature: Tensor, eps: float = 1e-6) -> Tensor:
    """(x - mean) / (unbiased std + eps) of each channel of [groups, images, C, h, w]; 0 where it has one position."""
    dim, positions = (1, 3, 4), feature.shape[1] * feature.shape[3] * feature.shape[4]
    std = feature.std(dim, correction=min(1, positions - 1), keepdim=True)
    return (feature - feature.mean(dim, keepdim=True)) / (std + eps)


def pkd_loss(student: Tensor, teacher: Tensor, group_size: int = 0) -> Tensor:
    """PKD of student [B, C, h, w], resized bilinearly when the sizes differ, and teacher [B, C, H, W] (no gradient).
    group_size: images whose positions share their statistics (0 = all). UserError when batch or channels differ."""
    if student.shape[:2] != teacher.shape[:2]:
        raise UserError(f"pkd: student map {tuple(student.shape)} and teacher map {tuple(teacher.shape)}: expected "
                        "equal batch and channels")
    student, teacher = core.at_least_float32(student), core.at_least_float32(teacher.detach())
    if student.shape != teacher.shape:
        student = F.interpolate(student, size=teacher.shape[-2:], mode="bilinear", align_corners=False)
    return core.mean_over_groups(lambda s, t: (standardize_channels(s) - standardize_channels(t)).square().mean() / 2,
                                 student, teacher, group_size)


@dataclass(frozen=True)
class PKDOptions(OptionGroup):
    pkd_tap: str = option("head", "feature: the last before the classifier, or of the backbone", choices=("head", "c4"))


@register("pkd")
class PKD(Distiller):
    """One feature map of each network; a trained 1x1 convolution brings the student to the teacher's width."""
    title = "Pearson correlation of features"
    paper = "Cao et al., PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient"
    year = 2022
    Options = PKDOptions
    terms = (core.Term("pkd", 0.0, "weight of PKD's standardised features"),)
    needs = Needs.both("head")
    preset = {"*": {"lambda_pkd": 6.0}}  # of the published detectors (per pyramid level); none for segmentation
    cost = "one 1x1 conv where widths differ, channel statistics"

    def __init__(self, options: PKDOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> None:
        super().__init__()
        self.tap, self.group_size = options.pkd_tap, run.group_size
        self.align = aligner(student.channels[self.tap], teacher.channels[self.tap])

    @classmethod
    def requires(cls, options: PKDOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> Needs:
        return Needs.both(options.pkd_tap, tap_settings=("pkd_tap",))

    def forward(self, batch: Batch, generator: Generator | None = None) -> dict[str, Tensor]:
        aligned = self.align(getattr(batch.student, self.tap))
        return {"pkd": pkd_loss(aligned, getattr(batch.teacher, self.tap), self.group_size)}
