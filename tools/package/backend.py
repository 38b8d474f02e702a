"""The build backend (PEP 517 and 660) of this repository, whose folders become one package, ``afdcd``.

What the console commands of pyproject.toml need is copied, rewritten (``rewrite.py``), and built by setuptools. An
editable installation holds only ``editable.py``, which does the same to every module that is imported.
"""
from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rewrite import FOLDERS, PACKAGE, commands, rewritten, tools_imported
from setuptools import build_meta

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
#: kinds of files that a package consists of
KINDS = (".py", ".cpp", ".toml", ".html", ".css", ".js")
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
COMMANDS = commands(tomllib.loads(PROJECT)["project"]["scripts"])


def build_wheel(directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """Write the wheel into a folder; its name."""
    return _build(build_meta.build_wheel, directory, package_files(), config_settings)


def build_sdist(directory: str, config_settings: Any = None) -> str:
    """Write the sdist into a folder; its name. It holds the package as it is installed, so that any tool builds it."""
    return _build(build_meta.build_sdist, directory, package_files(), config_settings)


def build_editable(directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """Write the wheel of an editable installation into a folder; its name."""
    files = {name: (HERE / name).read_bytes() for name in ("commands.py", "rewrite.py")}
    files |= {"__init__.py": (HERE / "editable.py").read_bytes(),
              "clone.py": f'"""Where the clone is."""\nCLONE = {str(ROOT)!r}\n'.encode()}
    return _build(build_meta.build_wheel, directory, files, config_settings)


def _build(build: Callable[..., str], directory: str, files: Mapping[str, bytes], config_settings: Any) -> str:
    """Let setuptools build a package of these files. files: {path in the package: content}."""
    target = str(Path(directory).resolve())
    ours = f'build-backend = "{Path(__file__).stem}"\nbackend-path = ["{HERE.relative_to(ROOT).as_posix()}"]\n'
    if ours not in PROJECT:
        raise ValueError(f"pyproject.toml: expected the lines {ours!r}")
    around = {"pyproject.toml": PROJECT.replace(ours, 'build-backend = "setuptools.build_meta"\n').encode(),
              **{name: (ROOT / name).read_bytes() for name in ("README.md", "LICENSE")}}
    with TemporaryDirectory() as folder:
        for name, content in {**around, **{f"{PACKAGE}/{name}": content for name, content in files.items()}}.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        with chdir(folder):
            return build(target, config_settings)


def package_files() -> dict[str, bytes]:
    """{path in the package: content}: the programs, the folders, and of the tools what these import. ValueError,
    naming it, for a file that is not Python."""
    files = {"__init__.py": (HERE / "init.py").read_bytes(), "commands.py": (HERE / "commands.py").read_bytes(),
             "tools/__init__.py": b""}
    todo = [ROOT / name for name in (*COMMANDS, *FOLDERS) if name != "tools"]
    while todo:
        for path in _files(todo.pop()):
            name = path.relative_to(ROOT).as_posix()
            if name in files:
                continue
            content = path.read_bytes()
            if path.suffix == ".py":
                try:
                    todo += [_tool(tool) for tool in tools_imported(content)]
                except SyntaxError as error:
                    raise ValueError(f"{path}, line {error.lineno}: cannot be parsed ({error.msg}); every .py file of "
                                     "this folder becomes part of the package") from error
                content = rewritten(content, COMMANDS)
            files[name] = content
    return files


def _files(unit: Path) -> Iterator[Path]:
    """What belongs to the package of a file or a folder: nothing hidden, and no folder that is no package."""
    if not unit.is_dir():
        yield unit
        return
    for path in sorted(unit.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and (path / "__init__.py").is_file() or path.suffix in KINDS and path.is_file():
            yield from _files(path)


def _tool(name: str) -> Path:
    """The folder or file of ``tools.NAME``."""
    folder = ROOT / "tools" / name
    return folder if folder.is_dir() else folder.with_suffix(".py")
