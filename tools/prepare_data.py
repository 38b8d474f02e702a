#!/usr/bin/env python3
"""Make a data set ready to train on, from the archives as they are distributed.

    python tools/prepare_data.py citys --from leftImg8bit_trainvaltest.zip gtFine_trainvaltest.zip --to data/cityscapes
    python tools/prepare_data.py voc --from VOCtrainval_11-May-2012.tar benchmark.tgz --to data/VOCAug --dry-run

Takes what training and evaluation read, converts what needs it, and counts. Archives are zip or tar files, or folders
into which they were unpacked. After an interruption the same command checks what is there, and goes on. Where the
archives come from, and what becomes of them: data/README.md.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset import get_dataset_spec
from tools.preparing import ade20k, camvid, cityscapes, coco_stuff, voc
from tools.preparing.archives import open_archive
from tools.preparing.engine import Target
from tools.preparing.plan import Item
from utils.cli import ArgumentParser, read_options, run_main
from utils.distributed import available_cpus
from utils.files import readable_size
from utils.options import OptionGroup, option

RECIPES = {"ade20k": ade20k.plan, "camvid": camvid.plan, "citys": cityscapes.plan, "coco_stuff_164k": coco_stuff.plan,
           "voc": voc.plan}


@dataclass(frozen=True, kw_only=True)
class Settings(OptionGroup):
    """The command line, without the data set."""
    archives: tuple[Path, ...] = option(MISSING, "all archives of the data set, or folders with their files",
                                        metavar="ARCHIVE", aliases=("from",))
    to: Path = option(MISSING, "the folder to make, for --data of the programs", metavar="DIR")
    link: bool = option(False, "hard links, instead of copies, to files of a folder that stay as they are")
    workers: int = option(available_cpus(), "threads that convert and write", at_least=1, metavar="N")
    dry_run: bool = option(False, "say what would be done, and what it takes; write nothing")


def parse(argv: list[str] | None) -> tuple[str, Settings]:
    """(data set, settings)."""
    parser = ArgumentParser(prog="prepare_data.py", description=__doc__.split("\n")[0])
    parser.add_argument("dataset", choices=tuple(RECIPES), help="the data set, as --dataset names it")
    parser.add_options(parser, Settings)
    parsed = parser.parse_args(argv)
    return parsed.dataset, read_options(vars(parsed), Settings)


def overview(target: Target, missing: Sequence[Item], dry_run: bool) -> str:
    """What is to be done, in one line; in a dry run, folder by folder. missing: of :meth:`Target.missing`."""
    total = len(target.plan.items)
    names = ", ".join(archive.path.name for archive in target.archives)
    line = (f"{target.spec.title}: {total} files from {names} to {target.root}; {total - len(missing)} are there, the "
            f"others take about {readable_size(target.needed(missing))} ({readable_size(target.free())} are free)")
    if not dry_run:
        return line
    folders: dict[str, list[int]] = {}
    for item in target.plan.items.values():
        counts = folders.setdefault(str(Path(item.target).parent), [0, 0])
        counts[item.convert is not None] += 1
    lines = [f"  {folder}: {copied} copied, {converted} converted" for folder, (copied, converted) in folders.items()]
    return "\n".join([line, *lines, *(f"  {path}: {len(ids)} ids" for path, ids in target.plan.lists.items())])


def compare(target: Target, counts: dict[str, int]) -> str:
    """A line per split: how many images there are, and how many were published."""
    lines = []
    for split, part in target.spec.splits.items():
        if split in counts:
            note = "as published" if counts[split] == part.published else f"PUBLISHED: {part.published}"
            lines.append(f"{split}: {counts[split]} images, {note}{'' if part.label_dir else ', no labels'}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Prepare one data set. Returns the exit code."""
    dataset, settings = parse(argv)
    archives = [open_archive(path.expanduser()) for path in settings.archives]
    spec, plan = get_dataset_spec(dataset), RECIPES[dataset](archives)
    planned = plan.count(spec)
    target = Target(spec, settings.to.expanduser(), plan, archives, settings.link)
    missing = target.missing(settings.workers)
    print(overview(target, missing, settings.dry_run), flush=True)
    if settings.dry_run:
        print(compare(target, planned))
        return 0
    print(compare(target, target.fill(missing, settings.workers)))
    print(f"to check every file: python tools/check_data.py --dataset {dataset} --data {settings.to} --all")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
