"""COCO-Stuff-164K: the images of COCO 2017 and the pixel maps of things and stuff."""
from __future__ import annotations

from collections.abc import Sequence

from tools.preparing.archives import Archive
from tools.preparing.plan import Plan, Rule

SPLITS = ("train2017", "val2017")
RULES = (
    *(Rule(f"{split}.zip", f"{split}/*.jpg", into=f"images/{split}") for split in SPLITS),
    *(Rule("stuffthingmaps_trainval2017.zip", f"{split}/*.png", into=f"annotations/{split}") for split in SPLITS),
)


def plan(archives: Sequence[Archive]) -> Plan:
    """What is taken from train2017.zip, val2017.zip and stuffthingmaps_trainval2017.zip."""
    return Plan.of_rules(RULES, archives)
