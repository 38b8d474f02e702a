"""The console commands of the package: ``predict`` runs ``afdcd.tools.predict``, and ``eval`` runs ``afdcd.eval``."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec

from afdcd.utils.cli import run_main


def __getattr__(name: str) -> Callable[[], int]:
    """The command of a program; only this program is imported."""
    if name.startswith("__"):  # asked for by the import system
        raise AttributeError(name)
    module = next((module for module in (f"afdcd.{name}", f"afdcd.tools.{name}") if find_spec(module)), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no command {name!r}")
    return partial(run_main, import_module(module).main)
