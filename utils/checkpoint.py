"""The full training state on disk: written atomically, read with ``weights_only``."""
from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.errors import UserError
from utils.files import write_atomically

FORMAT = 1


def versions() -> dict[str, str]:
    """Versions that a result depends on, for the checkpoint and the saved configuration."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state (tensors, numbers, strings, lists, dicts) to ``path``, atomically; UserError if not."""
    try:
        write_atomically(path, lambda p: torch.save({"format": FORMAT, "versions": versions(), **state}, p))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(f"{path}: the training state could not be written ({str(error).splitlines()[0]})") from error


def load_state(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a training state written by :func:`save_state`. Raises :class:`UserError` for anything else."""
    if not path.is_file():
        raise UserError(f"--resume {path}: no such file (expected a training state '*_state.pth', or 'auto')")
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # the unpickler has no common base class for what it refuses
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--resume {path}: not readable as a training state ({first[:120]})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or "optimizer" not in state:
        raise UserError(f"--resume {path}: not a training state of this program (a plain weights file goes to "
                        "--student-pretrained)")
    return state
