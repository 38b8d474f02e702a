"""The table of loss terms: what their values and gradients are in each third of a run, so whether they are alive."""
from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tools.markdown import table
from tools.reporting.groups import PLAIN, Group, Result, Row
from tools.reporting.tables import NOTHING, parts, title
from utils.errors import UserError

THIRDS = 3
Values = Mapping[str, Sequence[float | None]]


def terms(group: Group, brief: bool = False) -> str:
    """A row per term of every distilled row: weight, raw value in each third of the iterations; where runs have records
    of ``--diagnose-every``, its gradient on the student over the cross entropy's and the cosine of the two, in the
    first and the last third.

    Means over the seeds; of gradients and cosines the median in a third of a run. brief: without the cross entropies.
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
    raw = mean_thirds(row, "raw")
    gradient, cosine = ({term: mean(by_third(run, term, figure) for run in row.runs if run.get("diagnoses"))
                         for term in raw} for figure in ("gradient", "cosine"))
    found = []
    for term, values in raw.items():
        if brief and term in ("task", "aux"):
            continue
        cells = [group.name(row), term, f"{weights[term]:g}" if term in weights else NOTHING, *map(shown, values)]
        if measured:
            cells += [NOTHING if value is None else f"{value:.2f}"
                      for own in (gradient[term], cosine[term]) for value in (own[0], own[-1])]
        found.append(cells)
    for name, values in mean_thirds(row, "diagnostics").items():
        found.append([group.name(row), name.split("/")[-1], NOTHING, *map(shown, values),
                      *[NOTHING] * (4 if measured else 0)])
    return found


def mean_thirds(row: Row, kind: str) -> dict[str, list[float | None]]:
    """{name: its mean in each third} of what every run of a row has logged, over the runs."""
    names = dict.fromkeys(name for run in row.runs for name in run["losses"].get(kind, {}))
    return {name: mean(thirds(run, run["losses"][kind][name]) for run in row.runs
                       if name in run["losses"].get(kind, {})) for name in names}


def thirds(run: Result, values: Sequence[float]) -> list[float | None]:
    """Means of a curve of ``losses`` over the thirds of the iterations."""
    parts_of = split(run["losses"]["step"], run["iterations"])
    return [statistics.fmean(values[i] for i in own) if own else None for own in parts_of]


def by_third(run: Result, term: str, figure: str) -> list[float | None]:
    """Medians of a figure of the diagnoses over the thirds of the iterations."""
    records: Sequence[Mapping[str, Any]] = run["diagnoses"]
    found = []
    for own in split([r["step"] for r in records], run["iterations"]):
        values = [v for i in own if (v := records[i]["terms"].get(term, {}).get(figure)) is not None]
        found.append(statistics.median(values) if values else None)
    return found


def split(steps: Sequence[int], iterations: int) -> list[list[int]]:
    """Indices of the steps in each third of so many iterations."""
    return [[i for i, step in enumerate(steps) if iterations * part < step * THIRDS <= iterations * (part + 1)]
            for part in range(THIRDS)]


def mean(curves: Iterable[Sequence[float | None]]) -> list[float | None]:
    """The mean of several lists of thirds; None where one of them has nothing, or where there is none."""
    columns = list(zip(*curves, strict=True)) or [()] * THIRDS
    return [statistics.fmean(column) if column and None not in column else None for column in columns]


def shown(value: float | None) -> str:
    """Four digits."""
    return NOTHING if value is None else f"{value:.4g}"
