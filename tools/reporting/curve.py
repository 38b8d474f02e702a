"""The table of validation curves: how far a row has come at each quarter of its run, and is it flat at the end."""
from __future__ import annotations

from collections.abc import Sequence

from tools.markdown import spread, table
from tools.reporting.groups import Group, Result, chosen_on
from tools.reporting.tables import NOTHING, parts, title

QUARTERS = 4


def curve(group: Group, brief: bool = False) -> str:
    """A line per row: mIoU on the split that chooses, in percent, at each quarter of the iterations, and what the last
    quarter has added; mean ± standard deviation over the seeds. brief: a shorter title.

    '-' where some seed was not validated in the quarter."""
    body = []
    for row in group.shown:
        runs = [quarters(run) for run in row.runs]
        added = [None if None in (before, end) else end - before for *_, before, end in runs]
        body.append([group.name(row), str(len(runs)), str(row.runs[0]["iterations"]),
                     *(cell(column) for column in zip(*runs, strict=True)), cell(added)])
    header = ["run", "n", "iterations", *(f"{i}/{QUARTERS}" for i in range(1, QUARTERS)), "end", "last quarter adds"]
    splits = dict.fromkeys(chosen_on(run) for row in group.shown for run in row.runs)
    text = f"mIoU on {', '.join(map(str, splits))} in percent at each quarter of the run"
    return parts(title(group, text, brief), table(header, body))


def quarters(run: Result) -> list[float | None]:
    """The last score inside each quarter of the iterations, in percent; None where there is none."""
    found: list[float | None] = [None] * QUARTERS
    for one in run["curve"]:
        found[(one["step"] * QUARTERS - 1) // run["iterations"]] = 100 * one["mIoU"]
    return found


def cell(values: Sequence[float | None]) -> str:
    """Mean ± standard deviation over the seeds."""
    return NOTHING if None in values else spread(values, ".1f")
