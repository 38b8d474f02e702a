"""A two-image data set in the folder layout of each supported data set, for comparison with ``dataset.json``.

Files whose name ends in ``.jpg`` hold PNG data: readers go by content, and no JPEG decoder takes part in the test.
"""
from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from reference import fill

#: Sample key -> (height, width).
SIZES = {"a": (60, 80), "b": (45, 50)}
#: Data set -> number of label ids that occur in its files.
IDS = {"citys": 34, "camvid": 12, "voc": 22, "ade20k": 151, "coco_stuff_164k": 183}
#: Data set -> what its highest id is written as.
TOP = {"voc": 255, "coco_stuff_164k": 255}


@dataclass(frozen=True)
class _Layout:
    """Path templates over {split}, {key} and the per-split words in ``words``; ``line`` is a row of the list file."""

    image: str
    label: str
    line: str | None
    words: dict[str, str] | None = None


_STEM = "{split}/town/town_00000{key}_000019"
_LAYOUTS = {
    "citys": _Layout(f"leftImg8bit/{_STEM}_leftImg8bit.png", f"gtFine/{_STEM}_gtFine_labelIds.png", "{image}\t{label}"),
    "camvid": _Layout("{split}/{key}.png", "{split}annot/{key}.png", "{image} {label}"),
    "voc": _Layout("JPEGImages/{split}_{key}.jpg", "{word}/{split}_{key}.png", "{split}_{key}",
                   {"train": "SegmentationClassAug", "val": "SegmentationClass"}),
    "ade20k": _Layout("images/{word}/{split}_{key}.jpg", "annotations/{word}/{split}_{key}.png", None,
                      {"train": "training", "val": "validation"}),
    "coco_stuff_164k": _Layout("images/{split}2017/{split}_{key}.jpg", "annotations/{split}2017/{split}_{key}.png",
                               "{split}_{key}"),
}


def picture(kind: str, split: str, key: str) -> np.ndarray:
    """uint8 [H, W, 3] in BGR order."""
    return fill.image(f"{kind}/{split}/{key}/image", (*SIZES[key], 3), 0)


def label(kind: str, split: str, key: str) -> np.ndarray:
    """uint8 [H, W] of the ids as they stand in the file."""
    count = IDS[kind]
    ids = fill.labels(f"{kind}/{split}/{key}/label", SIZES[key], count, 0, ignore_frac=0.0).numpy()
    top = TOP.get(kind, count - 1)
    return np.where(ids == count - 1, top, ids).astype(np.uint8)


def paths(kind: str, split: str, key: str) -> tuple[str, str]:
    """(image, label) of one sample, relative to the data set's root. ValueError for an unknown data set."""
    if kind not in _LAYOUTS:
        raise ValueError(kind)
    layout = _LAYOUTS[kind]
    names = {"split": split, "key": key, "word": (layout.words or {}).get(split, "")}
    return layout.image.format(**names), layout.label.format(**names)


def _encode(path: Path, array: np.ndarray) -> None:
    """Write an array as PNG data, whatever the file's name ends in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done, data = cv2.imencode(".png", array)
    if not done:
        raise OSError(f"{path}: could not be encoded")
    path.write_bytes(data.tobytes())


def _encode_palette(path: Path, ids: np.ndarray) -> None:
    """Write ids as a PNG with a palette, whose colours are meaningless on purpose."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = ids.shape
    indexed = Image.frombytes("P", (width, height), ids.tobytes())
    indexed.putpalette([step * index % 256 for index in range(256) for step in (37, 91, 151)])
    indexed.save(path, format="PNG")


def write(root: str | os.PathLike, kind: str) -> dict[str, str]:
    """Write both splits of data set ``kind`` below ``root``; returns {split: list file}, empty where it has none."""
    root, lists = Path(root), {}
    for split in ("train", "val"):
        rows = []
        for key in SIZES:
            image_path, label_path = paths(kind, split, key)
            _encode(root / image_path, picture(kind, split, key))
            encode_label = _encode_palette if (kind, split) == ("voc", "val") else _encode
            encode_label(root / label_path, label(kind, split, key))
            if _LAYOUTS[kind].line:
                rows.append(_LAYOUTS[kind].line.format(image=image_path, label=label_path, split=split, key=key))
        if rows:
            lists[split] = str(root / f"{split}.lst")
            Path(lists[split]).write_text("".join(f"{row}\n" for row in rows))
    return lists
