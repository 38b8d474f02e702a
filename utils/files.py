"""Writing files so that nothing is ever half-written."""
from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.errors import UserError

HOUR = 3600.0


def temporary_name(path: Path) -> Path:
    """Where this process writes what is to become ``path``."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path, stem: str) -> list[Path]:
    """Remove what killed processes have left half-written; what was removed.

    stem: beginning of the names of files that nobody else writes at this time; files of other names have to be
    untouched for an HOUR."""
    removed = []
    for path in folder.glob(".*.tmp"):
        try:
            left = path.name.startswith(f".{stem}") or time.time() - path.stat().st_mtime > HOUR
            if left and re.search(r"\.\d+\.tmp$", path.name):
                path.unlink()
                removed.append(path)
        except OSError:  # gone by itself, or another user's
            continue
    return removed


def write_atomically(path: Path, write: Callable[[Path], object], keep: Path | None = None) -> None:
    """Call ``write(temporary path)``, flush it to the disk and rename it to ``path``: never a half-written file.

    keep: what the file that was there becomes. (A process that is killed in that instant leaves it, and no ``path``.)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, atomically."""
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write a value as JSON, atomically. indent: None for a single line."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def readable_size(size: int) -> str:
    """Bytes in words: 29.2 GB, 0.5 MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def check_target(path: Path, flag: str, is_folder: bool) -> None:
    """`UserError` unless the file or folder can be written; nothing is created."""
    if path.exists() and path.is_dir() != is_folder:
        raise UserError(f"{flag} {path}: expected a {'folder' if is_folder else 'file'}")
    existing = path if is_folder else path.parent
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{flag} {path}: cannot be written, {existing} is not a folder that this user may write to")
