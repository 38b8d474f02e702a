"""Weights of the classes in the cross entropy: from the training labels, or from a file."""
from __future__ import annotations

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from dataset import SegmentationDataset
from utils.distributed import available_cpus, rank_and_world
from utils.errors import UserError

#: of ENet (Paszke et al., 2016): weights lie between 1 / ln(1 + c), 1.4, and 1 / ln(c), 50
ENET_C = 1.02
#: threads that decode labels
MOST_THREADS = 8


def class_weights(choice: str, train_set: SegmentationDataset, device: torch.device) -> list[float]:
    """A weight per class. choice: auto, for those of ENet by the training labels, or a JSON file. With several
    processes each reads its share of the labels. UserError for a file that does not fit the data set."""
    if choice != "auto":
        return read_weights(Path(choice).expanduser(), train_set.spec.classes)
    return enet_weights(count_pixels(train_set, device))


def enet_weights(pixels: Sequence[int]) -> list[float]:
    """1 / ln(1.02 + share of the labeled pixels) of every class. pixels: of every class."""
    labeled = max(sum(pixels), 1)
    return [1 / math.log(ENET_C + count / labeled) for count in pixels]


def count_pixels(train_set: SegmentationDataset, device: torch.device) -> list[int]:
    """Pixels of each class in the labels of a data set, over all processes."""
    spec, (rank, world) = train_set.spec, rank_and_world()

    def values(index: int) -> np.ndarray:
        return np.bincount(train_set.read_label(index).ravel(), minlength=256)

    with ThreadPoolExecutor(min(available_cpus(), MOST_THREADS)) as threads:
        stored = sum(threads.map(values, range(rank, len(train_set), world)), np.zeros(256, np.int64))
    known = spec.id_to_train >= 0
    counts = np.bincount(spec.id_to_train[known], stored[known], spec.num_class)
    total = torch.tensor(counts, dtype=torch.int64, device=device)
    if world > 1:
        torch.distributed.all_reduce(total)
    return total.tolist()


def read_weights(path: Path, classes: Sequence[str]) -> list[float]:
    """The weights of a JSON file, {class name: weight} of every class or a list in their order: numbers of at least 0,
    one of them above. UserError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--class-weights {path}: not a JSON file that can be read ({error})") from error
    if isinstance(content, dict):
        if wrong := sorted(content.keys() ^ set(classes)):
            raise UserError(f"--class-weights {path}: {wrong[0]!r} is "
                            f"{'missing' if wrong[0] in classes else 'no class of the data set'}: expected one weight "
                            f"for each of {', '.join(classes)}")
        content = [content[name] for name in classes]
    fits = isinstance(content, list) and len(content) == len(classes) and all(
        isinstance(w, (int, float)) and not isinstance(w, bool) and math.isfinite(w) and w >= 0 for w in content)
    if not fits or not any(content):
        raise UserError(f"--class-weights {path}: expected {len(classes)} numbers of at least 0, not all 0, as a list "
                        "or by class name")
    return [float(weight) for weight in content]
