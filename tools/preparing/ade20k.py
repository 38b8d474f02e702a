"""ADE20K, scene parsing benchmark: images and annotations as they are."""
from __future__ import annotations

from collections.abc import Sequence

from tools.preparing.archives import Archive
from tools.preparing.plan import Plan, Rule

SPLITS = ("training", "validation")
RULES = (
    *(Rule("ADEChallengeData2016.zip", f"images/{split}/*.jpg") for split in SPLITS),
    *(Rule("ADEChallengeData2016.zip", f"annotations/{split}/*.png") for split in SPLITS),
    Rule("release_test.zip", "testing/*.jpg", into="images/testing", needed=False),
)


def plan(archives: Sequence[Archive]) -> Plan:
    """What is taken from ADEChallengeData2016.zip and, where it is given, release_test.zip."""
    return Plan.of_rules(RULES, archives)
