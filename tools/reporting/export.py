"""The figures of a protocol as CSV and as LaTeX."""
from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

from tools.reporting.cautions import commit, time_notes, warnings
from tools.reporting.figures import Clock, Figures, Gain, figures, had_machine
from tools.reporting.groups import KD, PLAIN, Group, network
from tools.reporting.tables import few_seeds, gain_text, training_size

#: what the training of a teacher, plain as it is, has in the column of the method
TEACHER = "teacher"
#: characters that LaTeX takes for something else
SPECIAL = {**{character: f"\\{character}" for character in "_%&#${}"}, "~": r"\textasciitilde{}",
           "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}


def csv_text(groups: Sequence[Group]) -> str:
    """A line per row of every group, figures unrounded; empty: there is none, or it is not known.

    A teacher's row is no row of the group's student: its own network stands in the column of the student, and
    :data:`TEACHER` in that of the method."""
    lines = [csv_line(group, one, clock) for group in groups for clock in [Clock.of(group)]
             for one in figures(group, clock)]
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def csv_line(group: Group, one: Figures, clock: Clock) -> dict[str, object]:
    """{column: value} of a row. Several values of one cell are separated by spaces."""
    row, same = one.row, one.same_time
    student, method = group.student, row.method
    if row in group.teachers:
        student, method = network(row.runs[0]["student"]), TEACHER
    return {
        "protocol": group.protocol, "dataset": group.dataset, "student": student, "teacher": row.teacher,
        "label": row.label, "method": method, "n": len(row.seeds), "seeds": joined(row.seeds),
        "split": group.split, "miou": one.mean, "miou_std": one.std, **gain_cells(PLAIN, one.plain),
        **gain_cells(KD, one.kd), "equal_time_run": same and same.plain.label,
        "equal_time_ratio": same and same.ratio, **gain_cells("equal_time", same and same.gain),
        "published": one.published, "difference": one.difference,
        "iterations": joined(row.values(lambda run: run["iterations"])), "clock": clock.unit, "seconds": one.seconds,
        "had_machine": all(map(had_machine, row.runs)), "images_per_second": one.speed,
        "peak_memory_mb": one.memory, "commits": joined(row.values(commit))}


def gain_cells(name: str, one: Gain | None) -> dict[str, object]:
    """The columns of a gain."""
    low, high = one.interval if one and one.interval else (None, None)
    return {f"over_{name}": one and one.mean, f"over_{name}_low": low, f"over_{name}_high": high,
            f"over_{name}_paired": one and one.paired}


def joined(values: Sequence[object]) -> str:
    """Values of one cell."""
    return " ".join(map(str, values))


def escape(text: str) -> str:
    """A text for LaTeX."""
    return "".join(SPECIAL.get(character, character) for character in text)


def latex_text(groups: Sequence[Group]) -> str:
    """A tabular of booktabs per group; warnings and notes on the times as comments."""
    return "% \\usepackage{booktabs}\n" + "\n".join(map(latex_table, groups))


def latex_table(group: Group) -> str:
    """Mean and standard deviation, gains with their intervals, the plain run of equal time and its time as a share,
    time, memory; published figures and the differences to them where there are some."""
    clock = Clock.of(group)
    rows = figures(group, clock)
    has_published = any(one.published is not None for one in rows)
    head = ["run", "$n$", rf"mIoU {escape(group.split)} (\%)", f"over {PLAIN}", f"over {KD}", "at equal time",
            "plain run", clock.unit, "memory (MB)", *(["published", "difference"] if has_published else [])]
    body = [" & ".join(latex_cells(one, has_published)) + r" \\" for one in rows]
    remarks = [text.replace("*", "") for text in (*warnings(group), *few_seeds(rows), *time_notes(group, clock))]
    about = f"{group.protocol}: {group.dataset}, student {group.student}, mIoU on {group.split}; {training_size(group)}"
    return "\n".join([*(f"% {text}" for text in (about, *remarks)), rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
                      r"\toprule", " & ".join(head) + r" \\", r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""])


def latex_cells(one: Figures, has_published: bool) -> list[str]:
    """A line of :func:`latex_table`."""
    same, seeds = one.same_time, len(one.scores)
    score = f"${one.mean:.2f}$" if one.std is None else rf"${one.mean:.2f} \pm {one.std:.2f}$"
    cells = [escape(one.name), f"${seeds}$", score,
             *(latex_gain(gain, seeds) for gain in (one.plain, one.kd, same and same.gain)),
             rf"{escape(same.plain.label)} (${same.ratio:.2f}\times$)" if same else "--",
             latex_number(one.seconds, ".0f"), latex_number(one.memory, ".0f")]
    return cells + ([latex_number(one.published, ".2f"), latex_number(one.difference, "+.2f")] if has_published else [])


def latex_number(value: float | None, form: str) -> str:
    """A figure in math mode, or '--'."""
    return "--" if value is None else f"${value:{form}}$"


def latex_gain(one: Gain | None, seeds: int) -> str:
    """'$+1.20$ $[+0.40, +2.00]$', with what :func:`tools.reporting.tables.gain_text` says of seeds."""
    if one is None:
        return "--"
    value, _, rest = gain_text(one, seeds).partition(" ")
    math = re.sub(r"\[.*\]", lambda found: f"${found[0]}$", rest)
    return f"${value}$ {math}".rstrip()
