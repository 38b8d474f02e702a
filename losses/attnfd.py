"""AttnFD: attention-guided feature distillation (Mansourian et al., WACV 2026 workshop).

A convolutional block attention module (CBAM) refines a feature map F [B, C, h, w]:

    A = F * sigmoid(mlp(mean over positions) + mlp(max over positions)),   then   A * sigmoid(BN(conv7x7([max, mean])))

with max and mean over the channels in the second step. The loss compares the refined maps of both networks, the
student's after a 1x1 convolution and batch norm, each divided by its Frobenius norm over a group of N images:

    L = sum over the maps of  1/N |A_S / |A_S| - A_T / |A_T||^2

Kept from the released code: the teacher's CBAM is random, is never trained and normalises by the batch.
Not kept: there the teacher itself ran in train mode and with gradients, and the convolutions towards the teacher's
width were trained in the first epoch only, by an optimizer of their own with ten times the learning rate.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses.dist import mean_over_groups
from losses.distiller import BuildContext, Distiller, Term, check_taps, register
from losses.feature_mse import check_maps
from losses.task import at_least_float32
from models.output import SegOutput
from utils.errors import UserError

TAPS = ("c4", "head")


class CBAM(nn.Module):
    """Channel attention, then spatial attention, multiplied into a map [B, C, h, w].

    channels: C. reduction: C over the width of the channel attention's hidden layer.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        self.conv = nn.Conv2d(2, 1, kernel_size=7, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(1, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """The refined map, [B, C, h, w]."""
        scores = self.mlp(x.mean(dim=(2, 3))) + self.mlp(x.amax(dim=(2, 3)))
        x = x * scores.sigmoid()[:, :, None, None]
        summary = torch.cat([x.amax(dim=1, keepdim=True), x.mean(dim=1, keepdim=True)], dim=1)
        return x * self.bn(self.conv(summary)).sigmoid()


def connector(student_channels: int, teacher_channels: int) -> nn.Sequential:
    """1x1 convolution and batch norm, [B, C_s, h, w] -> [B, C_t, h, w]."""
    return nn.Sequential(nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=False),
                         nn.BatchNorm2d(teacher_channels))


def attnfd_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], group_size: int = 0) -> Tensor:
    """Sum over the maps of the squared distance between student and teacher at unit length, per image.

    student, teacher: maps [B, C, h, w], pairwise of one shape. group_size: images whose maps share a length (0 = all).
    A map of zeros has length 1. Gradients reach the student only. Raises UserError when the shapes differ.
    """
    def distance(s: Tensor, t: Tensor) -> Tensor:  # [groups, images, C, h, w]
        images = s.shape[1]
        s, t = (F.normalize(x.flatten(1), dim=1) for x in (s, t))
        return (s - t).square().sum(dim=1).mean() / images

    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        check_maps("attnfd", ours, theirs, channels=True)
        ours, theirs = at_least_float32(ours), at_least_float32(theirs.detach())
        total = total + mean_over_groups(distance, ours, theirs, group_size)
    return total


@register("attnfd")
class AttnFD(Distiller):
    """The last backbone stage and the last feature before the classifier (``head``: a 3x3 block after ASPP or pyramid
    pooling, whose own output the released code takes) of both networks.

    student, teacher: (c4, head) channel counts. group_size: as in :func:`attnfd_loss`.
    """

    title = "attention-guided feature distillation"
    paper = "Mansourian et al., Attention-guided Feature Distillation for Semantic Segmentation"
    year = 2024
    terms = (Term("attnfd", 0.0, "weight of AttnFD's attention-refined features"),)
    student_taps = TAPS
    teacher_taps = TAPS
    # the authors' DeepLabV3+ runs: weight 2, no KD, and a weight decay of 5e-4. They had 6 images per process, and the
    # term is divided by the images of a group: with --group-size 2 (the default) the same weight is about three times
    # as strong, and --group-size 6 on one process gives the published scale
    preset = {"*": {"lambda_attnfd": 2.0, "weight_decay": 5e-4}}
    cost = "attention on c4 and head of both networks, one 1x1 conv each"

    def __init__(self, student: Sequence[int], teacher: Sequence[int], group_size: int = 0) -> None:
        super().__init__()
        self.group_size = group_size
        self.student_attention = nn.ModuleList(map(CBAM, student))
        self.teacher_attention = nn.ModuleList(map(CBAM, teacher)).requires_grad_(False)
        self.connectors = nn.ModuleList(map(connector, student, teacher))

    @classmethod
    def build(cls, context: BuildContext) -> AttnFD:
        """Raises UserError when a network lacks c4 or head, or the strides differ."""
        check_taps(cls, context.student, context.teacher)
        if context.student.stride != context.teacher.stride:
            raise UserError(f"method 'attnfd': output stride {context.student.stride} of {context.student.name} and "
                            f"{context.teacher.stride} of {context.teacher.name}: expected equal numbers")
        widths = ([net.channels[tap] for tap in TAPS] for net in (context.student, context.teacher))
        return cls(*widths, getattr(context.options, "group_size", 2))

    def forward(self, student: SegOutput, teacher: SegOutput, target: Tensor, step: int,
                generator: torch.Generator | None = None) -> dict[str, Tensor]:
        with torch.no_grad():
            theirs = [refine(getattr(teacher, tap)) for tap, refine in zip(TAPS, self.teacher_attention, strict=True)]
        ours = [connect(refine(getattr(student, tap))) for tap, refine, connect
                in zip(TAPS, self.student_attention, self.connectors, strict=True)]
        return {"attnfd": attnfd_loss(ours, theirs, self.group_size)}
