"""Losses: the distillation methods, one file each, and the supervised cross entropy."""
from __future__ import annotations

from losses.afdcd import AfDCD, OmniContrastiveFeatureLoss, omni_contrastive_loss
from losses.distiller import BuildContext, Distiller, NetInfo, Term, check_taps, methods, register
from losses.kd import KD, CriterionKD, kd_loss
from losses.task import SegCrossEntropyLoss, task_loss

__all__ = ["KD", "AfDCD", "BuildContext", "CriterionKD", "Distiller", "NetInfo", "OmniContrastiveFeatureLoss",
           "SegCrossEntropyLoss", "Term", "check_taps", "kd_loss", "methods", "omni_contrastive_loss", "register",
           "task_loss"]
