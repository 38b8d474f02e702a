"""A run as its folder tells it: the saved configuration, and where its log lies now."""
from __future__ import annotations

import json
import os
from pathlib import Path

from engine.run_files import RunFiles
from engine.saved import config_of
from engine.settings import Settings, from_saved
from utils.errors import UserError


def read_settings(folder: Path, flag: str = "") -> Settings:
    """The settings of the run in a folder, its --save-dir; those that are newer than it have their defaults.

    flag: what named the folder, for messages. UserError for a folder without exactly one run."""
    path = config_of(folder, flag)
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a configuration of a run that can be read ({error})") from error
    return from_saved(saved, path)


def log_places(folder: Path, settings: Settings) -> list[Path]:
    """Where the JSON lines of a run may be: in its folder, where they lay relative to it when it ran, or where they
    were written."""
    written = settings.running.log_dir
    moved = Path(os.path.normpath(folder / os.path.relpath(written, settings.running.save_dir)))
    name = RunFiles(settings).json_log.name
    return [place / name for place in dict.fromkeys((folder, moved, Path(written)))]


def find_log(folder: Path, settings: Settings) -> Path | None:
    """The JSON lines of a run; None when they are in none of those places."""
    return next((path for path in log_places(folder, settings) if path.is_file()), None)
