"""MasKD: distillation inside learned masks (Huang et al., "Masked Distillation with Receptive Tokens", ICLR 2023), in
its variant for segmentation, on the logits z of the teacher and s of the student.

Tokens E [T, K] give masks m_t = sigmoid(E_t z). A stage before training learns them on the frozen teacher: the logits
weighted by the sum of the masks have to classify well, and the masks have to differ (a Dice coefficient). Then

    L = 1/2 mean over images, t, classes c of  sum_p m_tp^2 (s_cp - z_cp)^2 / (sum_p m_tp + 1e-5)
"""
from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from losses.distiller import BuildContext, Distiller, Preparation, Term, register
from losses.logits import check_logit_maps, check_logit_nets
from losses.maskd_stage import initial_tokens, learn_tokens, read_tokens
from losses.stage import StageSettings, check_shares, common_words
from losses.task import SegCrossEntropyLoss, at_least_float32
from models.output import SegOutput
from utils.cli import number
from utils.errors import UserError


def receptive_masks(logits: Tensor, tokens: Tensor) -> Tensor:
    """Masks [B, T, P] in (0, 1) of logits [B, K, P] and tokens [T, K]. Call it outside of autocast."""
    return torch.einsum("tk,bkp->btp", tokens.to(logits.dtype), logits).sigmoid()


def maskd_loss(student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor) -> Tensor:
    """MasKD of two logit maps [B, K, h, w] under tokens [T, K]; every position counts.

    The sum over positions is one batched matrix product, so nothing of size B x T x K x h x w exists. Gradients reach
    the student (and tokens that ask for them). Raises UserError when the shapes do not fit.
    """
    check_logit_maps("maskd", student_logits, teacher_logits)
    if tokens.ndim != 2 or tokens.shape[1] != teacher_logits.shape[1]:
        raise UserError(f"maskd: tokens {tuple(tokens.shape)}: expected [T, {teacher_logits.shape[1]}]")
    with torch.autocast(student_logits.device.type, enabled=False):
        student, teacher = (at_least_float32(z).flatten(2) for z in (student_logits, teacher_logits.detach()))
        masks = receptive_masks(teacher, tokens)
        sums = masks.square() @ (student - teacher).square().transpose(1, 2)
        return (sums / (masks.sum(dim=2, keepdim=True) + 1e-5)).mean() / 2


def dice_overlap(masks: Tensor, eps: float = 1e-12) -> Tensor:
    """Mean Dice coefficient 2 <a, b> / (|a|^2 + |b|^2) over the pairs of different masks of an image; masks [B, T, P].

    0 when there is a single mask.
    """
    count = masks.shape[1]
    gram = masks @ masks.transpose(1, 2)
    squares = gram.diagonal(dim1=1, dim2=2) + eps
    dice = 2 * gram / (squares[:, :, None] + squares[:, None, :])
    other = 1 - torch.eye(count, dtype=dice.dtype, device=dice.device)
    return (dice * other).sum() / (len(masks) * max(count * (count - 1), 1))


def mask_learning_losses(teacher_logits: Tensor, tokens: Tensor, target: Tensor, ignore_label: int = -1,
                         group_size: int = 0) -> dict[str, Tensor]:
    """{"ce", "dice"}: the two scalars whose sum the tokens [T, K] minimise.

    teacher_logits: [B, K, h, w]; target: integers [B, H, W]. ce: cross entropy of the logits times the sum of their
    masks, resized to the labels (group_size: see :class:`SegCrossEntropyLoss`). dice: :func:`dice_overlap`.
    """
    with torch.autocast(teacher_logits.device.type, enabled=False):
        logits = at_least_float32(teacher_logits.detach())
        masks = receptive_masks(logits.flatten(2), tokens)
        masked = logits * masks.sum(dim=1).unflatten(1, logits.shape[-2:])[:, None]
        return {"ce": SegCrossEntropyLoss(ignore_label, group_size)(masked, target), "dice": dice_overlap(masks)}


@register("maskd")
class MasKD(Distiller):
    """The main logits, and a share of the auxiliary ones where both networks have them, inside the same tokens' masks.

    tokens: [T, K]; a frozen buffer, so the state of a run holds them. settings: of the stage that learns them, None
    when they are given.
    """

    title = "masked distillation with receptive tokens"
    paper = "Huang et al., Masked Distillation with Receptive Tokens"
    year = 2023
    terms = (Term("maskd", 0.0, "weight of MasKD's masked logit differences (main and auxiliary)"),)
    student_taps = ("logits",)
    teacher_taps = ("logits",)
    # the authors' Cityscapes scripts: 1 on the main and 0.4 on the auxiliary logits, no KD, and a weight decay of 5e-4
    # where the rows that their table compares with have 1e-4; their MobileNetV2 script has 2e-4
    preset = {"*": {"lambda_maskd": 1.0, "weight_decay": 5e-4}, "*/mobilenetv2": {"weight_decay": 2e-4}}
    cost = "masks and one matrix product on the logits; before training, a stage of teacher passes"
    quick = {"maskd_steps": 2, "maskd_batch_size": 2}
    stage_options = ("maskd_masks", "maskd_steps", "maskd_batch_size", "maskd_lr")

    def __init__(self, tokens: Tensor, settings: StageSettings | None = None, aux_weight: float = 0.0,
                 ignore_label: int = -1, group_size: int = 0) -> None:
        super().__init__()
        self.register_buffer("tokens", tokens)
        self.settings, self.aux_weight = settings, aux_weight
        self.ignore_label, self.group_size = ignore_label, group_size
        if aux_weight:
            self.student_taps = self.teacher_taps = ("logits", "aux")

    @classmethod
    def add_arguments(cls, group: argparse._ArgumentGroup) -> None:
        group.add_argument("--maskd-masks", metavar="FILE", default=None,
                           help="tokens to use, of the same teacher and classes (default: learn them before training)")
        group.add_argument("--maskd-tokens", type=number(int, 1), default=8, metavar="T", help="number of masks")
        group.add_argument("--maskd-steps", type=number(int, 1), default=10000, metavar="N",
                           help="steps of the stage that learns the masks")
        group.add_argument("--maskd-batch-size", type=number(int, 1), default=16, metavar="N",
                           help="images per step of that stage, over all processes together")
        group.add_argument("--maskd-lr", type=number(float, 0, open_low=True), default=0.1, metavar="LR",
                           help="learning rate of the first step of that stage")
        group.add_argument("--maskd-aux-weight", type=number(float, 0), default=0.4, metavar="W",
                           help="share of the auxiliary logits, where both networks have them")

    @classmethod
    def build(cls, context: BuildContext) -> MasKD:
        """Raises UserError when classes or strides differ, or ``--maskd-masks`` does not fit."""
        check_logit_nets(cls, context)
        o, classes = context.options, context.teacher.channels["logits"]
        given, seed, settings = getattr(o, "maskd_masks", None), getattr(o, "seed", 0), None
        if given:
            tokens = read_tokens(Path(given).expanduser(), classes)
        else:
            tokens = initial_tokens(getattr(o, "maskd_tokens", 8), classes, seed)
            settings = StageSettings(getattr(o, "maskd_steps", 10000), getattr(o, "maskd_batch_size", 16),
                                     getattr(o, "maskd_lr", 0.1), getattr(o, "compat", "fixed") == "reference", seed,
                                     common_words(context), getattr(o, "save_per_iters", 800))
            check_shares(settings)
        both = "aux" in context.student.channels and "aux" in context.teacher.channels
        aux_weight = getattr(o, "maskd_aux_weight", 0.4) if both else 0.0
        return cls(tokens, settings, aux_weight, context.ignore_label, getattr(o, "group_size", 2))

    def prepare(self, stage: Preparation) -> None:
        """Learn the tokens, or take them from the cache (:func:`losses.maskd_stage.learn_tokens`)."""
        if self.settings is not None:
            self.tokens.copy_(learn_tokens(stage, self.tokens, self.settings, self._stage_loss))

    def _stage_loss(self, output: SegOutput, tokens: Tensor, target: Tensor) -> dict[str, Tensor]:
        return mask_learning_losses(output.logits, tokens, target, self.ignore_label, self.group_size)

    def forward(self, student: SegOutput, teacher: SegOutput, target: Tensor, step: int,
                generator: torch.Generator | None = None) -> dict[str, Tensor]:
        loss = maskd_loss(student.logits, teacher.logits, self.tokens)
        if self.aux_weight:
            loss = loss + self.aux_weight * maskd_loss(student.aux, teacher.aux, self.tokens)
        return {"maskd": loss}
