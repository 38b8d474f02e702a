"""Attention transfer (Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017).

The attention map of a feature is the mean of its squared channels, as a unit vector over the positions of an image.
The published term is a mean over those positions, not the paper's sum, which explains the weight of 10000: elements
of a unit vector shrink with 1 / sqrt(h w), so the term shrinks with 1 / (h w) and its weight grows with the crop.
"""
from __future__ import annotations

from torch import Generator, Tensor

from losses.core import Batch, Distiller, Needs, Term, check_maps, register
from losses.core.feature_losses import attention_map


def at_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over images and positions of the squared difference of the :func:`attention_map`. student [B, C_s, h, w],
    teacher [B, C_t, h, w] (which gets no gradient): of equal sizes, or UserError."""
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
                             "it with the area of the crop)", of_unit_maps="head"),)
    needs = Needs.both("head", same_stride=True)
    # train_scripts of CIRKD (Cityscapes): 10000 is for crops of 512x1024; at 512x512, half the h*w, it weighs twice
    preset = {"*": {"lambda_kd": 1.0, "lambda_at": 10000.0}}

    def forward(self, batch: Batch, generator: Generator | None = None) -> dict[str, Tensor]:
        return {"at": at_loss(batch.student.head, batch.teacher.head)}
