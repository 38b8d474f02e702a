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
from reliability.runs import Fault, Material

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
    tries: int = option(20, "of each kind of kill; what is there already counts", at_least=1, metavar="N")
    short: bool = option(False, "a few seconds of it, and no table in the docs")


class Results:
    """What was found, by case and fault, in a file that holds it after every attempt."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        self.rows = {(row["case"], row["fault"]): row for row in map(json.loads, lines)}

    def tries(self, case: str, fault: str) -> int:
        """How often it was tried."""
        return self.rows.get((case, fault), {}).get("tries", 0)

    def add(self, case: str, fault: str, tries: int, survived: int, note: str) -> None:
        """Count an attempt."""
        row = self.rows.setdefault((case, fault), {"case": case, "fault": fault, "tries": 0, "survived": 0})
        row["tries"] += tries
        row["survived"] += survived
        row["note"] = note
        write_text(self.path, "".join(json.dumps(one) + "\n" for one in self.rows.values()))

    def table(self) -> str:
        """All of them, and their sum, in the order of the cases."""
        order = [case.__name__ for case in CASES]
        rows = sorted(self.rows.values(), key=lambda row: order.index(row["case"]))
        lines = [[row["fault"] + (f": {row['note']}" if row.get("note") else ""), str(row["tries"]),
                  str(row["survived"])] for row in rows]
        total = [str(sum(row[name] for row in rows)) for name in ("tries", "survived")]
        return table(["fault", "tries", "survived"], [*lines, ["all", *total]])


def try_all(faults: list[tuple[str, Fault]], results: Results) -> None:
    """One attempt of every fault in turn, until each has the tries that are wanted."""
    while left := [(case, fault) for case, fault in faults if results.tries(case, fault.name) < fault.tries]:
        for case, fault in left:
            tries, survived, note = fault.attempt(results.tries(case, fault.name))
            if not tries:
                raise RuntimeError(f"{fault.name}: nothing came of it")
            results.add(case, fault.name, tries, survived, note)
            print(f"{fault.name}: {survived} of {tries} {note}".rstrip(), file=sys.stderr, flush=True)


def put_into_page(text: str, page: Path = PAGE) -> None:
    """Replace what stands between the marks of a page."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{page}: expected the marks {BEGIN} and {END}")
    write_text(page, f"{before}{begin}\n{text}\n{end}{after}")


def publish(faults: list[tuple[str, Fault]], results: Results, page: Path = PAGE) -> None:
    """Put the table into a page when every fault has been tried; else say what is missing."""
    missing = dict.fromkeys(case for case, fault in faults if not results.tries(case, fault.name))
    if missing:
        print(f"{page} stays as it is: {results.path} has not all of {', '.join(missing)}", file=sys.stderr)
    else:
        put_into_page(results.table(), page)


def main(argv: list[str] | None = None) -> int:
    """Try what has not been tried. Returns the exit code: 1 when something was not survived."""
    options = parse_options(Options, argv, prog="run.py", description=__doc__.split("\n")[0])
    if unknown := set(options.only) - {case.__name__ for case in CASES}:
        raise UserError(f"--only {' '.join(sorted(unknown))}: expected {', '.join(case.__name__ for case in CASES)}")
    torch.set_num_threads(1)
    folder = Path(options.out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    material, results = Material(folder / "reliability-runs"), Results(folder / "results.jsonl")
    faults = [(case.__name__, fault) for case in CASES for fault in case(material, options.short, options.tries)]
    try_all([(case, fault) for case, fault in faults if not options.only or case in options.only], results)
    if not options.short:
        publish(faults, results)
    print(results.table())
    return 0 if results.rows and all(row["tries"] == row["survived"] > 0 for row in results.rows.values()) else 1


if __name__ == "__main__":
    sys.exit(run_main(main))
