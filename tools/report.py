#!/usr/bin/env python3
"""Tables of README and docs from the results of runs, and the same figures as CSV and LaTeX.

    python tools/report.py                  fill every block <!-- report: KIND PROTOCOL --> of the pages
    python tools/report.py --check          write nothing; exit with 1 and name the blocks that are out of date
    python tools/report.py --protocol NAME --csv FILE --latex FILE

What the tables say, and how a block is written: docs/evidence.md.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.results import read_results
from tools.reporting.export import csv_text, latex_text
from tools.reporting.groups import Result, check_unique, groups
from tools.reporting.pages import fill
from utils.cli import parse_options, run_main
from utils.errors import UserError
from utils.files import check_target, write_text
from utils.options import OptionGroup, option

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Options(OptionGroup):
    """The command line."""
    results: str | None = option(None, "folder of the results (default: results/ of this repository)", metavar="DIR")
    pages: tuple[str, ...] = option((), "pages to fill (default: README.md and docs/*.md of this repository)",
                                    nargs="+", metavar="FILE")
    check: bool = option(False, "write nothing; exit with 1 when a block is out of date, and name it")
    protocol: str | None = option(None, "protocol of --csv and --latex", metavar="NAME")
    split: str | None = option(None, "split of --csv and --latex (default: one that did not choose the best models, "
                                     "where there is one)", metavar="NAME")
    csv: str | None = option(None, "write the figures of one protocol there, and no pages", metavar="FILE")
    latex: str | None = option(None, "write its table there, and no pages", metavar="FILE")

    def __post_init__(self) -> None:
        super().__post_init__()
        exports = [name for name in ("csv", "latex") if getattr(self, name)]
        if bool(exports) != bool(self.protocol):
            raise UserError("--protocol NAME goes with --csv FILE or --latex FILE, and these with it")
        if exports and (self.check or self.pages):
            raise UserError(f"--{exports[0]} writes no pages: drop --check and --pages")
        if self.split and not exports:
            raise UserError("--split goes with --csv FILE or --latex FILE; a block of a page has split=NAME")


def load(folder: Path) -> list[Result]:
    """Every result below a folder. UserError when one cannot be read or two hold the same run."""
    results = read_results(folder)
    check_unique(results)
    return results


def export(options: Options, results: Sequence[Result]) -> None:
    """Write the figures of one protocol as CSV, as LaTeX or both."""
    found = groups(results, options.protocol, split=options.split)
    for name, text_of in (("csv", csv_text), ("latex", latex_text)):
        if getattr(options, name):
            path = Path(getattr(options, name))
            check_target(path, f"--{name}", is_folder=False)
            write_text(path, text_of(found))
            print(f"wrote {path}")


def update(pages: Sequence[Path], results: Sequence[Result], check: bool) -> int:
    """Fill or check the blocks of pages. Returns the exit code: 1 for a check that found some out of date.

    Nothing is written when any page has a block that cannot be filled."""
    filled = []
    for page in pages:
        try:
            text = page.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--pages {page}: expected a text file that can be read ({error})") from error
        name = str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else str(page)
        filled.append((page, *fill(text, name, results)))
    stale = [f"{line}: {'out of date' if check else 'rewritten'}" for *_, lines in filled for line in lines]
    print("\n".join(stale) or "every table of the pages agrees with the results")
    if check:
        return 1 if stale else 0
    for page, text, lines in filled:
        if lines:
            write_text(page, text)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Fill, check or export. Returns the exit code."""
    options = parse_options(Options, argv, prog="report.py", description=__doc__.split("\n")[0])
    folder = Path(options.results) if options.results else ROOT / "results"
    if options.results and not folder.is_dir():
        raise UserError(f"--results {folder}: expected a folder of results, as train_kd.py --results writes it")
    results = load(folder)
    if options.protocol:
        export(options, results)
        return 0
    pages = [Path(page) for page in options.pages] or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return update(pages, results, options.check)


if __name__ == "__main__":
    sys.exit(run_main(main))
