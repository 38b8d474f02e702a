"""The tables of scores, costs and classes, in Markdown."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from textwrap import fill

from tools.markdown import spread, table
from tools.reporting.cautions import WIDTH, bullets, notes, time_notes, warnings
from tools.reporting.figures import INTERVAL_SEEDS, Clock, Figures, Gain, coverage, figures
from tools.reporting.groups import KD, PLAIN, Group, chosen_on

NOTHING = "-"
#: an interval is told to be too narrow where it holds the true gain in this share of cases or less
NARROW = 0.93
#: header, and the cell of a row
Column = tuple[str, Callable[[Figures], str]]


def number(value: float | None, form: str, missing: str = NOTHING) -> str:
    """A figure, or what stands for one that is not known."""
    return missing if value is None else format(value, form)


def gain_text(one: Gain | None, seeds: int) -> str:
    """'+1.20 [+0.40, +2.00]', of a row with so many seeds. The number of those that count where it is another one, and
    of both sides where they have none in common."""
    if one is None:
        return NOTHING
    text = f"{one.mean:+.2f}"
    if one.interval is not None:
        text += " [{:+.2f}, {:+.2f}]".format(*one.interval)
    if not one.paired:
        return f"{text} (n {one.seeds[0]}, {one.seeds[1]})"
    return text if one.seeds[0] == seeds else f"{text} (n {one.seeds[0]})"


def title(group: Group, what: str, brief: bool) -> str:
    """The lines above a table; brief: without the networks and the size of the training."""
    teachers = dict.fromkeys(row.teacher for row in group.shown if row.teacher)
    learned = f", teacher {', '.join(teachers)}" if teachers else ""
    more = "" if brief else f", student {group.student}{learned}; {training_size(group)}"
    return fill(f"`{group.protocol}` ({group.dataset}{more}), {what}:", WIDTH, break_long_words=False,
                break_on_hyphens=False)


def training_size(group: Group) -> str:
    """Crop, batch and iterations of the baseline, else of the first row that is shown."""
    run = (group.plain or group.shown[0]).runs[0]
    crop = " × ".join(map(str, run["settings"]["crop_size"]))
    return f"crop {crop}, batch {run['settings']['batch_size']}, {run['iterations']} iterations"


def parts(*texts: str) -> str:
    """Paragraphs, without empty ones."""
    return "\n\n".join(filter(None, texts))


def assemble(text: str, columns: Sequence[Column], rows: Sequence[Figures], remarks: Sequence[str]) -> str:
    """Title, table and remarks."""
    body = [[cell(row) for _, cell in columns] for row in rows]
    return parts(text, table([header for header, _ in columns], body), bullets(remarks))


def gains(group: Group, brief: bool = False) -> str:
    """Scores and what each row is above the baseline, above KD and above plain training of the same duration.

    brief: without KD, without what stands beside the last, and without notes; warnings stay."""
    clock = Clock.of(group)
    rows = figures(group, clock)
    columns: list[Column] = [
        ("run", lambda f: f.name), ("n", lambda f: str(len(f.scores))),
        (f"mIoU {group.split} %", lambda f: spread(f.scores, ".2f")),
        *(chosen_column(group) if not brief else ()),
        (f"over `{PLAIN}`", lambda f: gain_text(f.plain, len(f.scores)))]
    if not brief:
        columns.append((f"over `{KD}`", lambda f: gain_text(f.kd, len(f.scores))))
    columns.append(("at equal time", lambda f: gain_text(f.same_time and f.same_time.gain, len(f.scores))))
    if not brief:
        columns += [("plain run", lambda f: f.same_time.plain.label if f.same_time else NOTHING),
                    ("plain's time", lambda f: f"{f.same_time.ratio:.2f}×" if f.same_time else NOTHING),
                    ("iterations", lambda f: f.iterations)]
    if not brief and any(f.published is not None for f in rows):
        columns += [("published", lambda f: number(f.published, ".2f")),
                    ("difference", lambda f: number(f.difference, "+.2f"))]
    remarks = [*warnings(group), *([] if brief else [*few_seeds(rows), *notes(group), *time_notes(group, clock)])]
    return assemble(title(group, f"mean ± standard deviation over n seeds{interval_text(rows)}", brief), columns, rows,
                    remarks)


def chosen_column(group: Group) -> list[Column]:
    """Scores on the split that chose the models, where all were chosen on one and another one is reported."""
    splits = {chosen_on(run) for row in (*group.teachers, *group.shown) for run in row.runs}
    if len(splits) != 1 or group.split in splits:
        return []
    split = splits.pop()
    return [(f"{split} %", lambda f: spread(list(f.row.scores(split).values()), ".2f"))]


def all_gains(rows: Sequence[Figures]) -> list[Gain]:
    """Those that have an interval."""
    return [one for f in rows for one in (f.plain, f.kd, f.same_time and f.same_time.gain) if one and one.interval]


def interval_text(rows: Sequence[Figures]) -> str:
    """What stands in brackets in a table, for its title."""
    seeds = [min(one.seeds) for one in all_gains(rows)]
    if not seeds:
        return ""
    return " [bootstrap interval, of few seeds]" if coverage(min(seeds)) <= NARROW else " [95 % bootstrap interval]"


def few_seeds(rows: Sequence[Figures]) -> list[str]:
    """What an interval of few seeds is worth, where the table has one."""
    few = sorted({n for one in all_gains(rows) if coverage(n := min(one.seeds)) <= NARROW})
    if not few:
        return []
    worth = ", ".join(f"{100 * coverage(n):.0f} ({n} seeds)" for n in few)
    text = f"Intervals of few seeds are too narrow: they hold the true gain in about {worth} of 100 cases, not in 95."
    return [f"{text} Those of three seeds reach from the smallest difference to the largest."
            if INTERVAL_SEEDS in few else text]


def cost(group: Group, brief: bool = False) -> str:
    """Iterations, times, speeds, memory; brief: without the first."""
    clock = Clock.of(group)
    columns: list[Column] = [("run", lambda f: f.name)]
    if not brief:
        columns += [("n", lambda f: str(len(f.scores))), ("iterations", lambda f: f.iterations)]
    columns += [(clock.unit, lambda f: number(f.seconds, ".0f", NOTHING if clock.cpu else "busy")),
                (f"× `{PLAIN}`", lambda f: number(f.times_plain, ".2f")),
                (f"images/{clock.unit}", lambda f: number(f.speed, ".1f")),
                ("peak memory MB", lambda f: number(f.memory, ".0f"))]
    return assemble(title(group, "training without validation, mean over n seeds; memory: the most", brief), columns,
                    figures(group, clock), time_notes(group, clock))


def classes(group: Group, brief: bool = False) -> str:
    """IoU of every class, a column per row of the group; brief: without rows whose label is not their method."""
    rows = [row for row in (*group.teachers, *group.shown)
            if not brief or row in group.teachers or row.label == row.method]
    columns = [row.iou_per_class(group.split) for row in rows]
    body = [[name, *(f"{column[i]:.1f}" for column in columns)] for i, name in enumerate(group.classes)]
    means = [list(row.scores(group.split).values()) for row in rows]
    body.append(["mIoU", *(f"{sum(scores) / len(scores):.1f}" for scores in means)])
    return parts(title(group, f"IoU on {group.split} in percent, mean over the seeds", brief),
                 table(["class", *map(group.name, rows)], body), bullets(warnings(group)))
