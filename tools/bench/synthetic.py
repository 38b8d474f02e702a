"""A data set of noise in the folders that its spec asks for."""
from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from dataset import DatasetSpec

BLOCK = 32


def write_split(spec: DatasetSpec, root: Path, name: str, count: int, size: tuple[int, int], seed: int = 0) -> None:
    """Write ``count`` pairs of ``size`` = (height, width): soft pictures with a little noise, which compress about as
    well as photographs, and labels of every class in blocks."""
    split, rng = spec.split(name), np.random.default_rng(seed)
    coarse = tuple(-(-side // BLOCK) for side in size)
    for i in range(count):
        key = f"part/part_{i}" if split.nested else str(i)
        image = cv2.resize(rng.uniform(0, 255, (*coarse, 3)), size[::-1], interpolation=cv2.INTER_CUBIC)
        image = image + rng.normal(0, 2, image.shape)
        label = spec.train_to_id[rng.integers(0, spec.num_class, coarse)]
        label = cv2.resize(label, size[::-1], interpolation=cv2.INTER_NEAREST)
        for folder, ending, picture in ((split.image_dir, split.image_suffix[0], image.clip(0, 255).astype(np.uint8)),
                                        (split.label_dir, split.label_suffix, label)):
            path = root / folder / (key + ending)
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), picture)
