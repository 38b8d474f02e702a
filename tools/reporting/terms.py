"""The table of loss terms: what their values and gradients are in each third of a run, so whether they are alive."""
from __future__ import annotations

import statistics
from collections.abc import Sequence

from tools.diagnose import spans
from tools.markdown import table
from tools.reporting.groups import PLAIN, Group, Result, Row
from tools.reporting.tables import number, parts, title
from utils.errors import UserError

THIRDS = 3


def terms(group: Group, brief: bool = False) -> str:
    """A row per term of every distilled row: weight, raw value in each third of the iterations; where runs have records
    of ``--diagnose-every``, its gradient on the student over the cross entropy's and the cosine of the two, in the
    first and the last third.

    Means over the seeds; of gradients and cosines the medians that ``tools/diagnose.py`` tells of a run. brief: without
    the cross entropies.
    UserError when no distilled row is shown."""
    rows = [row for row in group.shown if row.method != PLAIN]
    if not rows:
        raise UserError(f"protocol {group.protocol!r}: no distilled row to show the terms of")
    measured = any(run.get("diagnoses") for row in rows for run in row.runs)
    body = [line for row in rows for line in lines(group, row, measured, brief)]
    header = ["run", "term", "weight", *(f"value, {part} third" for part in ("first", "second", "last"))]
    text = "raw values of the terms, mean over the seeds"
    if measured:
        header += [f"{figure}, {part}" for figure in ("gradient", "cosine") for part in ("first", "last")]
        text += "; gradient on the student over the cross entropy's, and the cosine of the two"
    return parts(title(group, text, brief), table(header, body))


def lines(group: Group, row: Row, measured: bool, brief: bool) -> list[list[str]]:
    """The table's rows of one row."""
    weights = {"task": 1.0, "aux": row.runs[0]["settings"]["aux_weight"], **row.runs[0]["active"]}
    parts_of_runs = [list(spans(run["diagnoses"]).values()) for run in row.runs if run.get("diagnoses")]
    found = []
    for kind in ("raw", "diagnostics"):
        for name, values in mean_thirds(row, kind).items():
            cells = [group.name(row), name.split("/")[-1], number(weights.get(name), "g"),
                     *(number(value, ".4g") for value in values)]
            if measured:
                cells += [number(mean_of([own[i].get(name, {}).get(figure) for own in parts_of_runs]), ".2f")
                          for figure in ("gradient", "cosine") for i in (0, -1)]
            if not (brief and name in ("task", "aux")):
                found.append(cells)
    return found


def mean_thirds(row: Row, kind: str) -> dict[str, list[float | None]]:
    """{name: its mean in each third of the iterations, over the runs} of what the runs of a row have logged."""
    found: dict[str, list[list[float | None]]] = {}
    for run in row.runs:
        for name, values in run["losses"].get(kind, {}).items():
            found.setdefault(name, []).append(thirds(run, values))
    return {name: [mean_of(column) for column in zip(*own, strict=True)] for name, own in found.items()}


def thirds(run: Result, values: Sequence[float]) -> list[float | None]:
    """Means of a curve of ``losses`` over the thirds of the iterations."""
    steps, whole = run["losses"]["step"], run["iterations"]
    return [mean_of([value for step, value in zip(steps, values, strict=True)
                     if whole * part < step * THIRDS <= whole * (part + 1)]) for part in range(THIRDS)]


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean; None where there is nothing, or where one is not known."""
    return statistics.fmean(values) if values and None not in values else None
