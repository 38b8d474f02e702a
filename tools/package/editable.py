"""``afdcd`` of an editable installation: every module is read from the clone, as its files are at that time."""
from __future__ import annotations

import sys
import tomllib
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType

from afdcd.clone import CLONE
from afdcd.rewrite import commands, is_ours, rewritten

_COMMANDS = commands(tomllib.loads(Path(CLONE, "pyproject.toml").read_text())["project"]["scripts"])


class _Loader(SourceFileLoader):
    """Loads a file of the clone as a module of the package."""

    def get_code(self, fullname: str) -> CodeType:
        """Compiled anew: a file kept beside the source would be that of the clone's own module."""
        path = self.get_filename(fullname)
        return self.source_to_code(rewritten(self.get_data(path), _COMMANDS), path)


class _Finder(MetaPathFinder):
    """Finds what no file of this folder is."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if not fullname.startswith(f"{__name__}.") or not is_ours(module := fullname.removeprefix(f"{__name__}.")):
            return None
        base = Path(CLONE, *module.split("."))
        init, file = base / "__init__.py", base.with_name(f"{base.name}.py")
        if base.is_dir() and not init.is_file():
            spec = ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations.append(str(base))
            return spec
        found = next((str(path) for path in (init, file) if path.is_file()), None)
        return found and spec_from_file_location(fullname, found, loader=_Loader(fullname, found))


sys.meta_path.insert(0, _Finder())
