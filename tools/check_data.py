"""Check a data set before a long run: files that belong together, readable pictures, label values, class frequencies.

    python tools/check_data.py --dataset camvid --data data/CamVid
    python tools/check_data.py --dataset voc --data data/VOCAug --list train=train_aug.txt --list val=val.txt --all
    python tools/check_data.py --dataset folder --data mydata --all --json report.json --unlabelled more_images

Exit code 0 when everything that was read is fine, 2 (and one line on stderr) otherwise; warnings do not count.
"""
from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
from tqdm import tqdm

from dataset import DatasetSpec, get_dataset_spec, list_datasets
from dataset.discovery import Sample, find_samples, labels_without_image
from dataset.io import decode_pair, read_files
from dataset.spec import HOW_TO_SAY_VALUES, IGNORE
from dataset.unlabelled import SPLIT, unlabeled_spec
from utils.cli import parse_options, run_main
from utils.distributed import available_cpus
from utils.errors import UserError
from utils.files import check_target, write_json
from utils.options import OptionGroup, option
from utils.score import absent_classes

SHOWN = 20  # problems that are printed; all stand in the JSON file


@dataclass(frozen=True, kw_only=True)
class Settings(OptionGroup):
    """The command line."""
    dataset: str = option(MISSING, lambda: f"one of {', '.join(list_datasets())}")
    data: str = option(MISSING, "root folder of the data set", metavar="DIR")
    split: tuple[str, ...] = option((), "check this split only (may be repeated)", nargs="append", metavar="NAME")
    list: tuple[str, ...] = option((), "list file of a split", nargs="append", metavar="SPLIT=FILE")
    unlabelled: str | None = option(None, "check the images below this folder too, which have no labels", metavar="DIR",
                                    aliases=("unlabeled",))
    sample: int = option(20, "images to decode per split, evenly spread; 0: none", at_least=0, metavar="N")
    all: bool = option(False, "decode every image")
    json: Path | None = option(None, "write counts and every problem", metavar="FILE")
    workers: int | None = option(None, "threads that decode (default: one per CPU)", at_least=1)


class Problem(NamedTuple):
    """level: "error" or "warning". file: which one, None when it is none. message: in words, with the file."""

    level: str
    split: str
    file: str | None
    message: str


@dataclass
class SplitReport:
    """What was found in one split. pixels: int64 [K + 1], per class over what was decoded, ignored ones last; stored:
    int64 [256], per stored label value."""

    name: str
    labeled: bool
    published: int | None
    pixels: np.ndarray
    images: int = 0
    decoded: int = 0
    all_ignored: int = 0
    stored: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    problems: list[Problem] = field(default_factory=list)

    def add(self, level: str, file: str | None, message: str) -> None:
        """Note a problem down."""
        self.problems.append(Problem(level, self.name, file, message))


def list_files(entries: Sequence[str], spec: DatasetSpec) -> dict[str, str]:
    """`SPLIT=FILE` entries as {split: file}; UserError for anything else."""
    files = {}
    for entry in entries:
        split, _, path = entry.partition("=")
        if not path:
            raise UserError(f"--list {entry}; expected SPLIT=FILE")
        spec.split(split)
        files[split] = path
    return files


def check_split(spec: DatasetSpec, settings: Settings, split: str, list_file: str | None) -> SplitReport:
    """Find the files of a split, decode some or all of them, and note down whatever does not fit."""
    part = spec.split(split)
    report = SplitReport(split, bool(part.label_dir), part.published, np.zeros(spec.num_class + 1, np.int64))
    try:
        samples = find_samples(spec, settings.data, split, list_file,
                               lambda path, text: report.add("error", path, f"{path}: {text}"))
    except UserError as error:
        report.add("error", None, str(error))
        return report
    report.images = len(samples)
    for path, count in Counter(sample.image for sample in samples).items():
        if count > 1:
            report.add("warning", path, f"{path}: listed {count} times")
    if list_file is None:
        for path in labels_without_image(spec, settings.data, split):
            report.add("warning", path, f"{path}: a label without an image, which no training reads")
    wanted = len(samples) if settings.all else min(settings.sample, len(samples))
    spread = np.unique(np.linspace(0, len(samples) - 1, wanted).astype(int)) if wanted else ()
    decode(spec, [samples[index] for index in spread], report, settings.workers or available_cpus())
    judge_labels(spec, report)
    return report


def decode(spec: DatasetSpec, samples: Sequence[Sample], report: SplitReport, threads: int) -> None:
    """Decode samples in parallel, with a progress bar on a terminal, and count their pixels."""
    with ThreadPoolExecutor(threads) as pool, tqdm(total=len(samples), desc=f"check {report.name}", unit="img",
                                                   leave=False, disable=not sys.stderr.isatty()) as bar:
        try:
            for sample, found in zip(samples, pool.map(lambda one: look_at(spec, one), samples), strict=True):
                bar.update()
                report.decoded += 1
                if isinstance(found, str):
                    wrong = sample.label if sample.label and found.startswith(sample.label) else sample.image
                    report.add("error", wrong, found)
                else:
                    report.stored += found
                    report.all_ignored += int(report.labeled and not found[spec.id_to_train >= 0].any())
        finally:
            pool.shutdown(cancel_futures=True)
    np.add.at(report.pixels, spec.id_to_train, report.stored)  # ignored ones are -1, the last


def look_at(spec: DatasetSpec, sample: Sample) -> np.ndarray | str:
    """int64 [256], the pixels of a sample per stored label value; or what is wrong with it."""
    try:
        label = decode_pair(sample, *read_files(sample))[1]
        stored = np.zeros(256, np.int64) if label is None else np.bincount(label.ravel(), minlength=256)
        if (stored[~spec.known_ids] > 0).any():
            raise spec.unknown_value(sample.label, np.flatnonzero(stored))
    except UserError as error:
        return str(error)
    return stored


def judge_labels(spec: DatasetSpec, report: SplitReport) -> None:
    """Note down what the labels of a split lack as a whole."""
    if not report.labeled or not report.pixels.any():
        return
    complete, folder = report.decoded == report.images, spec.split(report.name).label_dir
    if not report.pixels[:-1].any():
        report.add("error" if complete else "warning", None, f"{report.name}: every pixel of the {report.decoded} "
                   f"labels that were decoded ({folder}) is ignored; expected pixels with a class")
    elif report.all_ignored:
        report.add("warning", None, f"{report.name}: {report.all_ignored} of {report.decoded} labels ({folder}) are "
                                    "ignored as a whole")
    absent = absent_classes({"label_pixels": report.pixels[:-1].tolist()}, spec.classes)
    present = np.count_nonzero(report.pixels[:-1])
    if absent and present and complete:
        report.add("warning", None, f"{report.name}: {absent}")
    if absent and spec.values_from_file and (present == 1 or present and complete):
        judge_ignored(spec, report)


def judge_ignored(spec: DatasetSpec, report: SplitReport) -> None:
    """Note down the ignored values of a split that lacks classes, which may be one of them, as 255 in masks of 0 and
    255."""
    values = np.flatnonzero((report.stored > 0) & (spec.id_to_train == IGNORE))
    if len(values):
        share = 100 * report.pixels[-1] / report.pixels.sum()
        report.add("warning", None, f"{report.name}: label value {', '.join(map(str, values))} ({share:.3g} % of the "
                                    f"pixels) is ignored; if it is a class, {HOW_TO_SAY_VALUES}")


def print_split(report: SplitReport) -> None:
    """One line about a split."""
    published = report.published
    note = "" if published is None else ", as published" if published == report.images else f", PUBLISHED: {published}"
    print(f"{report.name}: {report.images} images{note}{'' if report.labeled else ', no labels'}; {report.decoded} "
          "decoded")


def print_histogram(spec: DatasetSpec, counts: np.ndarray) -> None:
    """One line per class: share of the labeled pixels, and that of the ignored ones among all."""
    labeled = int(counts[:-1].sum())
    for train, name in enumerate(spec.classes):
        absent = "  (never present in the published labels)" if train in spec.absent_classes else ""
        print(f"{train:4d} {name:24s} {100 * counts[train] / max(labeled, 1):8.3f} %{absent}")
    print(f"     {'ignored (of all pixels)':24s} {100 * counts[-1] / max(int(counts.sum()), 1):8.3f} %")


def print_problems(problems: Sequence[Problem]) -> None:
    """A line for each of the first problems, errors before warnings."""
    for problem in problems[:SHOWN]:
        print(f"{problem.level}: {problem.message}")
    if len(problems) > SHOWN:
        print(f"and {len(problems) - SHOWN} more (--json FILE has all)")


def as_json(spec: DatasetSpec, settings: Settings, reports: Sequence[SplitReport],
            problems: Sequence[Problem]) -> dict[str, Any]:
    """The content of ``--json``."""
    return {"dataset": spec.name, "data": settings.data, "classes": list(spec.classes), "splits": {r.name: {
        "images": r.images, "published": r.published, "labeled": r.labeled, "decoded": r.decoded,
        "pixels_per_class": r.pixels[:-1].tolist(), "ignored_pixels": int(r.pixels[-1]),
        "labels_ignored_as_a_whole": r.all_ignored} for r in reports},
        "errors": sum(p.level == "error" for p in problems), "problems": [p._asdict() for p in problems]}


def wanted_splits(spec: DatasetSpec, settings: Settings, lists: dict[str, str]) -> Iterator[str]:
    """The splits that were asked for, or all; one that a training can do without may be absent."""
    for split in settings.split or spec.splits:
        part = spec.split(split)
        needed = bool(settings.split) or split in lists or split == spec.train_split or (
            split == spec.selection_split and part.published is not None)
        folders = [os.path.join(settings.data, folder) for folder in (part.image_dir, part.label_dir) if folder]
        if needed or any(map(os.path.isdir, folders)):
            yield split
        elif split == spec.selection_split:
            print(f"{split}: absent; train_kd.py needs --selection-split {spec.train_split} or --skip-val")
        else:
            print(f"{split}: absent")


def main(argv: Sequence[str] | None = None) -> int:
    """Check the splits, print what was found and write it down; UserError when something is wrong."""
    settings = parse_options(Settings, argv, prog="check_data.py", description=__doc__.split("\n")[0])
    if settings.json is not None:
        check_target(settings.json, "--json", is_folder=False)
    spec = get_dataset_spec(settings.dataset, settings.data)
    lists = list_files(settings.list, spec)
    print(f"{spec.title}: {spec.num_class} classes, {settings.data}")
    reports = []
    for split in wanted_splits(spec, settings, lists):
        reports.append(check_split(spec, settings, split, lists.get(split)))
        print_split(reports[-1])
    if settings.unlabelled is not None:
        reports.append(check_split(unlabeled_spec(spec), replace(settings, data=settings.unlabelled), SPLIT, None))
        print_split(reports[-1])
    counts = sum(report.pixels for report in reports if report.labeled)
    if np.any(counts):
        print_histogram(spec, counts)
    problems = sorted((p for r in reports for p in r.problems), key=lambda problem: problem.level)  # errors first
    errors = [problem.message for problem in problems if problem.level == "error"]
    print_problems(problems[len(errors) == 1:])  # a lone error is the last line, and stands nowhere else
    if settings.json is not None:
        write_json(settings.json, as_json(spec, settings, reports, problems))
    if errors:
        raise UserError(errors[0] if len(errors) == 1 else f"{len(errors)} errors, the first: {errors[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
