"""The table of validation curves: how far a row has come at each quarter of its run."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tools.markdown import spread, table
from tools.reporting.cautions import bullets, warnings
from tools.reporting.groups import Group, Result, chosen_on
from tools.reporting.tables import NOTHING, parts, title

QUARTERS = 4


def curve(group: Group, brief: bool = False) -> str:
    """A line per row: mIoU on the split that chooses, in percent, at each quarter of the iterations, and what the last
    quarter adds; mean ± standard deviation over the seeds. brief: a shorter title.

    Between two validations the score is that of the line through them; before the first one there is none ('-')."""
    body = []
    for row in group.shown:
        runs = [quarters(run) for run in row.runs]
        added = [None if None in (before, end) else end - before for *_, before, end in runs]
        body.append([group.name(row), str(len(runs)), ", ".join(map(str, row.values(lambda run: run["iterations"]))),
                     *(cell(column) for column in zip(*runs, strict=True)), cell(added)])
    header = ["run", "n", "iterations", *(f"{i}/{QUARTERS}" for i in range(1, QUARTERS)), "end", "last quarter adds"]
    splits = dict.fromkeys(chosen_on(run) for row in group.shown for run in row.runs)
    text = f"mIoU on {', '.join(map(str, splits))} in percent at each quarter of the run"
    return parts(title(group, text, brief), table(header, body), bullets(warnings(group)))


def quarters(run: Result) -> list[float | None]:
    """The score at each quarter of the iterations, in percent; None before the first validation and after the last."""
    steps, scores = [one["step"] for one in run["curve"]], [100 * one["mIoU"] for one in run["curve"]]
    wanted = [run["iterations"] * part / QUARTERS for part in range(1, QUARTERS + 1)]
    return [float(np.interp(step, steps, scores)) if steps and steps[0] <= step <= steps[-1] else None
            for step in wanted]


def cell(values: Sequence[float | None]) -> str:
    """Mean ± standard deviation over the seeds."""
    return NOTHING if None in values else spread(values, ".1f")
