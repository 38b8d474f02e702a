"""The page of a comparison: one HTML file with everything in it, made of the files ``page.*`` beside this one."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from plotly.offline import get_plotlyjs

from dataset import SegmentationDataset
from engine.results import folder_of_images
from tools.comparison import figures
from tools.comparison.answers import Answers, by_change, row_shares
from tools.comparison.pictures import ERRORS, as_css, views
from tools.comparison.runs import TrainedRun, differences, only_distilled, unfair
from tools.reporting.figures import seconds_of
from utils.files import sha256
from utils.machine import revision
from utils.visualize import IGNORE_COLOR


@dataclass(frozen=True)
class Comparison:
    """What a page shows. runs: {role: run}, "plain" and "distilled" and, where its run is known, "teacher". answers:
    {role: answers on the data set}, in the order "teacher" (unless the method has none), "plain", "distilled"."""

    runs: Mapping[str, TrainedRun]
    dataset: SegmentationDataset
    answers: Mapping[str, Answers]


def build_page(comparison: Comparison, images: int) -> str:
    """The HTML of a page with so many of the images that change most."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(percent=percent, points=points)
    spec, plain, distilled = comparison.dataset.spec, comparison.runs["plain"], comparison.runs["distilled"]
    drawn, shown = draw(comparison), shots(comparison, images)
    return environment.get_template("page.html").render(
        roles=list(comparison.answers), answers=comparison.answers, spec_title=spec_title(comparison),
        split=comparison.dataset.split, count=len(comparison.dataset), method=distilled.method, gain=gain(comparison),
        terms=active_terms(distilled), iterations={role: run.digest["iterations"] for role, run in
                                                   comparison.runs.items()},
        seeds={role: run.settings.optimization.seed for role, run in comparison.runs.items()},
        unfair=unfair(plain, distilled), differences=differences(plain, distilled),
        only_distilled=only_distilled(plain, distilled), figures=drawn,
        class_rows=class_rows(comparison), bars_left_out=spec.num_class > figures.MOST_BARS,
        time_ratio=time_ratio(comparison, cpu=False), processor_ratio=time_ratio(comparison, cpu=True),
        cost_roles=list(ordered_runs(comparison)), cost_rows=cost_rows(comparison),
        shots=shown, commit=revision()["commit"], legend=legend(comparison, shown),
        error_legend=[(name, as_css(color)) for name, color in ERRORS.values()], plotly=get_plotlyjs())


def percent(fraction: float | None, digits: int = 1) -> str:
    """A fraction in percent, without the sign of it: "25.9"; a dash for None."""
    return "–" if fraction is None else f"{100 * fraction:.{digits}f}"


def points(difference: float | None, digits: int = 1) -> str:
    """A difference of fractions in points, with its sign: "+5.4", "−0.3"; a dash for None."""
    return "–" if difference is None else f"{100 * difference:+.{digits}f}".replace("-", "−")


def spec_title(comparison: Comparison) -> str:
    """The data set in words; of an own folder its name, without where it lies."""
    dataset = comparison.dataset
    return dataset.spec.title if dataset.spec.name != "folder" else f"{Path(dataset.root).resolve().name} (own images)"


def gain(comparison: Comparison) -> float:
    """mIoU of the distilled student less that of the plain one, a fraction."""
    return comparison.answers["distilled"].result["mIoU"] - comparison.answers["plain"].result["mIoU"]


def active_terms(run: TrainedRun) -> list[tuple[str, str]]:
    """(term, weight) of the terms that count in a run."""
    return [(term, f"{weight:g}") for term, weight in run.settings.active.items()]


def ordered_runs(comparison: Comparison) -> dict[str, TrainedRun]:
    """The runs in the order of the page."""
    return {role: comparison.runs[role] for role in ("teacher", "plain", "distilled") if role in comparison.runs}


def time_ratio(comparison: Comparison, cpu: bool) -> float:
    """How many times as long the distilled run trained as the plain one, with what it learned before; cpu: in processor
    time."""
    plain, distilled = (seconds_of(comparison.runs[role].digest, cpu) for role in ("plain", "distilled"))
    return distilled / max(plain, 1e-9)


def draw(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """{name: specification} of every figure that the runs give."""
    answers, runs, classes = comparison.answers, comparison.runs, comparison.dataset.spec.classes
    students = ("plain", "distilled")
    drawn = {"classes": figures.class_bars(classes, {r: a.result["iou_per_class"] for r, a in answers.items()})}
    shares = {role: row_shares(answers[role].confusion) for role in students}
    drawn |= {f"confusion-{role}": figures.confusion(classes, shares[role]) for role in students}
    drawn["confusion-change"] = figures.confusion_change(classes, shares["plain"], shares["distilled"])
    losses = figures.terms({role: runs[role].digest["losses"] for role in students})
    drawn |= {f"terms-{role}": figure for role, figure in losses.items()}
    curves = {role: runs[role].digest["curve"] for role in students if runs[role].digest["curve"]}
    if curves:
        drawn["validation"] = figures.validation(curves, goal(runs))
    return {name: figures.as_json(figure) for name, figure in drawn.items()}


def goal(runs: Mapping[str, TrainedRun]) -> float | None:
    """The teacher's best mIoU, a fraction, where its run is known and was validated on the students' images."""
    def images(run: TrainedRun) -> tuple:
        data = run.settings.data
        return (data.dataset, folder_of_images(run.settings.flat()), data.selection_split,
                data.val_list and Path(data.val_list).name)

    if "teacher" not in runs or images(runs["teacher"]) != images(runs["distilled"]):
        return None
    return max((point["mIoU"] for point in runs["teacher"].digest["curve"]), default=None)


def class_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Of every class: name, share of the labeled pixels, IoU by role, and the change by distillation."""
    results = {role: one.result for role, one in comparison.answers.items()}
    total = max(results["plain"]["labelled_pixels"], 1)
    rows = []
    for k, name in enumerate(comparison.dataset.spec.classes):
        iou = {role: result["iou_per_class"][k] for role, result in results.items()}
        rows.append({"name": name, "share": results["plain"]["label_pixels"][k] / total, "iou": iou,
                     "change": iou["distilled"] - iou["plain"]})
    return rows


def cost_rows(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """(what, a value per run) of networks, time, speed and memory, from the logs of the runs."""
    runs = ordered_runs(comparison)

    def row(title: str, value) -> tuple[str, list[str]]:
        return title, [value(role, run.digest) for role, run in runs.items()]

    return [
        row("network", lambda role, _: comparison.answers[role].name),
        row("parameters", lambda role, _: f"{comparison.answers[role].parameters / 1e6:.2f} M"),
        row("iterations", lambda _, log: f"{log['iterations']:,}".replace(",", " ")),
        row("training time", lambda _, log: duration(seconds_of(log, cpu=False))),
        row("processor time in training", lambda _, log: duration(seconds_of(log, cpu=True))),
        row("validation time", lambda _, log: duration(log["seconds"]["validation"])),
        row("images per second, median", lambda _, log: f"{log['images_per_second']:.1f}"),
        row("peak memory", lambda _, log: f"{log['peak_memory_mb']:,} MB".replace(",", " ")),
        row("load of the machine, median", lambda _, log: "–" if log["load"] is None else f"{log['load']:.1f}"),
        row("weights, SHA-256", lambda role, _: sha256(runs[role].weights)[:12]),
    ]


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them: "46.2 s", "5.2 min", "3.1 h"."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def shots(comparison: Comparison, images: int) -> list[dict[str, Any]]:
    """The images that distillation changes most: name, both students' scores, {title: source} of the views, and the
    classes that occur in them."""
    answers, dataset = comparison.answers, comparison.dataset
    plain, distilled = answers["plain"].scores, answers["distilled"].scores
    found = []
    for i in by_change(plain, distilled)[:images]:
        item, maps = dataset[i], {role: one.prediction(i) for role, one in answers.items()}
        occurring = {int(k) for x in (item["label"].numpy(), *maps.values()) for k in np.unique(x) if k >= 0}
        found.append({"name": dataset.samples[i].name, "plain": plain[i], "distilled": distilled[i],
                      "change": distilled[i].miou - plain[i].miou, "classes": occurring,
                      "views": views(item, maps, dataset.spec.palette)})
    return found


def legend(comparison: Comparison, shown: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(name, color) of the classes that occur in the pictures, and of pixels without a label."""
    spec, occurring = comparison.dataset.spec, set().union(*(shot["classes"] for shot in shown))
    entries = [(spec.classes[k], as_css(spec.palette[k])) for k in sorted(occurring)]
    return [*entries, ("not labeled", as_css(IGNORE_COLOR))]
