"""What methods share. Everything that a simple method needs can be imported from here."""
from __future__ import annotations

from losses.core.checks import at_least_float32, check_logits, check_maps, full_precision
from losses.core.distiller import Distiller, Term, methods, register
from losses.core.facts import Batch, NetInfo, Preparation, RunFacts
from losses.core.groups import image_weights, mean_over_groups, split_groups
from losses.core.labels import class_members, labels_at, position_labels
from losses.core.needs import Needs
from losses.core.queues import gather_batch
from utils.options import OptionGroup, option

__all__ = ["Batch", "Distiller", "NetInfo", "Needs", "OptionGroup", "Preparation", "RunFacts", "Term",
           "at_least_float32", "check_logits", "check_maps", "class_members", "full_precision", "gather_batch",
           "image_weights", "labels_at", "mean_over_groups", "methods", "option", "position_labels", "register",
           "split_groups"]
