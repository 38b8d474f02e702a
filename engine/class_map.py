"""``--teacher-classes FILE``: which classes of a teacher stand for which of the data set. The file, in TOML:

    teacher = "citys"                    # the names of its classes, where its weights do not say them
    [classes]
    pavement = "sidewalk"                # class of the data set = class of the teacher, by name or number
    "sign/symbol" = ["traffic sign", 6]  # or several, which are merged

What it says is kept with the settings of the run as ``class_map``: JSON with the same two entries.
"""
from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dataset import DatasetSpec, get_dataset_spec
from engine.options import Networks
from models import NetworkChoice
from models.class_map import ClassMap
from models.class_names import KnownClasses, classes_of, plain_name
from utils.errors import UserError

ENTRIES = ("teacher", "classes")
EXAMPLE = 'teacher = "citys" (a data set), teacher = ["road", "car"] or teacher = 19'


def read_class_map(path: str) -> str:
    """The content of a file, as ``class_map`` keeps it. UserError for what is no such file."""
    where = f"--teacher-classes {path}"
    try:
        content = tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: not a TOML file that can be read ({error})") from error
    for name in content:
        if name not in ENTRIES:
            raise UserError(f"{where}: there is no entry {name!r}{_near(name, ENTRIES)}: expected [classes] and, "
                            "before it, teacher = …")
    teacher, classes = content.get("teacher"), content.get("classes")
    if not _is_teacher(teacher):
        raise UserError(f"{where}: teacher = {teacher!r}: expected {EXAMPLE}")
    if not isinstance(classes, dict):
        raise UserError(f'{where}: expected [classes] and below it lines such as sky = "sky"')
    read = {name: _as_list(where, name, value) for name, value in classes.items()}
    if not any(read.values()):
        raise UserError(f'{where}: maps no class: expected lines such as sky = "sky" below [classes]')
    return json.dumps({"teacher": teacher, "classes": read}, ensure_ascii=False, sort_keys=True)


def _is_teacher(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(name, str) for name in value)
    return value is None or isinstance(value, str) or _is_number(value) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_list(where: str, name: str, value: Any) -> list[str | int]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) or _is_number(one) for one in values):
        raise UserError(f"{where}: {name} = {value!r}: expected a class of the teacher, by name or number, or a list "
                        "of them")
    return values


def class_map_of(networks: Networks, spec: DatasetSpec, choice: NetworkChoice | None = None) -> ClassMap | None:
    """The map of a run between its teacher and its data set; None without one. UserError when it does not fit them.
    choice: another network of the same classes in place of the teacher."""
    if networks.class_map is None:
        return None
    where, (said, classes) = f"--teacher-classes {networks.teacher_classes}", _content(networks.class_map)
    known, own = _of_teacher(where, said, classes_of(choice or networks.teacher)), of_data(spec)
    groups: dict[int, tuple[int, ...]] = {}
    owners: dict[int, str] = {}
    for name, members in classes.items():
        k = find_class(where, name, own, spec.title)
        if k in groups:
            raise UserError(f"{where}: {name!r} is class {k} of {spec.title}, which is mapped already")
        groups[k] = tuple(find_class(where, member, known, "the teacher") for member in members)
        for part in groups[k]:
            if part in owners:
                raise UserError(f"{where}: the teacher's class {known.names[part] if known.names else part} stands for "
                                f"{owners[part]!r} and again for {name!r}: expected each of its classes once at most")
            owners[part] = name
    common = tuple(sorted(k for k, group in groups.items() if group))
    return ClassMap(common, tuple(groups[k] for k in common), spec.num_class, known.count, known.names)


def taught(networks: Networks) -> int:
    """The number of the teacher's classes by a map that there is, and by its weights."""
    said, _ = _content(networks.class_map)
    return _of_teacher(f"--teacher-classes {networks.teacher_classes}", said, classes_of(networks.teacher)).count


def _content(text: str) -> tuple[Any, dict[str, list[str | int]]]:
    """The two entries of a ``class_map``."""
    try:
        content = json.loads(text)
        return content["teacher"], {name: list(parts) for name, parts in content["classes"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"class_map {text!r}: not what --teacher-classes FILE leaves in the configuration of a run: "
                        "give the file again") from error


def of_data(spec: DatasetSpec) -> KnownClasses:
    """The classes of a data set."""
    return KnownClasses(spec.num_class, spec.classes)


def _of_teacher(where: str, said: str | int | list[str] | None, known: KnownClasses) -> KnownClasses:
    """The teacher's classes. said: in the file; known: by its weights."""
    if said is None:
        if known.count is None:
            raise UserError(f"{where}: neither the teacher's weights nor this file say which classes it has: expected "
                            f"a line such as {EXAMPLE}")
        return known
    names = None if _is_number(said) else tuple(said) if isinstance(said, list) else _of_named_data(where, said)
    count = said if names is None else len(names)
    if known.count not in (None, count):
        raise UserError(f"{where}: says that the teacher has {count} classes, but it has {known}")
    for k, (one, two) in enumerate(zip(names or (), known.names or (), strict=False)):
        if plain_name(one) != plain_name(two):
            raise UserError(f"{where}: says that class {k} of the teacher is {one!r}, but its weights say {two!r}: "
                            "leave the line teacher = … out")
    return KnownClasses(count, known.names or names)


def _of_named_data(where: str, dataset: str) -> tuple[str, ...]:
    try:
        return get_dataset_spec(dataset).classes
    except UserError as error:
        raise UserError(f"{where}: teacher = {dataset!r}: {error}") from error


def find_class(where: str, name: str | int, known: KnownClasses, whose: str) -> int:
    """The number of a class that is given by its name or its number. where: begins a UserError; whose: the classes."""
    names = [plain_name(one) for one in known.names or ()]
    if isinstance(name, str) and (count := names.count(plain_name(name))):
        if count > 1:
            raise UserError(f"{where}: {whose} has {count} classes {name!r}: expected the number of one")
        return names.index(plain_name(name))
    if _is_number(name) or name.strip().isdecimal():
        if 0 <= int(name) < known.count:
            return int(name)
        raise UserError(f"{where}: {whose} has no class {name}: expected 0 to {known.count - 1}")
    if not names:
        raise UserError(f"{where}: {name!r}: the names of the {known.count} classes of {whose} are not known: expected "
                        f"their numbers, or a line such as {EXAMPLE.rpartition(' or ')[0]}")
    raise UserError(f"{where}: {whose} has no class {name!r}{_near(name, known.names)}: expected one of "
                    f"{', '.join(known.names)}")


def _near(name: str, among: Iterable[str]) -> str:
    plain = {plain_name(one): one for one in among}
    close = difflib.get_close_matches(plain_name(name), plain, n=1)
    return f"; did you mean {plain[close[0]]!r}?" if close else ""


def class_map_changes(before: str | None, now: str | None) -> str:
    """How two ``class_map`` differ, in words."""
    if before is None or now is None:
        return f"{'no' if before is None else 'a'} map -> {'no' if now is None else 'a'} map"
    (taught, old), (teaches, new) = _content(before), _content(now)
    changed = [f"{name}: {' + '.join(map(str, old.get(name, []))) or 'nothing'} -> "
               f"{' + '.join(map(str, new.get(name, []))) or 'nothing'}"
               for name in {**old, **new} if old.get(name, []) != new.get(name, [])]
    if taught != teaches:
        changed.append(f"teacher = {taught!r} -> {teaches!r}")
    return ", ".join(changed) or "the same, written in another way"
