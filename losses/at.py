"""Attention transfer (Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017).

The attention map of a feature is the mean of its squared channels, as a unit vector over the positions of an image.
The published term is a mean over those positions, not the paper's sum, which explains the weight of 10000: elements
of a unit vector shrink with 1 / sqrt(h w), so the term shrinks with 1 / (h w). A weight that fits crops of 512x1024
(64x128 positions) has to be scaled by the ratio of the areas for other crops.
"""
from __future__ import annotations

import torch
from torch import Tensor

from losses.distiller import BuildContext, Distiller, Term, check_taps, register
from losses.feature_mse import check_maps
from losses.task import at_least_float32
from models.output import SegOutput


def unit(x: Tensor) -> Tensor:
    """Vectors along the last axis at unit length; zero where the length is below 1e-12, with a zero gradient there."""
    norm = x.norm(dim=-1, keepdim=True)
    zero = norm <= 1e-12
    return x * norm.masked_fill(zero, 1.0).reciprocal().masked_fill(zero, 0.0)


def attention_map(feature: Tensor) -> Tensor:
    """Unit vectors [B, h w]: mean over the channels of the squares of [B, C, h, w]. In float32 or better: squares of
    half-precision features overflow."""
    return unit(at_least_float32(feature).square().mean(dim=1).flatten(1))


def at_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over images and positions of the squared difference of the :func:`attention_map`.

    student [B, C_s, h, w], teacher [B, C_t, h, w]: the channels are free, the sizes equal, or UserError. No gradient
    reaches the teacher.
    """
    check_maps("at", student, teacher)
    return (attention_map(student) - attention_map(teacher.detach())).square().mean()


@register("at")
class AT(Distiller):
    """The head maps of both networks through :func:`at_loss`."""

    title = "attention transfer"
    paper = "Zagoruyko and Komodakis, Paying More Attention to Attention"
    year = 2017
    cost = "squares of the head features"
    terms = (Term("at", 0.0, "weight of attention transfer (a mean over h*w unit-vector elements, hence large; scale "
                             "it with the area of the crop)"),)
    student_taps = ("head",)
    teacher_taps = ("head",)
    # train_scripts of CIRKD (Cityscapes): 10000 is for crops of 512x1024; at 512x512, half the h*w, it weighs twice
    preset = {"*": {"lambda_kd": 1.0, "lambda_at": 10000.0}}

    @classmethod
    def build(cls, context: BuildContext) -> AT:
        """Raises UserError when a network has no head feature."""
        check_taps(cls, context.student, context.teacher)
        return cls()

    def forward(self, student: SegOutput, teacher: SegOutput, target: Tensor, step: int,
                generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"at": at_loss(student.head, teacher.head)}
