"""The pages say what is so: their links, flags and methods exist, and the README stays short."""
from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path

import pytest
from helpers import ROOT

from engine import eval_settings
from engine.settings import build_parser
from losses.core import methods
from utils.options import OptionGroup, flag, options_of

PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")), "data/README.md",
         "pretrained_ckpt/README.md")
TOOLS = (*(f"tools.{path.stem}" for path in sorted((ROOT / "tools").glob("*.py"))), "dataset.toy_streets.__main__")
#: of torchrun and sbatch, and of the README's example of a method
OTHER_FLAGS = {"--nproc_per_node", "--nodes", "--max-restarts", "--lambda-cosine", "--cosine-margin"}
NAMES = list(methods())


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def flags_of(group: type[OptionGroup]) -> set[str]:
    """Every spelling of every setting of a group."""
    names = [(one.kind, name) for one in options_of(group) for name in (one.name, *one.aliases)]
    return {flag(name) for _, name in names} | {f"--no-{flag(name)[2:]}" for kind, name in names if kind is bool}


@cache
def known_flags() -> set[str]:
    """The flags of all programs and tools."""
    modules = [eval_settings, *map(importlib.import_module, TOOLS)]
    groups = {x for module in modules for x in vars(module).values()
              if isinstance(x, type) and issubclass(x, OptionGroup)}
    return set(build_parser()._option_string_actions).union(*map(flags_of, groups))


@cache
def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S),
                          re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def section(page: str, heading: str) -> str:
    """What stands below a heading of level 2."""
    match = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text(page), re.MULTILINE | re.DOTALL)
    assert match, f"{page} has no section {heading}"
    return match[1]


def test_the_readme_is_short() -> None:
    assert len(text("README.md").splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_and_images_point_to_something(page) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        if not re.match(r"https?://", target):
            name, _, anchor = target.partition("#")
            path = (ROOT / page).parent / name if name else ROOT / page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page) -> None:
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*\w", text(page))) - OTHER_FLAGS
    assert not {x for x in flags if x.replace("_", "-") not in known_flags()}


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_described_with_its_terms_options_and_preset(name) -> None:
    assert f"[`{name}`](docs/methods.md#{name})" in text("README.md")
    page, cls = section("docs/methods.md", name), methods()[name]
    words = [flag(x) for x in (*(t.setting for t in cls.terms), *(one.name for one in options_of(cls.Options)))]
    words += [f"{flag(setting)} {str(value).lower() if isinstance(value, bool) else f'{value:g}'}"
              for values in cls.preset.values() for setting, value in values.items()]
    flat = " ".join(page.split())
    assert not [word for word in words if f"`{word}`" not in flat]
    assert cls.paper in flat and str(cls.year) in flat
