"""Anybody's images and index masks: images/<split>/, labels/<split>/ and a file that names the classes.

``classes.txt`` has one class per line, "name" or "name R G B", in the order of the mask values 0, 1, 2, ...; a line
"ignore: 255" lists mask values to ignore (default 255); "#" starts a comment. ``classes.json`` is an object with
"classes" (names, or objects with "name", and optionally "color" and "id"), optionally "ignore", "train_crop" [H, W].
"""
from __future__ import annotations

import json
import os
import re
from typing import Any, NamedTuple

from dataset.palette import bit_palette
from dataset.spec import DatasetSpec, SplitSpec, id_tables, register_builder
from utils.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
CLASS_FILES = ("classes.json", "classes.txt")
DEFAULT_IGNORE, DEFAULT_CROP = 255, (512, 512)
LINE = re.compile(r"(?P<name>.*?)(?:[\s,]+(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3}))?")


class ClassEntry(NamedTuple):
    """One class of a class file: name, color (None: generated) and value in the masks (None: its position)."""

    name: str
    color: tuple[int, ...] | None = None
    id: int | None = None


def _byte(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 255:
        raise UserError(f"{where}: {value!r}; expected a whole number in 0..255")
    return value


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this class file: {getattr(error, 'strerror', None) or error}") from None


def read_class_text(path: str) -> tuple[list[ClassEntry], list[int], tuple[int, int]]:
    """(classes, ignored mask values, training crop) of a ``classes.txt``."""
    entries, ignore = [], None
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        text, where = line.split("#")[0].strip(), f"{path}, line {number}"
        if not text:
            continue
        if text.lower().startswith("ignore:"):
            values = re.split(r"[\s,]+", text[len("ignore:"):].strip())
            ignore = [_byte(int(value) if value.isdecimal() else value, where) for value in values if value]
            continue
        match = LINE.fullmatch(text)
        color = tuple(_byte(int(value), where) for value in match.groups()[1:]) if match[2] else None
        entries.append(ClassEntry(match["name"], color))
    return entries, _default_ignore(entries) if ignore is None else ignore, DEFAULT_CROP


def read_class_json(path: str) -> tuple[list[ClassEntry], list[int], tuple[int, int]]:
    """(classes, ignored mask values, training crop) of a ``classes.json``."""
    try:
        content = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not JSON ({reason}); expected an object with \"classes\"") from None
    if not isinstance(content, dict) or not isinstance(content.get("classes"), list):
        raise UserError(f"{path}: expected an object with a list \"classes\"")
    entries = [_json_entry(entry, f"{path}, class {number}") for number, entry in enumerate(content["classes"])]
    ignore = content.get("ignore", _default_ignore(entries))
    crop = content.get("train_crop", DEFAULT_CROP)
    if not isinstance(ignore, list):
        raise UserError(f"{path}: \"ignore\" is {ignore!r}; expected a list of mask values")
    if not (isinstance(crop, list | tuple) and len(crop) == 2 and all(type(side) is int and side > 0 for side in crop)):
        raise UserError(f"{path}: \"train_crop\" is {crop!r}; expected [height, width]")
    return entries, [_byte(value, f"{path}, \"ignore\"") for value in ignore], tuple(crop)


def _default_ignore(entries: list[ClassEntry]) -> list[int]:
    """255 means "ignore" unless the file says otherwise or gives that value to a class (two-value masks: 0 and 255)."""
    return [] if any(entry.id == DEFAULT_IGNORE for entry in entries) else [DEFAULT_IGNORE]


def _json_entry(entry: Any, where: str) -> ClassEntry:
    if isinstance(entry, str):
        return ClassEntry(entry.strip())
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise UserError(f"{where}: expected a name, or an object with \"name\" and optionally \"color\" and \"id\"")
    color, stored = entry.get("color"), entry.get("id")
    if color is not None and not (isinstance(color, list) and len(color) == 3):
        raise UserError(f"{where}: color {color!r}; expected [red, green, blue]")
    return ClassEntry(entry["name"].strip(), None if color is None else tuple(_byte(c, where) for c in color),
                      None if stored is None else _byte(stored, where))


def _checked_ids(path: str, entries: list[ClassEntry], ignore: list[int]) -> dict[int, int]:
    """mask value -> train id; no value twice, none both a class and ignored, no name twice or empty."""
    if not entries:
        raise UserError(f"{path}: no classes; expected one name per line (or entry)")
    names = [entry.name for entry in entries]
    if "" in names or len(set(names)) < len(names):
        wrong = "" if "" in names else next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: class name '{wrong}' is empty or given twice; expected distinct names")
    mapping: dict[int, int] = {}
    for train, entry in enumerate(entries):
        stored = train if entry.id is None else entry.id
        if stored > 255 or stored in mapping or stored in ignore:
            raise UserError(f"{path}: mask value {stored} of class '{entry.name}' is above 255, used twice or ignored; "
                            "expected one value of its own per class")
        mapping[stored] = train
    return mapping


def _splits(root: str) -> dict[str, SplitSpec]:
    """train and val, and every further folder under images/; one without a label folder has no labels."""
    images = os.path.join(root, "images")
    folders = sorted(entry.name for entry in os.scandir(images) if entry.is_dir()) if os.path.isdir(images) else []
    names = dict.fromkeys(["train", "val", *folders])
    labels = {name: f"labels/{name}" for name in names
              if name in ("train", "val") or os.path.isdir(os.path.join(root, "labels", name))}
    return {name: SplitSpec(f"images/{name}", labels.get(name), IMAGE_SUFFIXES, nested=True) for name in names}


@register_builder("folder")
def folder_spec(root: str | os.PathLike | None) -> DatasetSpec:
    """The spec of the folder ``root``; UserError for no root, no class file, or a malformed one (names its line)."""
    if root is None:
        raise UserError("data set 'folder' needs its root folder; expected one with classes.txt or classes.json")
    path = next((p for p in (os.path.join(root, name) for name in CLASS_FILES) if os.path.isfile(p)), None)
    if path is None:
        raise UserError(f"{root}: no class file; expected {' or '.join(CLASS_FILES)} there (format: data/README.md)")
    entries, ignore, crop = (read_class_json if path.endswith(".json") else read_class_text)(path)
    mapping, splits = _checked_ids(path, entries, ignore), _splits(os.fspath(root))
    generated = bit_palette(len(entries), first=1).tolist()
    return DatasetSpec(
        name="folder", title=f"folder {root}", classes=tuple(entry.name for entry in entries), splits=splits,
        palette=[entry.color or color for entry, color in zip(entries, generated, strict=True)], train_crop=crop,
        report_splits=("test",) if "test" in splits and splits["test"].label_dir else (), values_from_file=True,
        **id_tables(mapping, ignore))
