"""How a module of this repository reads as a module of the package ``afdcd``.

Imports of its own modules get the package's name, folders are no longer put on the search path, and programs are
called by their commands in every text: ``tools/export.py`` is ``afdcd-export``. Lines keep their numbers.
"""
from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from itertools import accumulate

PACKAGE = "afdcd"
#: what the repository has at the top, as far as it becomes part of the package
FOLDERS = ("engine", "losses", "models", "dataset", "utils", "tools")
PROGRAMS = ("train_kd", "eval")


def is_ours(module: str | None) -> bool:
    """Whether a module's name is that of one of this repository."""
    return (module or "").partition(".")[0] in (*FOLDERS, *PROGRAMS)


def commands(scripts: Mapping[str, str]) -> dict[str, str]:
    """{path of a program: its command} from the ``[project.scripts]`` of pyproject.toml."""
    names = {command: entry.partition(":")[2] for command, entry in scripts.items()}
    return {f"{name}.py" if name in PROGRAMS else f"tools/{name}.py": command for command, name in names.items()}


def rewritten(source: bytes, programs: Mapping[str, str]) -> bytes:
    """The source of a module of the package. programs: see :func:`commands`."""
    starts = [0, *accumulate(map(len, source.splitlines(keepends=True)))]
    new, done = b"", 0
    for node in sorted(_affected(ast.parse(source)), key=lambda node: (node.lineno, node.col_offset)):
        start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        new += source[done:start] + _changed(node, source[start:end].decode(), programs).encode()
        done = end
    return new + source[done:]


def _affected(node: ast.AST) -> Iterator[ast.stmt | ast.keyword | ast.expr]:
    """The parts of a module that may change. None lies within another one."""
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.JoinedStr)) or _is_path_change(node) or \
            isinstance(node, ast.keyword) and node.arg == "prog" or \
            isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node
        return
    for child in ast.iter_child_nodes(node):
        yield from _affected(child)


def _is_path_change(node: ast.AST) -> bool:
    """Whether a statement puts a folder of the repository on the search path."""
    return isinstance(node, ast.Expr) and (call := ast.unparse(node)).startswith("sys.path.") and "__file__" in call


def _changed(node: ast.stmt | ast.keyword | ast.expr, text: str, programs: Mapping[str, str]) -> str:
    """The new text of a part of a module."""
    if isinstance(node, ast.Import):
        return "; ".join(map(_imported, node.names)) if any(is_ours(alias.name) for alias in node.names) else text
    if isinstance(node, ast.ImportFrom):
        return re.sub(r"^from\s+", rf"\g<0>{PACKAGE}.", text) if is_ours(node.module) else text
    if isinstance(node, ast.Expr):
        return "pass"
    if isinstance(node, ast.keyword):
        names = {path.rpartition("/")[2]: command for path, command in programs.items()}
        return re.sub(r'(?<=")[\w.]+(?="$)', lambda m: names.get(m[0], m[0]), text)
    # a name that is all of a string is no text, but one of a file
    return text if getattr(node, "value", None) in programs else in_texts(text, programs)


def _imported(alias: ast.alias) -> str:
    """A statement that binds what ``import`` of this name binds."""
    if not is_ours(alias.name) or alias.asname:
        return f"import {PACKAGE + '.' if is_ours(alias.name) else ''}{alias.name}" + \
            (f" as {alias.asname}" if alias.asname else "")
    top, dot, _ = alias.name.partition(".")
    return f"from {PACKAGE} import {top}" + (f"; import {PACKAGE}.{alias.name}" if dot else "")


def in_texts(text: str, programs: Mapping[str, str]) -> str:
    """A text with the package's names: of programs (under ``torchrun``, of their modules), modules and extras."""
    for path, command in programs.items():
        module = path.removesuffix(".py").replace("/", ".")
        text = re.sub(rf"(torchrun (--\w+ \w+ )*){re.escape(path)}\b", rf"\g<1>-m {PACKAGE}.{module}", text)
        text = re.sub(rf"(?<![\w/.-])(python )?{re.escape(path)}\b", command, text)
    text = re.sub(rf"(python -m |\bfrom )(?=({'|'.join(FOLDERS)})\.\w)", rf"\g<1>{PACKAGE}.", text)
    return text.replace("pip install -e '.[", f"pip install '{PACKAGE}[")


def tools_imported(source: bytes) -> set[str]:
    """The names below ``tools`` that a module imports: X of ``tools.X`` and ``tools.X.y``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("tools.")}
    return found
