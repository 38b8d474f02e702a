"""MGD: the student restores the teacher's features from a part of its own (Yang et al., "Masked Generative
Distillation", ECCV 2022).

    L = mean over images of the sum over C, h, w of (G(K * align(f_S)) - f_T)^2

align: 1x1 convolution, only where the widths differ. K: 0 at a random share of the positions, else 1. G: 3x3
convolution, ReLU, 3x3 convolution at the teacher's width. Generator and alignment are trained and then dropped. The
published alpha (2e-5) is the weight of the term. Af-DCD's feature mimicking is the same loss.
"""
from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from losses.afdcd import masked_feature_loss, plain_projector, random_keep_mask
from losses.distiller import BuildContext, Distiller, Term, check_taps, register
from models.output import SegOutput
from utils.cli import number
from utils.errors import UserError


class MaskedGeneration(nn.Module):
    """Alignment, random mask, generator and squared error for maps of given widths.

    mask_ratio: share of the positions that the mask zeroes, the same ones in every channel.
    """

    def __init__(self, student_channels: int, teacher_channels: int, mask_ratio: float = 0.75) -> None:
        super().__init__()
        if not 0 <= mask_ratio <= 1:
            raise UserError(f"--mgd-mask-ratio {mask_ratio:g}: expected a number from 0 to 1")
        self.student_channels, self.teacher_channels = student_channels, teacher_channels
        self.mask_ratio = mask_ratio
        same = student_channels == teacher_channels
        self.align = nn.Identity() if same else nn.Conv2d(student_channels, teacher_channels, kernel_size=1)
        self.generation = plain_projector(teacher_channels)

    def forward(self, student: Tensor, teacher: Tensor, *, keep: Tensor | None = None,
                generator: torch.Generator | None = None) -> Tensor:
        """Unweighted scalar of student [B, C_s, H, W] and teacher [B, C_t, H, W].

        keep: [B, 1, H, W], non-zero where a position is kept; drawn from ``generator`` (on the maps' device) when not
        given. Gradients do not reach the teacher. Raises UserError when the maps do not fit each other.
        """
        widths = student.shape[1] == self.student_channels and teacher.shape[1] == self.teacher_channels
        if not widths or len(student) != len(teacher) or student.shape[-2:] != teacher.shape[-2:]:
            raise UserError(f"mgd: student map {tuple(student.shape)} and teacher map {tuple(teacher.shape)}: expected "
                            f"{self.student_channels} and {self.teacher_channels} channels and equal sizes")
        if keep is None:
            draw = torch.rand((len(student), 1, *student.shape[-2:]), generator=generator, device=student.device)
            keep = random_keep_mask(draw, self.mask_ratio)
        aligned = self.align(student)
        return masked_feature_loss(self.generation(aligned * keep.to(aligned.dtype)), teacher.detach())


@register("mgd")
class MGD(Distiller):
    """The c4 maps of both networks through :class:`MaskedGeneration`."""

    title = "masked generative distillation"
    paper = "Yang et al., Masked Generative Distillation"
    year = 2022
    terms = (Term("mgd", 0.0, "weight of MGD's restored features (a sum over C*h*w, hence tiny; 2e-5 is for "
                              "crops of 512x512)"),)
    student_taps = ("c4",)
    teacher_taps = ("c4",)
    # the authors' Cityscapes configurations: alpha 2e-5, masked share 0.75, and CWD on the logits with weight 3; their
    # crops are 512x512 and the term is a sum over C*h*w: at 512x1024 it is twice as strong
    preset = {"*": {"lambda_mgd": 2e-5, "lambda_cwd_logit": 3.0}}
    cost = "two 3x3 convs at teacher width"

    def __init__(self, criterion: MaskedGeneration) -> None:
        super().__init__()
        self.criterion = criterion

    @classmethod
    def add_arguments(cls, group: argparse._ArgumentGroup) -> None:
        group.add_argument("--mgd-mask-ratio", type=number(float, 0, 1), default=0.75, metavar="R",
                           help="share of the positions that the random mask zeroes")

    @classmethod
    def build(cls, context: BuildContext) -> MGD:
        """Raises UserError when a network has no c4 or the strides differ."""
        check_taps(cls, context.student, context.teacher)
        if context.student.stride != context.teacher.stride:
            raise UserError(f"method 'mgd': output stride {context.student.stride} of {context.student.name} and "
                            f"{context.teacher.stride} of {context.teacher.name}: expected equal numbers")
        return cls(MaskedGeneration(context.student.channels["c4"], context.teacher.channels["c4"],
                                    getattr(context.options, "mgd_mask_ratio", 0.75)))

    def forward(self, student: SegOutput, teacher: SegOutput, target: Tensor, step: int,
                generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"mgd": self.criterion(student.c4, teacher.c4, generator=generator)}
