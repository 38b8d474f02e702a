"""MasKD: distillation inside learned masks (Huang et al., "Masked Distillation with Receptive Tokens", ICLR 2023), in
its variant for segmentation, on the logits z of the teacher and s of the student.

Tokens E [T, K] give masks m_t = sigmoid(E_t z). A stage before training learns them on the frozen teacher: the logits
weighted by the sum of the masks have to classify well, and the masks have to differ (a Dice coefficient). Then

    L = 1/2 mean over images, t, classes c of  sum_p m_tp^2 (s_cp - z_cp)^2 / (sum_p m_tp + 1e-5)
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from losses.core import Batch, Distiller, Needs, NetInfo, OptionGroup, Preparation, RunFacts, Term, option, register
from losses.core.checks import at_least_float32, check_logits, full_precision
from losses.core.feature_losses import dice_overlap
from losses.core.needs import both_have_aux
from losses.core.task import SegCrossEntropyLoss
from losses.stages.stage import check_shares, stage_settings
from losses.stages.tokens import hold_tokens, initial_tokens, learn_tokens, read_tokens
from models.output import SegOutput
from utils.errors import UserError


def receptive_masks(logits: Tensor, tokens: Tensor) -> Tensor:
    """Masks [B, T, P] in (0, 1) of logits [B, K, P] and tokens [T, K]. Call it outside of autocast."""
    return torch.einsum("tk,bkp->btp", tokens.to(logits.dtype), logits).sigmoid()


def maskd_loss(student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor) -> Tensor:
    """MasKD of two logit maps [B, K, h, w] under tokens [T, K]; every position counts. The sum over positions is one
    batched matrix product, so nothing of size B x T x K x h x w exists. Gradients reach the student (and tokens that
    ask for them). Raises UserError when the shapes do not fit."""
    check_logits("maskd", student_logits, teacher_logits)
    if tokens.ndim != 2 or tokens.shape[1] != teacher_logits.shape[1]:
        raise UserError(f"maskd: tokens {tuple(tokens.shape)}: expected [T, {teacher_logits.shape[1]}]")
    with full_precision(student_logits):
        student, teacher = (at_least_float32(z).flatten(2) for z in (student_logits, teacher_logits.detach()))
        masks = receptive_masks(teacher, tokens)
        sums = masks.square() @ (student - teacher).square().transpose(1, 2)
        return (sums / (masks.sum(dim=2, keepdim=True) + 1e-5)).mean() / 2


def mask_learning_losses(teacher_logits: Tensor, tokens: Tensor, target: Tensor, ignore_label: int = -1,
                         group_size: int = 0) -> dict[str, Tensor]:
    """{"ce", "dice"}: scalars whose sum the tokens [T, K] minimize. teacher_logits: [B, K, h, w]; target: integers [B,
    H, W]. ce: :class:`SegCrossEntropyLoss` of the logits times the sum of their masks. dice: :func:`dice_overlap`."""
    with full_precision(teacher_logits):
        logits = at_least_float32(teacher_logits.detach())
        masks = receptive_masks(logits.flatten(2), tokens)
        masked = logits * masks.sum(dim=1).unflatten(1, logits.shape[-2:])[:, None]
        return {"ce": SegCrossEntropyLoss(ignore_label, group_size)(masked, target), "dice": dice_overlap(masks)}


@dataclass(frozen=True)
class MasKDOptions(OptionGroup):
    maskd_masks: str | None = option(None, "tokens to use, of the same teacher and classes (default: learn them before "
                                           "training)", metavar="FILE")
    maskd_tokens: int = option(8, "number of masks", at_least=1, metavar="T")
    maskd_steps: int = option(10000, "steps of the stage that learns the masks", at_least=1, metavar="N")
    maskd_batch_size: int = option(16, "images per step of that stage, over all processes together", at_least=1,
                                   metavar="N")
    maskd_lr: float = option(0.1, "learning rate of the first step of that stage", above=0, metavar="LR")
    maskd_aux_weight: float = option(0.4, "share of the auxiliary logits, where both networks have them", at_least=0,
                                     metavar="W")


@register("maskd")
class MasKD(Distiller):
    """The main logits, and a share of the auxiliary ones where both networks have them, inside the same tokens' masks.
    tokens: [T, K]; a frozen buffer, so the state of a run holds them. settings: None without a stage."""
    title = "masked distillation with receptive tokens"
    paper = "Huang et al., Masked Distillation with Receptive Tokens"
    year = 2023
    Options = MasKDOptions
    terms = (Term("maskd", 0.0, "weight of MasKD's masked logit differences (main and auxiliary)"),)
    needs = Needs.both("logits", same_classes=True)
    # the authors' Cityscapes scripts: no KD, more weight decay than the rows that their table compares with (1e-4)
    preset = {"*": {"lambda_maskd": 1.0, "weight_decay": 5e-4, "min_lr": 1e-4}, "*/mobilenetv2": {"weight_decay": 2e-4}}
    rows = {"*": {"compat": "reference", "val_per_iters": 400, "save_per_iters": 400}}
    cost = "masks and one matrix product on the logits; before training, a stage of teacher passes"
    trial = {"maskd_steps": 2, "maskd_batch_size": 2}
    stage_options = ("maskd_masks", "maskd_tokens", "maskd_steps", "maskd_batch_size", "maskd_lr")

    def __init__(self, options: MasKDOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> None:
        """Raises UserError when the file of tokens does not fit, or the processes cannot share the stage's batches."""
        super().__init__()
        o, classes, self.settings = options, teacher.channels["logits"], None
        tokens = initial_tokens((o.maskd_tokens, classes), run.seed, self.method)
        if not o.maskd_masks:
            self.settings = check_shares(stage_settings(run, self.method, "masks", o.maskd_steps, o.maskd_batch_size,
                                                        o.maskd_lr, train_mode=run.as_released,
                                                        shared_norm=run.as_released and run.sync_bn))
        elif not run.resumed:
            tokens = read_tokens(Path(o.maskd_masks), (None, classes), "maskd_masks")
        hold_tokens(self, tokens)
        self.aux_weight = o.maskd_aux_weight if both_have_aux(student, teacher) else 0.0
        self.ignore_label, self.group_size = run.ignore_label, run.group_size

    @classmethod
    def requires(cls, options: MasKDOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> Needs:
        aux = ("aux",) if options.maskd_aux_weight and both_have_aux(student, teacher) else ()
        return Needs.both("logits", *aux, same_classes=True)

    def prepare(self, stage: Preparation) -> None:
        """Learn the tokens, or take them from the cache (:func:`losses.stages.tokens.learn_tokens`)."""
        def loss(output: SegOutput, tokens: Tensor, target: Tensor) -> dict[str, Tensor]:
            return mask_learning_losses(output.logits, tokens, target, self.ignore_label, self.group_size)

        if self.settings is not None:
            self.tokens.copy_(learn_tokens(stage, self.tokens, self.settings, loss))

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        loss = maskd_loss(batch.student.logits, batch.teacher.logits, self.tokens)
        if self.aux_weight:
            loss = loss + self.aux_weight * maskd_loss(batch.student.aux, batch.teacher.aux, self.tokens)
        return {"maskd": loss}
