"""What a network was trained on, in a few lines of JSON: enough to notice later that the data are not the same."""
from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dataset.segmentation import SegmentationDataset

#: pairs of a split whose pixels are compared, and whose files' sizes are; both evenly spread
PIXELS, SIZES = 4, 4096
THREADS = 16  # a size is one question to a file server


def fingerprint(splits: Sequence[SegmentationDataset]) -> dict[str, Any]:
    """Of the splits of one data set, as JSON values: name and classes of the set, and of each split the number of its
    images and digests of their names, their files' sizes and the pixels of PIXELS of them.

    It does not depend on where the folder is. UserError for images that cannot be decoded."""
    spec = splits[0].spec
    return {"dataset": spec.name, "classes": list(spec.classes), "splits": {s.split: _of_split(s) for s in splits}}


def _of_split(split: SegmentationDataset) -> dict[str, Any]:
    names = (f"{sample.name}\0{Path(sample.image).name}" for sample in split.samples)
    return {"images": len(split), "names": _digest(name.encode() for name in names), "sizes": _sizes(split),
            "pixels": _pixels(split)}


def _sizes(split: SegmentationDataset) -> str:
    paths = [path for index in _spread(len(split), SIZES) for path in split.samples[index][:2] if path is not None]
    with ThreadPoolExecutor(THREADS) as pool:
        return _digest(f"{size}\n".encode() for size in pool.map(os.path.getsize, paths))


def _pixels(split: SegmentationDataset) -> str:
    """Of images, and of labels as classes: another mapping of the same files is another label."""
    digests = []
    for index in _spread(len(split), PIXELS):
        image, label = split.read(index)
        digests.append(repr(image.shape).encode() + image.tobytes())
        if label is not None:
            digests.append(split.spec.id_to_train[label].tobytes())
    return _digest(digests)


def _spread(count: int, most: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist()


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words: "train: 26 -> 25 images". Splits of one alone do not count."""
    found = []
    if before.get("dataset") != now["dataset"]:
        found.append(f"data set: {before.get('dataset')} -> {now['dataset']}")
    found += _class_changes(before["classes"], now["classes"])
    for name, new in now["splits"].items():
        if old := before.get("splits", {}).get(name):
            found += [f"{name}: {text}" for text in _split_changes(old, new)]
    return found


def _class_changes(old: Sequence[str], new: Sequence[str]) -> list[str]:
    if len(old) != len(new):
        return [f"{len(old)} -> {len(new)} classes"]
    differing = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    return [f"class {i}: {old[i]} -> {new[i]}" + (f" ({len(differing)} classes differ)" if differing[1:] else "")
            for i in differing[:1]]


def _split_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The first difference explains those after it."""
    if old.get("images") != new["images"]:
        return [f"{old.get('images')} -> {new['images']} images"]
    if old.get("names") != new["names"]:
        return ["other file names, or another order"]
    if old.get("pixels") != new["pixels"]:
        return [f"other pixels or labels (in the {min(new['images'], PIXELS)} images that are compared)"]
    return ["files of other sizes"] if old.get("sizes") != new["sizes"] else []
