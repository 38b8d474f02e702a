#!/usr/bin/env python3
"""Try faults on tiny runs and count those that are survived; see run.sh."""
from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from reliability.cases import CASES
from reliability.runs import Material

from tools.markdown import table
from utils.cli import parse_options, run_main
from utils.errors import UserError
from utils.files import write_text
from utils.options import OptionGroup, option

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- reliability: begin -->", "<!-- reliability: end -->"


@dataclass(frozen=True, kw_only=True)
class Options(OptionGroup):
    """The command line."""
    out: str = option("runs/reliability", "folder of the results and of the runs", metavar="DIR")
    only: tuple[str, ...] = option((), f"these cases: {', '.join(case.__name__ for case in CASES)}", metavar="CASE")
    short: bool = option(False, "a few seconds of it, and no table in the docs")


def results_of(path: Path) -> list[dict]:
    """What earlier calls have found."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def written(found: list[dict]) -> str:
    """The table of all results."""
    rows = [[one["fault"], str(one["tries"]), str(one["survived"])] for one in found]
    total = [str(sum(one[name] for one in found)) for name in ("tries", "survived")]
    return table(["fault", "tries", "survived"], [*rows, ["all", *total]])


def put_into_page(text: str, page: Path = PAGE) -> None:
    """Replace what stands between the marks of a page."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{page}: expected the marks {BEGIN} and {END}")
    write_text(page, f"{before}{begin}\n{text}\n{end}{after}")


def main(argv: list[str] | None = None) -> int:
    """Run the cases that have not been run. Returns the exit code: 1 when something was not survived."""
    options = parse_options(Options, argv, prog="run.py", description=__doc__.split("\n")[0])
    if unknown := set(options.only) - {case.__name__ for case in CASES}:
        raise UserError(f"--only {' '.join(sorted(unknown))}: expected {', '.join(case.__name__ for case in CASES)}")
    torch.set_num_threads(1)
    folder = Path(options.out).resolve()
    path, material = folder / "results.jsonl", Material(folder / "runs")
    folder.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        if options.only and case.__name__ not in options.only:
            continue
        if any(one["case"] == case.__name__ and one["last"] for one in results_of(path)):
            continue
        kept = [one for one in results_of(path) if one["case"] != case.__name__]  # a case that was cut off starts again
        write_text(path, "".join(json.dumps(one) + "\n" for one in kept))
        found = []
        for fault, tries, survived in case(material, options.short):
            found.append({"case": case.__name__, "fault": fault, "tries": tries, "survived": survived, "last": False})
            print(f"{fault}: {survived} of {tries}", file=sys.stderr, flush=True)
            write_text(path, "".join(json.dumps(one) + "\n" for one in kept + found))
        if found:
            found[-1]["last"] = True
            write_text(path, "".join(json.dumps(one) + "\n" for one in kept + found))
        if not options.short:
            put_into_page(written(results_of(path)))
    results = results_of(path)
    print(written(results))
    return 0 if results and all(one["tries"] == one["survived"] > 0 for one in results) else 1


if __name__ == "__main__":
    sys.exit(run_main(main))
