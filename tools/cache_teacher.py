"""Store the scores of a frozen teacher for every training image, for runs that read them in place of its passes.

    python tools/cache_teacher.py FLAGS        # those of train_kd.py, with --teacher-scores FOLDER
    python train_kd.py FLAGS                   # the same

Possible where scores are all that methods read of the teacher and every step shows it the same images: no random
scaling, and crops that hold a whole image. Images as they are and mirrored are stored. Nothing is computed twice: a
call that was interrupted goes on, and what is damaged is made again.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataset import SegmentationDataset, collate, worker_init
from dataset.io import image_size
from dataset.scores import DTYPES, Scores, make_scores
from dataset.transforms import Augmentation
from engine.build import build_run, run_facts
from engine.log import setup_logging
from engine.ready import get_ready
from engine.run import Run, to_device
from engine.scores import of_teacher_and_data, scores_read
from engine.settings import Settings, parse_settings
from utils.cli import ArgumentParser, read_options, run_main
from utils.cpu import prepare_cpu
from utils.distributed import available_cpus, cleanup, init_distributed
from utils.errors import UserError
from utils.files import check_target, readable_size
from utils.options import OptionGroup, option


@dataclass(frozen=True)
class Options(OptionGroup):
    """The command line beside the flags of train_kd.py."""
    dtype: str = option("float16", "precision of the stored scores", choices=tuple(DTYPES))
    top_k: int = option(0, "scores of the K highest classes of a position, and the average of the others: right are "
                           "the probabilities of these K at temperature 1; 0: all, which alone equals the teacher",
                        at_least=0, metavar="K")


class Views(Dataset):
    """The images of a training set as a step without random scaling sees them: item 2 i is image i whole, item 2 i + 1
    its mirror image. UserError, at once, when one is larger than the crop."""

    def __init__(self, samples: SegmentationDataset) -> None:
        self.samples = samples
        with ThreadPoolExecutor(available_cpus()) as pool:
            sizes = list(pool.map(image_size, (sample.image for sample in samples.samples)))
        index = max(range(len(self.samples)), key=lambda i: max(np.subtract(sizes[i], samples.crop_size)))
        self.check_size(index, sizes[index])

    def __len__(self) -> int:
        return 2 * len(self.samples)

    def __getitem__(self, number: int) -> dict[str, Any]:
        index, mirrored = divmod(number, 2)
        image, label = self.samples.read(index)
        self.check_size(index, image.shape[:2])  # what the head of a file says may be wrong
        return self.samples.augmented(index, image, label, Augmentation(mirrored=bool(mirrored)))

    def check_size(self, index: int, size: tuple[int, int]) -> None:
        """UserError for an image of a size (height, width) that is larger than the crop."""
        crop = self.samples.crop_size
        if size[0] > crop[0] or size[1] > crop[1]:
            raise UserError(f"{self.samples.samples[index].image}: {size[0]}x{size[1]} pixels, more than the crop of "
                            f"{crop[0]}x{crop[1]}: every step would show the teacher another part, whose scores are "
                            "not that part of the image's: expected crops that hold the largest image",
                            settings=["crop_size"])


@torch.no_grad()
def scores_of(run: Run, batch: dict[str, Any], taps: Sequence[str]) -> Tensor:
    """[B, C, h, w]: the taps of the teacher, one after the other, as a training step would get them."""
    images, valid, _ = to_device(run, batch)
    amp = run.settings.speed.amp_dtype
    with torch.autocast(images.device.type, amp, enabled=amp is not None):
        output = run.teacher(run.teacher.preprocess(images, valid))
    maps = [getattr(output, tap) for tap in taps]
    if len({x.shape[2:] for x in maps}) > 1:
        raise UserError(f"{run.teacher.name}: its {' and '.join(taps)} differ in size, and are not stored together: "
                        "expected methods that read one of them")
    return torch.cat(maps, dim=1)


def fill(run: Run, scores: Scores, views: Views) -> int:
    """Compute and store what is missing. Returns how many records that was."""
    missing, size = scores.missing(), run.settings.optimization.batch_size
    batches = [missing[first:first + size] for first in range(0, len(missing), size)]
    loader = DataLoader(views, batch_sampler=batches, num_workers=min(run.settings.data.workers, available_cpus()),
                        collate_fn=collate, worker_init_fn=worker_init)
    with tqdm(total=scores.count, initial=scores.count - len(missing), desc=views.samples.split, unit="img",
              leave=False, disable=not sys.stderr.isatty()) as bar:
        for numbers, batch in zip(batches, loader, strict=True):
            scores.write(numbers, scores_of(run, batch, list(scores.taps)))
            bar.update(len(numbers))
    return len(missing)


def without_scores(settings: Settings) -> Settings:
    """The settings of a run that asks the teacher itself, and validates nothing."""
    return replace(settings, networks=replace(settings.networks, teacher_scores=None),
                   running=replace(settings.running, skip_val=True), speed=replace(settings.speed, compile=False))


def main(argv: Sequence[str] | None = None) -> int:
    """Fill the folder and say what it holds."""
    parser = ArgumentParser(prog="cache_teacher.py", description=__doc__.split("\n")[0],
                            epilog="All other flags are those of train_kd.py.")
    parser.add_options(parser, Options)
    parsed, rest = parser.parse_known_args(argv)
    options, settings = read_options(vars(parsed), Options), parse_settings(rest)
    if settings.networks.teacher_scores is None:
        raise UserError("--teacher-scores is missing: the folder for the scores")
    folder = Path(settings.networks.teacher_scores).expanduser()
    check_target(folder, "--teacher-scores", is_folder=True)
    distributed = init_distributed(settings.running.no_cuda)
    setup_logging(distributed.is_main_process)
    if distributed.device.type == "cpu":
        prepare_cpu(settings.speed.fast)
    if distributed.world_size > 1:
        raise UserError("cache_teacher.py is for one process: expected a call without torchrun")
    run = build_run(without_scores(settings), distributed)
    taps = scores_read(settings, run_facts(settings, run.student.num_class), run.student, run.teacher)
    sets = [images for images in (run.train_set, run.unlabeled) if images is not None]
    all_views = [Views(images) for images in sets]
    known = [of_teacher_and_data(settings, run.teacher, images) for images in sets]
    get_ready(run)
    for images, views, about in zip(sets, all_views, known, strict=True):
        height, width = scores_of(run, collate([views[0]]), list(taps)).shape[2:]
        scores = make_scores(folder, images.split, {**about, "taps": taps, "size": [height, width],
                                                    "dtype": options.dtype, "top_k": options.top_k})
        scores.reserve()
        made = fill(run, scores, views)
        print(f"{images.split}: scores of {len(images)} images, as they are and mirrored, are in {folder}: "
              f"{readable_size(scores.count * scores.size)} ({made} of {scores.count} computed now)")
    cleanup()
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
