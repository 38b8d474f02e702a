"""Losses: the distillation methods, one file each, and the supervised cross entropy."""
from __future__ import annotations

from losses.afdcd import AfDCD, OmniContrastiveFeatureLoss, omni_contrastive_loss
from losses.core import Batch, Distiller, Needs, NetInfo, OptionGroup, RunFacts, Term, methods, option, register
from losses.core.task import SegCrossEntropyLoss, task_loss
from losses.kd import KD, CriterionKD, kd_loss

__all__ = ["KD", "AfDCD", "Batch", "CriterionKD", "Distiller", "Needs", "NetInfo", "OmniContrastiveFeatureLoss",
           "OptionGroup", "RunFacts", "SegCrossEntropyLoss", "Term", "kd_loss", "methods", "omni_contrastive_loss",
           "option", "register", "task_loss"]
