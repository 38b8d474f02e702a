"""What a plan may hold: its keys, the kinds of their values, and which flags its tables leave to other keys."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dataset import list_datasets
from tools.planning.command import flags_of_keys
from utils.errors import UserError, did_you_mean

KEYS = {"": {"title", "protocol", "dataset", "data", "student", "paint", "seeds", "gpus", "flags",
             "student-flags", "teachers", "runs", "scan"},
        "paint": {"train", "val", "test", "height", "width", "seed", "points"},
        "teachers": {"network", "file", "flags", "label"}, "runs": {"method", "teacher", "flags", "seeds"},
        "scan": {"of", "values", "flags"}}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(value: Any, *kinds: type) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) in kinds for one in value)


#: {key: (what is allowed, in words)} of those that are checked by kind, wherever they stand
VALUES = {"seeds": (lambda v: _is_list(v, int) and min(v) >= 0, "a list of whole numbers, such as [0, 1, 2]"),
          "values": (lambda v: _is_list(v, int, float), "a list of numbers, such as [2e-4, 1e-3]"),
          "of": (lambda v: _is_text(v) or _is_list(v, str), "the name of a run, or a list of them"),
          "gpus": (lambda v: type(v) is int and v >= 0, "a whole number"),
          **dict.fromkeys(("flags", "student-flags"), (lambda v: isinstance(v, dict), "a table, such as {lr = 0.1}")),
          **dict.fromkeys(("title", "protocol", "dataset", "data", "method", "teacher", "file", "label"),
                          (_is_text, "a text in quotes"))}


#: {key of a list: its values as names of runs have them}
NAMED = {"seeds": str, "of": str, "values": "{:g}".format}


def repeated(values: Iterable[Any]) -> Any:
    """The first value that is among those before it, None when all differ."""
    seen: set[Any] = set()
    return next((value for value in values if value in seen or seen.add(value)), None)


def check_keys(plan: Mapping[str, Any], path: Path) -> None:
    """UserError for a key that nobody reads, and for one that is missing."""
    for kind in ("teachers", "runs", "scan"):
        if not isinstance(entries := plan.get(kind, {}), dict):
            raise UserError(f"{path}: [{kind}]: expected tables, such as [{kind}.NAME], got {entries!r}")
    parts = [("", plan), ("paint", plan.get("paint", {})),
             *((f"{kind}.{name}", entry) for kind in ("teachers", "runs", "scan")
               for name, entry in plan.get(kind, {}).items())]
    for where, entry in parts:
        if not isinstance(entry, dict):
            raise UserError(f"{path}: [{where}]: expected a table, got {entry!r}")
        if where.startswith("scan.") and (missing := {"of", "values"} - entry.keys()):
            raise UserError(f"{path}: [{where}] {', '.join(sorted(missing))} is missing")
        known = sorted(KEYS[where.partition(".")[0]])
        if unknown := sorted(entry.keys() - set(known)):
            raise UserError(f"{path}: {f'[{where}] ' if where else ''}unknown key {unknown[0]!r}; expected some of "
                            f"{', '.join(known)}{did_you_mean(unknown[0], known)}")
        if where != "paint":
            check_values(entry, f"{path}:{f' [{where}]' if where else ''}")
    needed = {"protocol", "dataset", "student", "seeds", "runs", *(["data"] if "paint" in plan else [])}
    if missing := needed - plan.keys():
        raise UserError(f"{path}: {', '.join(sorted(missing))} is missing")
    if plan["dataset"] not in list_datasets():
        raise UserError(f"{path}: dataset: unknown data set {plan['dataset']!r}; expected one of "
                        f"{', '.join(list_datasets())}{did_you_mean(plan['dataset'], list_datasets())}")
    if not plan["runs"]:
        raise UserError(f"{path}: [runs] is empty; expected at least one run, such as [runs.none]")
    if "paint" in plan:
        check_paint(plan, path)
    check_flags(plan, path)


def check_values(entry: Mapping[str, Any], where: str) -> None:
    """UserError for a value of another kind than its key takes."""
    for key, value in entry.items():
        allowed, expected = VALUES.get(key, (None, ""))
        if allowed and not allowed(value):
            raise UserError(f"{where} {key}: expected {expected}, got {value!r}")
        if key in NAMED and isinstance(value, list) and (name := repeated(map(NAMED[key], value))) is not None:
            raise UserError(f"{where} {key}: {name} is listed twice; expected each once")


def check_paint(plan: Mapping[str, Any], path: Path) -> None:
    """UserError for [paint] in a plan of other images, and for what is not a number."""
    if plan["dataset"] != "toy_streets":
        raise UserError(f"{path}: [paint] makes toy streets; expected dataset = \"toy_streets\", got "
                        f"{plan['dataset']!r}")
    for name, value in plan["paint"].items():
        if type(value) is not int:
            raise UserError(f"{path}: [paint] {name}: expected an integer, got {value!r}")


def check_flags(plan: Mapping[str, Any], path: Path) -> None:
    """UserError for a flag that another key of the plan, or the program, sets: it would have no effect."""
    tables = {**{key: plan.get(key, {}) for key in ("flags", "student-flags")},
              **{f"[{kind}.{name}] flags": entry.get("flags", {}) for kind in ("teachers", "runs", "scan")
                 for name, entry in plan.get(kind, {}).items()},
              **{f"[scan.{name}]": {name: entry["values"]} for name, entry in plan.get("scan", {}).items()}}
    for where, table in tables.items():
        for name in table:
            if key := flags_of_keys().get(name.replace("-", "_")):
                raise UserError(f"{path}: {where}: {name} cannot be set here, since {key} sets it")
