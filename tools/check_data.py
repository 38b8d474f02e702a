"""Check a data set before a long run: file counts, readable images, matching sizes, label values, class frequencies.

    python tools/check_data.py --dataset camvid --data data/CamVid
    python tools/check_data.py --dataset voc --data data/VOCAug --list train=train_aug.txt --list val=val.txt --all

Exit code 0 when everything that was read is fine, 2 (and one line on stderr) otherwise.
"""
from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

from dataset import DatasetSpec, SegmentationDataset, get_dataset_spec, list_datasets
from utils.cli import parse_options, run_main
from utils.errors import UserError
from utils.options import OptionGroup, option


@dataclass(frozen=True, kw_only=True)
class Settings(OptionGroup):
    """The command line."""
    dataset: str = option(MISSING, lambda: f"one of {', '.join(list_datasets())}")
    data: str = option(MISSING, "root folder of the data set", metavar="DIR")
    split: tuple[str, ...] = option((), "check this split only (may be repeated)", nargs="append", metavar="NAME")
    list: tuple[str, ...] = option((), "list file of a split", nargs="append", metavar="SPLIT=FILE")
    sample: int = option(20, "images to decode per split, evenly spread; 0: none", at_least=0, metavar="N")
    all: bool = option(False, "decode every image")


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


def check_split(spec: DatasetSpec, settings: Settings, split: str, list_file: str | None) -> np.ndarray:
    """Print one line about a split. int64 [K + 1]: pixels per class over what was decoded, ignored ones last."""
    published, has_labels = spec.split(split).published, spec.split(split).label_dir
    data = SegmentationDataset(spec, settings.data, split, train=False, list_file=list_file)
    wanted = len(data) if settings.all else min(settings.sample, len(data))
    indices = np.unique(np.linspace(0, len(data) - 1, wanted).astype(int))
    counts = np.zeros(spec.num_class + 1, dtype=np.int64)
    for index in indices:
        label = data[int(index)]["label"].numpy()
        counts += np.bincount(np.where(label < 0, spec.num_class, label).ravel(), minlength=len(counts))
    note = "" if published is None else ", as published" if published == len(data) else f", PUBLISHED: {published}"
    print(f"{split}: {len(data)} images{note}{'' if has_labels else ', no labels'}; {len(indices)} decoded")
    return counts if has_labels else np.zeros_like(counts)


def print_histogram(spec: DatasetSpec, counts: np.ndarray) -> None:
    """One line per class: share of the labeled pixels, and that of the ignored ones among all."""
    labeled = int(counts[:-1].sum())
    for train, name in enumerate(spec.classes):
        absent = "  (never present in the published labels)" if train in spec.absent_classes else ""
        print(f"{train:4d} {name:24s} {100 * counts[train] / max(labeled, 1):8.3f} %{absent}")
    print(f"     {'ignored (of all pixels)':24s} {100 * counts[-1] / max(int(counts.sum()), 1):8.3f} %")


def main(argv: Sequence[str] | None = None) -> int:
    """Check the splits that were asked for, or all; a split that no training needs may be absent."""
    settings = parse_options(Settings, argv, prog="check_data.py", description=__doc__.split("\n")[0])
    spec = get_dataset_spec(settings.dataset, settings.data)
    lists = list_files(settings.list, spec)
    print(f"{spec.title}: {spec.num_class} classes, {settings.data}")
    counts = np.zeros(spec.num_class + 1, dtype=np.int64)
    for split in settings.split or spec.splits:
        needed = bool(settings.split) or split in lists or split in (spec.train_split, spec.selection_split)
        if needed or os.path.isdir(os.path.join(settings.data, spec.split(split).image_dir)):
            counts += check_split(spec, settings, split, lists.get(split))
        else:
            print(f"{split}: absent")
    if counts.any():
        print_histogram(spec, counts)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
