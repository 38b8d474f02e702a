"""Lets the code be imported on a machine without some of its packages: what needs one of them fails when it is used."""
from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

#: packages for images on disk and for progress bars
OPTIONAL = ("cv2", "tqdm", "PIL")


class Absent(types.ModuleType):
    """Stands for a package that is not installed: its names can be imported, but calling one raises."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)  # whoever looks for the package gets an answer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ModuleNotFoundError(f"{self.__name__.split('.')[0]} is not installed, and {self.__name__} was needed")


MISSING = tuple(name for name in OPTIONAL if importlib.util.find_spec(name) is None)
sys.modules.update((name, Absent(name)) for name in MISSING)
