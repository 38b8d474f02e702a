"""Who may import whom, and what the losses know nothing of: the command line and the form of its settings."""
from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = [path for pattern in ("*.py", "[!.]*/**/*.py") for path in ROOT.glob(pattern)]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text())
           for path in FILES if ROOT / "tests" not in path.parents}
PACKAGES = {name.split(".")[0] for name in MODULES}
LOSSES = {name: list(ast.walk(tree)) for name, tree in MODULES.items() if name.split(".")[0] == "losses"}
BELOW = {"models", "utils"}
ENGINE = {"engine", "losses", "dataset", *BELOW}
#: what the modules of a package may import of this repository; the longest name counts, "" is a program
MAY_IMPORT = {
    "utils": {"utils"}, "models": BELOW, "dataset": {"dataset", "utils"}, "engine": ENGINE, "": ENGINE,
    "tools": PACKAGES, "losses.__init__": {"losses", *BELOW},
    "losses": {"losses.core", "losses.kernels", "losses.stages", *BELOW},
    "losses.kernels": {"losses.kernels", "utils"}, "losses.core": {"losses.core", "losses.kernels", *BELOW},
    "losses.stages": {"losses.core", "losses.stages", *BELOW}}


def is_in(module: str, package: str) -> bool:
    return not package or f"{module}.".startswith(f"{package}.")


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module of this repository that a file imports, in functions too; "." for a relative import."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in submodules if name in MODULES or f"{name}.__init__" in MODULES]
            names = ["."] if node.level else modules or [node.module]
        yield from (name for name in names if name == "." or name.split(".")[0] in PACKAGES)


def test_imports_point_downwards():
    wrong = []
    for module, tree in MODULES.items():
        allowed = MAY_IMPORT[max((law for law in MAY_IMPORT if is_in(module, law)), key=len)]
        wrong += [f"{module}: {name}" for name in imports(tree) if not any(is_in(name, part) for part in allowed)]
    assert not wrong


def test_losses_know_no_command_line():
    wrong = [f"{module}: argparse" for module, nodes in LOSSES.items() for node in nodes
             if isinstance(node, (ast.Import, ast.ImportFrom)) and "argparse" in ast.unparse(node)]
    wrong += [f"{module}:{node.lineno} {flag}" for module, nodes in LOSSES.items() for node in nodes
              if isinstance(node, ast.Constant) and isinstance(node.value, str)
              for flag in re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", node.value)]
    assert not wrong


def test_losses_read_settings_as_attributes():
    """Each setting has one type and one default, so that nothing has to ask whether it is there."""
    calls = {f"{module}:{node.lineno}": ast.unparse(node.args[0]) for module, nodes in LOSSES.items()
             for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr"}
    assert not {call: of for call, of in calls.items() if re.search(r"\b(o|options|run|facts|context|args)$", of)}
