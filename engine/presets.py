"""Published settings: what ``--method NAME`` stands for, and what the scripts of the published rows add to it.

Both are stated once, in the file of the method (``Distiller.preset`` and ``Distiller.rows``).
"""
from __future__ import annotations

from collections.abc import Mapping

from losses.core import methods
from models import split_backbone


def published(method: str, dataset: str, backbone: str) -> dict[str, object]:
    """What the ``preset`` of a method sets for a data set and a student's backbone, whatever its width; {} for 'none'.

    The more specific entry wins: "*", then "*/BACKBONE", "DATASET", "DATASET/BACKBONE".
    """
    base, _ = split_backbone(backbone)
    return _lookup(methods()[method].preset if method != "none" else {}, "*", f"*/{base}", dataset, f"{dataset}/{base}")


def preset(method: str, dataset: str, backbone: str) -> dict[str, object]:
    """Settings that ``--method`` stands for: all weights 0, then what is :func:`published`."""
    weights: dict[str, object] = {t.setting: 0.0 for cls in methods().values() for t in cls.terms}
    return {**weights, **published(method, dataset, backbone)}


def published_row(method: str, dataset: str, model: str, backbone: str) -> dict[str, object]:
    """What the script of a published row sets beside the protocol: :func:`published`, then the method's ``rows``."""
    rows = methods()[method].rows if method != "none" else {}
    return {**published(method, dataset, backbone), **_lookup(rows, "*", dataset, f"{dataset}/{model}-{backbone}")}


def _lookup(entries: Mapping[str, Mapping[str, object]], *keys: str) -> dict[str, object]:
    """The entries of these keys, where the later ones win."""
    return {setting: value for key in keys for setting, value in entries.get(key, {}).items()}
