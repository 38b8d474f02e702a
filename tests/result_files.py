"""Result files with chosen figures, in the form that ``engine.results`` writes."""
from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from engine.results import FORMAT, digest
from engine.run_files import plain
from engine.settings import parse_settings
from models import network_name
from utils.files import write_json

CLASSES = ["road", "car"]
TEACHER, STUDENT = ("deeplab_mobile", "mobilenetv2"), ("deeplabv3", "resnet18_w0.25")


@cache
def settings_of(flags: tuple[str, ...]) -> dict[str, Any]:
    return plain(parse_settings([*flags, "--workers", "1"]))


def score(split: str, kind: str, step: int, percent: float) -> dict[str, Any]:
    """A record of a validation: the second class is 10 points better than the first."""
    each = [(percent - 5) / 100, (percent + 5) / 100]
    return {"kind": kind, "step": step, "split": split, "seconds": 1.0, "mIoU": percent / 100,
            "mIoU_present": percent / 100, "pixAcc": 0.9, "mAcc": 0.5, "iou_per_class": each}


def make_result(label: str, seed: int, val: float, test: float | None = None, *, method: str | None = None,
                protocol: str = "p-1", dataset: str = "camvid", student: tuple[str, str] = STUDENT,
                teacher: tuple[str, str] = TEACHER, teacher_file: str = "t0", weights: str | None = None,
                iterations: int = 100, seconds: float = 50.0, cpu_seconds: float = 40.0, load: float | None = 1.0,
                others: int | None = None, stages: float = 0, flags: tuple[str, ...] = (), weight: float = 1.0,
                commit: str = "a" * 40, hardware: dict[str, Any] | None = None) -> dict[str, Any]:
    """A run of 8 images a step with these scores in percent and these times. label 'none...': plain training."""
    method = method or ("none" if label.startswith("none") else label)
    train = {"kind": "train", "step": iterations, "loss": 1.0, "raw": {"task": 1.0}, "weighted": {"task": 1.0},
             "seconds": seconds, "cpu_seconds": cpu_seconds, "images_per_second": 8 * iterations / seconds,
             "memory_mb": 500 + seed, "load": load, "others_mb": others}
    reports = [] if test is None else [score("test", "report", iterations, test)]
    before = {"kind": "stages", "step": 1, "seconds": stages, "cpu_seconds": stages}
    records = [before, train, score("val", "val", iterations, val), *reports]
    learned = None if method == "none" else {"model": teacher[0], "backbone": teacher[1], "sha256": teacher_file}
    return {
        "format": FORMAT, "protocol": protocol, "dataset": dataset, "teacher": learned,
        "student": {"model": student[0], "backbone": student[1], "parameters": 1000}, "method": method, "label": label,
        "seed": seed, "iterations": iterations, "active": {} if method == "none" else {"kd": 1.0, "fd": weight},
        "classes": CLASSES, **digest(records), "command": ["train_kd.py"],
        "settings": settings_of(("--method", "none", "--crop-size", "176", "--batch-size", "8", *flags)),
        "revision": {"commit": commit, "changed": False}, "versions": {},
        "hardware": {"cpu": "a CPU", "gpu": None, "processes": 1, "threads": 1, **(hardware or {})},
        "weights": {"last": "x", "best": weights or f"{protocol}/{label}/{seed}"}}


def write_results(folder: Path, results: list[dict[str, Any]]) -> Path:
    """Write them where runs would."""
    for one in results:
        teacher = network_name(one["teacher"]["model"], one["teacher"]["backbone"]) if one["teacher"] else "none"
        pair = f"{teacher}-{network_name(one['student']['model'], one['student']['backbone'])}"
        write_json(folder / one["protocol"] / one["dataset"] / pair / one["label"] / f"{one['seed']}.json", one)
    return folder


#: scores of an example on test, by seed
NONE, LONG, KD, OURS = (20.0, 22.0, 24.0), (30.0, 31.0, 32.0), (21.0, 22.0, 23.0), (25.0, 27.0, 29.0)


def runs(label: str, scores: tuple[float, ...], **more: Any) -> list[dict[str, Any]]:
    """A run per score on test, seeds 0, 1, ...; on val each has 50."""
    return [make_result(label, seed, 50, test, **more) for seed, test in enumerate(scores)]


def example() -> list[dict[str, Any]]:
    """A teacher, its students, and times on machines of their own: Af-DCD takes as long as the longer plain runs."""
    return [*runs("none", NONE), *runs("none-long", LONG, iterations=300, seconds=150), *runs("kd", KD, seconds=80),
            *runs("afdcd", OURS, seconds=160),
            make_result("none", 0, 70, 60, student=TEACHER, weights="t0", iterations=800)]


def cells(text: str) -> list[dict[str, str]]:
    """The rows of the only table of a text, {header: cell}."""
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
                        if line.startswith("|"))
    return [dict(zip(header, row, strict=True)) for row in rows]


def by_name(text: str) -> dict[str, dict[str, str]]:
    return {next(iter(row.values())): row for row in cells(text)}
