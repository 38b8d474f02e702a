"""Published settings: what ``--method NAME`` stands for, and what the scripts of the published rows add to it.

Both are stated once, in the file of the method (``Distiller.preset`` and ``Distiller.rows``).
"""
from __future__ import annotations

from collections.abc import Mapping

from engine.options import GROUPS
from losses.core import methods
from models import split_backbone
from utils.errors import UserError, did_you_mean
from utils.options import options_of


def published(method: str, dataset: str, backbone: str) -> dict[str, object]:
    """What the ``preset`` of a method sets for a data set and a student's backbone, whatever its width; {} for 'none'.

    The more specific entry wins: "*", then "*/BACKBONE", "DATASET", "DATASET/BACKBONE".
    """
    base, _ = split_backbone(backbone)
    return _lookup(methods()[method].preset if method != "none" else {}, "*", f"*/{base}", dataset, f"{dataset}/{base}")


def preset(method: str, dataset: str, backbone: str) -> dict[str, object]:
    """Settings that ``--method`` stands for: all weights 0, then what is :func:`published`. UserError when the method
    names one that does not exist."""
    check_names(method)
    weights: dict[str, object] = {t.setting: 0.0 for cls in methods().values() for t in cls.terms}
    return {**weights, **published(method, dataset, backbone)}


def published_row(method: str, dataset: str, model: str, backbone: str) -> dict[str, object]:
    """What the script of a published row sets beside the protocol: :func:`published`, then the method's ``rows``.
    UserError when the method names a setting that does not exist."""
    check_names(method)
    rows = methods()[method].rows if method != "none" else {}
    return {**published(method, dataset, backbone), **_lookup(rows, "*", dataset, f"{dataset}/{model}-{backbone}")}


def check_names(method: str) -> None:
    """UserError when ``preset`` or ``rows`` of a method, for whatever data set, name a setting that does not exist."""
    if method == "none":
        return
    cls, known = methods()[method], known_settings()
    for attribute in ("preset", "rows"):
        for key, values in getattr(cls, attribute).items():
            if unknown := next((name for name in values if name not in known), None):
                raise UserError(f"method {method!r}: its {attribute} has under {key!r} the setting {unknown!r}, which "
                                f"does not exist{did_you_mean(unknown, known)}")


def known_settings() -> set[str]:
    """The names of all settings, with those of every registered method."""
    groups = [group for _, group in GROUPS] + [cls.Options for cls in methods().values()]
    return {one.name for group in groups for one in options_of(group)} | {
        term.setting for cls in methods().values() for term in cls.terms}


def _lookup(entries: Mapping[str, Mapping[str, object]], *keys: str) -> dict[str, object]:
    """The entries of these keys, where the later ones win."""
    return {setting: value for key in keys for setting, value in entries.get(key, {}).items()}
