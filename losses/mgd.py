"""MGD: the student restores the teacher's features from a part of its own (Yang et al., "Masked Generative
Distillation", ECCV 2022).

    L = mean over images of the sum over C, h, w of (G(K * align(f_S)) - f_T)^2

align: 1x1 convolution, only where the widths differ. K: 0 at a random share of the positions, else 1. G: 3x3
convolution, ReLU, 3x3 convolution at the teacher's width. Generator and alignment are trained and then dropped. The
published alpha (2e-5) is the weight of the term. Af-DCD's feature mimicking is the same loss.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from losses.core import Batch, Distiller, Needs, NetInfo, OptionGroup, RunFacts, Term, option, register
from losses.core.feature_losses import (
    PlainProjector,
    aligner,
    check_widths,
    masked_feature_loss,
    random_keep_mask,
    restore,
)
from losses.kernels.masked_error import error_and_pool


class MaskedGeneration(nn.Module):
    """Alignment, random mask, generator and squared error for maps of given widths. mask_ratio: share of the positions
    that the mask zeroes, the same ones in every channel. fast: the alignment folded into the generator where that pays,
    and less memory; off: the plain forms."""

    def __init__(self, student_channels: int, teacher_channels: int, mask_ratio: float, fast: bool = True) -> None:
        super().__init__()
        self.widths, self.mask_ratio, self.fast = (student_channels, teacher_channels), mask_ratio, fast
        self.align = aligner(student_channels, teacher_channels)
        self.generation = PlainProjector(teacher_channels)

    def forward(self, student: Tensor, teacher: Tensor, *, keep: Tensor | None = None,
                generator: torch.Generator | None = None) -> Tensor:
        """Scalar of student [B, C_s, H, W] and teacher [B, C_t, H, W] (no gradient); UserError when they do not fit.
        keep: [B, 1, H, W], non-zero where a position is kept; default: from ``generator`` (on the maps' device)."""
        check_widths("mgd", student, teacher, self.widths)
        if keep is None:
            draw = torch.rand((len(student), 1, *student.shape[-2:]), generator=generator, device=student.device)
            keep = random_keep_mask(draw, self.mask_ratio)
        restored = restore(student, keep, self.align, self.generation, self.fast)
        if self.fast:
            return error_and_pool(restored, teacher.detach())[0]
        return masked_feature_loss(restored, teacher.detach())


@dataclass(frozen=True)
class MGDOptions(OptionGroup):
    mgd_mask_ratio: float = option(0.75, "share of the positions that the random mask zeroes", at_least=0, at_most=1,
                                   metavar="R")


@register("mgd")
class MGD(Distiller):
    """The c4 maps of both networks through :class:`MaskedGeneration`."""
    title = "masked generative distillation"
    paper = "Yang et al., Masked Generative Distillation"
    year = 2022
    Options = MGDOptions
    terms = (Term("mgd", 0.0, "weight of MGD's restored features (a sum over C*h*w, hence tiny; 2e-5 is for "
                              "crops of 512x512)", sum_over="c4"),)
    needs = Needs.both("c4", same_stride=True)
    # the authors' Cityscapes configurations, for crops of 512x512; a sum over C*h*w is twice as strong at 512x1024
    preset = {"*": {"lambda_mgd": 2e-5, "lambda_cwd_logit": 3.0}}
    published_crop = {"*": (512, 512)}
    cost = "two 3x3 convs at teacher width"

    def __init__(self, options: MGDOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> None:
        super().__init__()
        self.criterion = MaskedGeneration(student.channels["c4"], teacher.channels["c4"], options.mgd_mask_ratio,
                                          run.fast)

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"mgd": self.criterion(batch.student.c4, batch.teacher.c4, generator=generator)}
