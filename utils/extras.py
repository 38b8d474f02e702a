"""Packages that only some tools use: imported when they are asked for, named when they are missing."""
from __future__ import annotations

import importlib
from types import ModuleType

from utils.errors import UserError


def need(module: str, extra: str) -> ModuleType:
    """Import an optional package. extra: of ``pyproject.toml``, which installs it. UserError when it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{module.partition('.')[0]} cannot be imported ({' '.join(str(error).split())}): "
                        f"pip install -e '.[{extra}]'") from error
