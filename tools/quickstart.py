#!/usr/bin/env python3
"""The main job in small: toy streets, the same student plain, with Af-DCD and with DIST, a table and pictures.

    python tools/quickstart.py                  one seed, a few minutes on two CPU cores
    python tools/quickstart.py --train-teacher  first train the teacher anew, which takes an hour

Safe to interrupt and to run again: finished parts are kept, an unfinished training goes on where it stopped. The
teacher is a file of this repository; the trainings are rows of the plan ``toy``.
"""
from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from dataset import SegmentationDataset, get_dataset_spec
from engine.evaluate import evaluate
from engine.results import add_weights, read_result
from models import NetworkChoice, save_state_dict
from tools import compare
from tools.markdown import spread
from tools.planning.painting import paint
from tools.planning.plan import ROOT, Expansion, Job, Places, read_plan
from tools.planning.runner import Runner
from tools.planning.status import DONE, status
from utils.cli import parse_options, run_main
from utils.distributed import available_cpus
from utils.errors import UserError
from utils.options import OptionGroup, option
from utils.visualize import comparison, save_rgb

ROWS = {"none": "student, plain", "afdcd-tuned": "student, Af-DCD", "dist": "student, DIST"}
#: test images that are shown
PICTURES = 4
#: what --short changes in the plan
SHORT = {"crop-size": [64, 96], "batch-size": 4, "max-iterations": 8, "val-per-iters": 4, "save-per-iters": 4}
SHORT_IMAGES = {"train": 8, "val": 4, "test": 8, "points": 20}


@dataclass(frozen=True)
class Options(OptionGroup):
    """The command line."""
    seeds: tuple[int, ...] = option((0,), "seeds: so many students of each row", at_least=0, metavar="N")
    out: str | None = option(None, "folder of the runs (default: runs/quickstart)", metavar="DIR")
    train_teacher: bool = option(False, "train the teacher anew, on 2000 streets, and replace its file; an hour")
    short: bool = option(False, "a few iterations on a few images: shows that everything works")


def run_jobs(jobs: list[Job], side_by_side: int) -> None:
    """Run what is not done yet. UserError when a run fails."""
    missing = [job for job in jobs if status(job).state != DONE]
    for job in jobs:
        if job not in missing:
            print(f"trained already: {job.name}")
    runner = Runner(missing, {job.name for job in jobs} - {job.name for job in missing}, side_by_side,
                    say=lambda line: print(line, flush=True))
    outcome = runner.run()
    if unfinished := [*outcome.failed, *outcome.stopped]:
        raise UserError(f"{unfinished[0]} has not come to its end: its message is above")


def train_teacher(places: Places, target: Path) -> None:
    """Train the teacher by the plan ``toy-teacher`` and write its file."""
    plan = read_plan("toy-teacher")
    paint(plan)
    job, = Expansion(plan, places).jobs()
    run_jobs([job], 1)
    write_half(job, target)
    print(f"teacher: {target}")


def write_half(job: Job, target: Path) -> None:
    """Write the network of a run again, the weights of its convolutions in float16: half as large. The run's result
    gets its hash."""
    networks, spec = job.settings.networks, get_dataset_spec(job.settings.data.dataset, ROOT / job.settings.data.data)
    net = replace(networks.student, pretrained=str(ROOT / job.best)).build(spec.num_class)
    for weight in net.parameters():
        if weight.ndim > 1:
            weight.data = weight.data.half()
    save_state_dict(net, target)
    add_weights(job.result, "half", target)


def toy_plan(short: bool) -> dict[str, Any]:
    """The plan of the students with the rows of the quickstart, without its scans."""
    plan = {key: entry for key, entry in read_plan("toy").items() if key != "scan"}
    plan["runs"] = {label: plan["runs"][label] for label in ROWS}
    if not short:
        return plan
    return {**plan, "protocol": "toy-short", "data": "data/toy_streets_short",
            "paint": {**plan["paint"], **SHORT_IMAGES}, "flags": {**plan["flags"], **SHORT}}


def look(choice: NetworkChoice, split: SegmentationDataset) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Scores of a network on a split, and its predictions for the first images."""
    seen: list[np.ndarray] = []
    net = choice.build(split.spec.num_class)
    scores = evaluate(net, split, device=torch.device("cpu"), on_prediction=lambda x, _: seen.append(x.numpy()),
                      prediction_limit=PICTURES)
    return scores, seen


def picture(path: Path, jobs: Mapping[str, Job]) -> dict[str, Any]:
    """A line per test image: image, truth, teacher, and the student of each row. Returns the teacher's scores."""
    distilled = jobs["dist"].settings
    data = ROOT / distilled.data.data
    split = SegmentationDataset(get_dataset_spec("toy_streets", data), data, "test", train=False)
    teacher = distilled.networks.teacher
    choices = {"teacher": replace(teacher, pretrained=str(ROOT / teacher.pretrained)), **{
        ROWS[label]: replace(job.settings.networks.student, pretrained=str(ROOT / job.best))
        for label, job in jobs.items()}}
    looks = {title: look(choice, split) for title, choice in choices.items()}
    items = [split[i] for i in range(PICTURES)]
    spec, heading = split.spec, f"Toy streets, {len(split)} test images, seed {distilled.optimization.seed}"
    save_rgb(path, comparison(
        [np.ascontiguousarray(item["image"].permute(1, 2, 0).numpy()[..., ::-1]) for item in items],
        [item["label"].numpy() for item in items], [seen for _, seen in looks.values()],
        [f"{title}\nmIoU {100 * scores['mIoU']:.1f} %" for title, (scores, _) in looks.items()],
        palette=spec.palette, classes=spec.classes, heading=heading))
    return looks["teacher"][0]


def page(path: Path, plain: Job, distilled: Job) -> Path:
    """Write the page that compares a distilled student with the plain one; returns its path."""
    with contextlib.chdir(ROOT):  # where the runs were, which the teacher's path is relative to
        compare.main(["--plain", str(plain.folder), "--distilled", str(distilled.folder), "--no-cuda",
                      "--data", str(ROOT / distilled.settings.data.data), "--out", str(path)])
    return path


def table(rows: Mapping[str, list[dict[str, Any]]]) -> str:
    """mIoU and pixel accuracy in percent: a line per row, mean ± standard deviation over seeds."""
    lines = [f"{'':18s}{'mIoU %':>14s}{'pixel accuracy %':>18s}"]
    for title, scores in rows.items():
        cells = [spread([100 * one[key] for one in scores], ".2f") for key in ("mIoU", "pixAcc")]
        lines.append(f"{title:18s}{cells[0]:>14s}{cells[1]:>18s}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the whole quickstart; returns the exit code."""
    options = parse_options(Options, argv, prog="quickstart.py", description="Distil a small network on toy streets.")
    out = Path(options.out or ROOT / "runs" / ("quickstart_short" if options.short else "quickstart"))
    places = Places.of(results=str(out / "results"), work=str(out / "work"))
    plan = toy_plan(options.short)
    start = time.perf_counter()
    if options.train_teacher:
        train_teacher(places, ROOT / plan["teachers"]["street"]["file"])
    paint(plan)
    jobs = Expansion(plan, places, options.seeds).jobs()
    run_jobs(jobs, min(2, available_cpus()))
    rows = {label: [job for job in jobs if job.settings.running.label == label] for label in ROWS}
    pictures = ROOT / places.results.parent / "pictures.png"
    teacher = picture(pictures, {label: same[0] for label, same in rows.items()})
    pages = [page(pictures.with_name(f"{label}.html"), rows["none"][0], rows[label][0])
             for label in ROWS if label != "none"]
    figures = {"teacher": [teacher], **{ROWS[label]: [read_result(job.result)["scores"]["test"] for job in same]
                                        for label, same in rows.items()}}
    minutes = (time.perf_counter() - start) / 60
    test, seeds = plan["paint"]["test"], ", ".join(map(str, options.seeds))
    print(f"\nToy streets, {test} test images, seeds {seeds}\n\n{table(figures)}\n\nPictures: {pictures}\nPages:    "
          + "\n          ".join(map(str, pages)) + f"\nRuns:     {ROOT / places.work}\nTime:     {minutes:.1f} min")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
