"""The files of a run's own code: of its methods, and of networks that a module of the user builds."""
from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path

from engine.settings import Settings
from losses.core import Distiller
from models.outside import module_file
from utils.files import sha256
from utils.machine import CODE, ROOT


def sources(settings: Settings) -> dict[str, str]:
    """{file: its SHA-256}, named from the root of this code. One that lies elsewhere has its name alone, or with its
    folder's where two have the same."""
    networks = settings.networks
    models = [networks.student_model, *([networks.teacher_model] if settings.needs_teacher else [])]
    files = [*map(class_file, settings.methods.values()), *map(module_file, models)]
    found: dict[str, str] = {}
    for path in dict.fromkeys(files):
        if path is not None and path.is_file():
            name = shown(path)
            found[f".../{path.parent.name}/{name}" if name in found else name] = sha256(path)
    return found


def is_own_code(name: str) -> bool:
    """Whether the revision of this code tells what is in a file, unless it was changed."""
    return name.split("/")[0] in CODE


def class_file(cls: type[Distiller]) -> Path | None:
    """Where a method is written; None for one that was typed in."""
    try:
        return Path(inspect.getsourcefile(cls) or "").resolve()
    except (TypeError, OSError):
        return None


def shown(path: Path) -> str:
    """A file's name without the folders of this machine."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def differing(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """{"code of FILE": (start of the old SHA-256, of the new one)} of the files that both have and that differ."""
    return {f"code of {name}": (before[name][:7], now[name][:7]) for name in sorted(before.keys() & now.keys())
            if before[name] != now[name]}
