"""Decode the images of a data set once, before the runs that read them with --cache.

    python tools/cache_data.py --dataset citys --data data/cityscapes --cache /local/cache
    python tools/cache_data.py --dataset voc --data data/VOCAug --cache /local/cache --list train=train_aug.txt

Nothing is decoded twice: what is there already is kept, and a call that was interrupted goes on. Runs may already use
the cache meanwhile.
"""
from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from dataset import SegmentationDataset, get_dataset_spec, list_datasets, unlabeled_images, use_cache
from tools.check_data import list_files
from utils.cli import parse_options, run_main
from utils.options import OptionGroup, option


@dataclass(frozen=True, kw_only=True)
class Settings(OptionGroup):
    """The command line."""
    dataset: str = option(MISSING, lambda: f"one of {', '.join(list_datasets())}")
    data: str = option(MISSING, "root folder of the data set", metavar="DIR")
    cache: str = option(MISSING, "folder of the cache, as for train_kd.py and eval.py", metavar="DIR")
    split: tuple[str, ...] = option((), "this split only (may be repeated; default: those that a training run reads)",
                                    nargs="append", metavar="NAME")
    list: tuple[str, ...] = option((), "list file of a split", nargs="append", metavar="SPLIT=FILE")
    unlabelled: str | None = option(None, "the images below this folder too, as for train_kd.py", metavar="DIR",
                                    aliases=("unlabeled",))


def main(argv: Sequence[str] | None = None) -> int:
    """Fill the cache and say what it holds."""
    settings = parse_options(Settings, argv, prog="cache_data.py", description=__doc__.split("\n")[0])
    spec = get_dataset_spec(settings.dataset, settings.data)
    lists = list_files(settings.list, spec)
    names = settings.split or dict.fromkeys((spec.train_split, spec.selection_split, *spec.report_splits))
    splits = [SegmentationDataset(spec, settings.data, name, train=False, list_file=lists.get(name)) for name in names]
    if settings.unlabelled is not None:
        splits.append(unlabeled_images(spec, settings.unlabelled))
    use_cache(splits, settings.cache, print)
    for split in splits:
        print(f"{split.split}: {len(split)} images are in {settings.cache}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
