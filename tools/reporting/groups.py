"""Results sorted into what may be compared: one protocol, data set and student; a row per label and teacher."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from models import network_name
from utils.errors import UserError

#: one result file, as ``engine.results`` reads it
Result = Mapping[str, Any]
PLAIN, KD = "none", "kd"


@dataclass(frozen=True, eq=False)
class Row:
    """The runs of one label and teacher (None: none), by seed."""
    label: str
    teacher: str | None
    runs: tuple[Result, ...]

    @property
    def method(self) -> str:
        """The method of the runs; 'none' for plain training."""
        return self.runs[0]["method"]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, in order."""
        return tuple(run["seed"] for run in self.runs)

    def scores(self, split: str, key: str = "mIoU") -> dict[int, float]:
        """{seed: score of the best model on a split, in percent}."""
        return {run["seed"]: 100 * run["scores"][split][key] for run in self.runs}

    def iou_per_class(self, split: str) -> list[float]:
        """IoU of every class on a split in percent, mean over the seeds."""
        columns = zip(*(run["scores"][split]["iou_per_class"] for run in self.runs), strict=True)
        return [100 * sum(column) / len(column) for column in columns]

    def values(self, read: Callable[[Result], Any]) -> list[Any]:
        """What differs among the runs: the distinct values, in the order of the seeds."""
        return list(dict.fromkeys(map(read, self.runs)))


@dataclass(frozen=True)
class Group:
    """What may be compared. split: the one whose scores are reported, chosen: the one that chose the best models.

    rows: all of them, which gains are measured against; shown: those that tables list. teachers: the trainings of the
    teachers' networks; exact: whether they made the very files that were learned from.
    """
    protocol: str
    dataset: str
    student: str
    split: str
    rows: tuple[Row, ...]
    shown: tuple[Row, ...]
    teachers: tuple[Row, ...] = ()
    exact: bool = True

    @property
    def classes(self) -> list[str]:
        """The names of the classes."""
        return self.rows[0].runs[0]["classes"]

    @property
    def plain(self) -> Row | None:
        """The re-trained baseline: the row of the label 'none'."""
        return next((row for row in self.rows if row.label == PLAIN and row.method == PLAIN), None)

    @property
    def shows_teachers(self) -> bool:
        """Whether a label alone does not say which row is meant."""
        return len({row.teacher for row in self.rows if row.teacher}) > 1

    @property
    def compared(self) -> tuple[Row, ...]:
        """What is shown and what that is measured against."""
        return tuple(row for row in self.rows if row in self.shown or row.method == PLAIN or row.label == KD)

    def kd_of(self, row: Row) -> Row | None:
        """The row of KD alone from the same teacher; from any, where the row has none and there is one of KD."""
        found = [one for one in self.rows if one.label == KD and row.teacher in (None, one.teacher)]
        return found[0] if len(found) == 1 else None

    def name(self, row: Row) -> str:
        """What tables call a row."""
        return f"{row.label} ({row.teacher})" if self.shows_teachers and row.teacher else row.label


def network(part: Mapping[str, str] | None) -> str | None:
    """The name of the teacher or the student of a result."""
    return network_name(part["model"], part["backbone"]) if part else None


def where(run: Result) -> str:
    """A run, for messages."""
    parts = (run["protocol"], run["dataset"], f"{network(run['teacher']) or PLAIN}-{network(run['student'])}",
             run["label"], run["seed"])
    return "/".join(map(str, parts))


def check_unique(results: Sequence[Result]) -> None:
    """UserError when two files hold the same run: a copy would count twice."""
    for name, same in groupby(sorted(map(where, results))):
        if len(list(same)) > 1:
            raise UserError(f"two result files hold the run {name}: expected one, as train_kd.py --results writes it")


def groups(results: Sequence[Result], protocol: str, *, dataset: str | None = None, student: str | None = None,
           teacher: str | None = None, split: str | None = None, labels: Sequence[str] = ()) -> list[Group]:
    """The groups of a protocol, of one data set or student only where one is named, in the order of their names.

    teacher: that of the rows that have one. split: None for one that did not choose the best models, where there is
    one. labels: the rows wanted, in this order (default: all). Without a student, trainings of the teachers' networks
    are no group of their own.
    UserError: nothing there, or no score of the split.
    """
    chosen = [run for run in results if run["protocol"] == protocol and dataset in (None, run["dataset"])
              and student in (None, network(run["student"]))]
    teachers = {(run["dataset"], network(run["teacher"])) for run in chosen if run["teacher"]}
    found: dict[tuple[str, str], list[Result]] = {}
    for run in chosen:
        if teacher is None or network(run["teacher"]) in (None, teacher):
            found.setdefault((run["dataset"], network(run["student"])), []).append(run)
    kept = {key: runs for key, runs in sorted(found.items())
            if student or key not in teachers or any(run["method"] != PLAIN for run in runs)}
    if not kept or teacher and not any(network(run["teacher"]) == teacher for runs in kept.values() for run in runs):
        filters = {"dataset": dataset, "student": student, "teacher": teacher}
        raise UserError(" ".join([f"no results of protocol {protocol!r}", *(
            f"with {name} {value!r}" for name, value in filters.items() if value)]))
    return [_group(results, runs, split, labels) for runs in kept.values()]


def _group(results: Sequence[Result], runs: Sequence[Result], split: str | None, labels: Sequence[str]) -> Group:
    first, rows = runs[0], _rows(runs)
    known = {row.label for row in rows}
    missing = [label for label in labels if label not in known]
    if missing:
        raise UserError(f"no row {', '.join(missing)} in protocol {first['protocol']!r}: expected of "
                        f"{', '.join(sorted(known))}")
    shown = sorted((row for row in rows if row.label in labels), key=lambda row: labels.index(row.label))
    if any(run["classes"] != first["classes"] for run in runs):
        raise UserError(f"{where(first)} and others of its protocol differ in their classes: expected the same ones")
    reported = _reported_split(runs, split)
    return Group(first["protocol"], first["dataset"], network(first["student"]), reported, tuple(rows),
                 tuple(shown or rows), *_teachers(results, runs, reported))


def _rows(runs: Iterable[Result]) -> list[Row]:
    """The baseline first, then longer plain runs, KD, and the methods by name."""

    def order(run: Result) -> tuple:
        plain = run["method"] == PLAIN
        return (not plain, run["label"] not in (PLAIN, KD), run["label"], network(run["teacher"]) or "", run["seed"])

    found: dict[tuple[str, str | None], list[Result]] = {}
    for run in sorted(runs, key=order):
        found.setdefault((run["label"], network(run["teacher"])), []).append(run)
    rows = [Row(label, teacher, tuple(same)) for (label, teacher), same in found.items()]
    for row in rows:
        if len(row.values(lambda run: run["method"])) > 1:
            raise UserError(f"{where(row.runs[0])} and others of its label differ in their method: expected one")
    return rows


def chosen_on(run: Result) -> str | None:
    """The split that chose the best model; None without validation."""
    return next(iter(run["scores"]), None)  # `digest` writes it first


def _reported_split(runs: Sequence[Result], wanted: str | None) -> str:
    """The split that is asked for; else one that every run has and none was chosen on; else the one that chose."""
    for run in runs:
        if not run["scores"]:
            raise UserError(f"{where(run)} has no scores: expected a run with validation, without --skip-val")
    common = [name for name in runs[0]["scores"] if all(name in run["scores"] for run in runs)]
    if wanted is not None and wanted not in common:
        lacking = next(where(run) for run in runs if wanted not in run["scores"])
        raise UserError(f"{lacking} has no scores of split {wanted!r}: expected one of {', '.join(common) or 'none'}")
    if not common:
        raise UserError(f"the runs beside {where(runs[0])} have no split in common that they were scored on")
    chosen = {chosen_on(run) for run in runs}
    return wanted or next((name for name in common if name not in chosen), common[0])


def _teachers(results: Sequence[Result], runs: Sequence[Result], split: str) -> tuple[tuple[Row, ...], bool]:
    """The trainings that made the files that the runs learned from, found by their hashes in any protocol; else those
    of the same networks, in the protocol or else in any, and False."""
    files = {run["teacher"]["sha256"] for run in runs if run["teacher"]}  # None: not a file
    names = {network(run["teacher"]) for run in runs if run["teacher"]}
    plain = [run for run in results if run["method"] == PLAIN and split in run["scores"]
             and run["dataset"] == runs[0]["dataset"] and network(run["student"]) in names]
    made = [run for run in plain if files.intersection(run["weights"].values())]
    exact = files <= {file for run in made for file in run["weights"].values()}
    if not exact:
        same = [run for run in plain if run["label"] == PLAIN]
        made = [run for run in same if run["protocol"] == runs[0]["protocol"]] or same
    sources: dict[tuple[str, str, str], list[Result]] = {}
    made = sorted(made, key=lambda run: run["protocol"] == runs[0]["protocol"])  # of equal ones the last is taken
    for run in {run["weights"].get("best", where(run)): run for run in made}.values():
        sources.setdefault((network(run["student"]), run["protocol"], run["label"]), []).append(run)
    rows = [Row("teacher" if len(sources) == 1 else f"teacher {'/'.join(key)}", None,
                tuple(sorted(same, key=lambda run: run["seed"]))) for key, same in sorted(sources.items())]
    return tuple(rows), exact or not rows
