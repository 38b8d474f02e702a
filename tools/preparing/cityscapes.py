"""Cityscapes: the images as they are, and the label ids of the splits that have them."""
from __future__ import annotations

from collections.abc import Sequence

from tools.preparing.archives import Archive
from tools.preparing.plan import Plan, Rule

IMAGES, LABELS = "leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip"
RULES = (
    *(Rule(IMAGES, f"leftImg8bit/{split}/*/*_leftImg8bit.png") for split in ("train", "val")),
    *(Rule(LABELS, f"gtFine/{split}/*/*_gtFine_labelIds.png") for split in ("train", "val")),
    Rule(IMAGES, "leftImg8bit/test/*/*_leftImg8bit.png", needed=False),
)


def plan(archives: Sequence[Archive]) -> Plan:
    """What is taken from leftImg8bit and gtFine."""
    return Plan.of_rules(RULES, archives)
