"""The one dataset class. Images travel as uint8 BGR; every network normalizes them itself, on its device."""
from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset, default_collate, get_worker_info

from dataset import transforms
from dataset.cache import Cache
from dataset.discovery import Sample, find_samples
from dataset.io import decode_pair, read_files, read_label
from dataset.spec import IGNORE, DatasetSpec
from dataset.window import windowed_crop, windows_are_exact
from utils.errors import UserError
from utils.workers import leave_signals_to_parent

if TYPE_CHECKING:
    from dataset.scores import Scores

UNKNOWN = np.iinfo(np.int16).min


class SegmentationDataset(Dataset):
    """One split of a data set.

    ``ds[index]`` is the whole image with its label. ``ds[index, ordinal]`` is a training sample: scaled, cropped to
    ``crop_size`` (padded when the image is smaller) and mirrored at random, as a function of (seed, ordinal) only.

    An item is a dict
        image: uint8 [3, H, W], BGR; 0 outside of ``valid``
        label: int16 [H, W], train ids; ``ignore_label`` where nothing is to be learned or counted
        valid: int16 [4], (top, bottom, left, right) of the real pixels, half open
        name:  stem of the label file (of the image where there is no label)
        index: position in the split
        scores: float16 or float32 [C, h, w], of a teacher; only training samples, where ``scores`` is set

    train: offer training samples. crop_size: (height, width), default ``spec.train_crop``. seed: of the augmentation,
    not negative. ignore_label: stands for "ignored" in the items, outside of 0..K-1. root, list_file: see
    :func:`find_samples`. limit: keep only the first samples. scale, mirror: switch one kind of augmentation off.
    fast: resize only the window of the crop; off: its plain twin, which gives the same items. unlabeled: training
    samples of a split without labels are wanted.
    Raises UserError at construction for missing files and bad arguments, on access for files that cannot be decoded,
    sizes that differ and label values that the data set does not have.
    """

    def __init__(self, spec: DatasetSpec, root: str | os.PathLike, split: str, *, train: bool,
                 crop_size: tuple[int, int] | None = None, seed: int = 0, ignore_label: int = IGNORE,
                 list_file: str | os.PathLike | None = None, limit: int | None = None, scale: bool = True,
                 mirror: bool = True, fast: bool = True, unlabeled: bool = False) -> None:
        self.spec, self.split, self.train, self.seed = spec, split, train, int(seed)
        self.ignore_label, self.scale, self.mirror = int(ignore_label), scale, mirror
        self.crop_size = tuple(int(side) for side in (crop_size or spec.train_crop))
        self._check_arguments(limit)
        self.root = os.fspath(root)
        self.cache: Cache | None = None  # set by dataset.cache.use_cache
        self.scores: Scores | None = None  # set by engine.scores.use_scores
        self.samples: list[Sample] = find_samples(spec, root, split, list_file)[:limit]
        if train and self.samples[0].label is None and not unlabeled:
            raise UserError(f"split '{split}' of {spec.title} has no labels; expected one of "
                            f"{', '.join(spec.eval_splits)} to train on")
        table = np.where(spec.id_to_train < 0, np.int16(self.ignore_label), spec.id_to_train)
        self._table = np.where(spec.known_ids, table, np.int16(UNKNOWN))
        self._unknown = (~spec.known_ids).astype(np.uint8)
        self._windows = fast and train and windows_are_exact()

    def _check_arguments(self, limit: int | None) -> None:
        if len(self.crop_size) != 2 or min(self.crop_size) < 1:
            raise UserError(f"crop size {self.crop_size}; expected height and width, both at least 1")
        if self.seed < 0:
            raise UserError(f"seed {self.seed}; expected 0 or more")
        if limit is not None and limit < 1:
            raise UserError(f"limit {limit} of split '{self.split}'; expected at least 1 image")
        if not UNKNOWN < self.ignore_label < 2**15 or 0 <= self.ignore_label < self.spec.num_class:
            raise UserError(f"ignore label {self.ignore_label}; expected -1, or {self.spec.num_class}..32767 for "
                            f"{self.spec.title}, whose classes are 0..{self.spec.num_class - 1}")

    def __len__(self) -> int:
        return len(self.samples)

    def digest(self) -> str:
        """16 hexadecimal digits of what tells this training set from others, wherever its folder is: split, names of
        the files in their order, label values and their classes, crop, augmentation. Not the content of the files.
        """
        values = [self.spec.name, self.split, self.crop_size, self.ignore_label, self.scale, self.mirror]
        digest = hashlib.sha256(repr(values).encode() + self._table.tobytes())
        for sample in self.samples:
            digest.update(f"{sample.name}\0{Path(sample.image).name}\n".encode())
        return digest.hexdigest()[:16]

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        if not isinstance(key, tuple):
            image, label = self.read(key)
            label = None if label is None else cv2.LUT(label, self._table)
            return self._item(int(key), image, label, (0, image.shape[0], 0, image.shape[1]))
        if not self.train:
            raise TypeError("training samples need train=True")
        index, ordinal = int(key[0]), int(key[1])
        image, label = self.read(index)
        rng = np.random.default_rng((self.seed, ordinal))
        return self.augmented(index, image, label, transforms.draw_augmentation(
            rng, image.shape[:2], self.crop_size, scale=self.scale, mirror=self.mirror))

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The stored pair: uint8 [H, W, 3] BGR, and uint8 [H, W] stored label values (None without labels)."""
        sample = self.samples[index]
        image, label = self.cache.read(index) if self.cache else decode_pair(sample, *read_files(sample))
        self._check_values(index, label)
        return image, label

    def read_label(self, index: int) -> np.ndarray | None:
        """The label of :meth:`read` alone. Its image is not decoded, and what does not fit it is not found."""
        if self.cache:
            return self.read(index)[1]
        path = self.samples[index].label
        label = None if path is None else read_label(path)
        self._check_values(index, label)
        return label

    def _check_values(self, index: int, label: np.ndarray | None) -> None:
        if label is None or not self._unknown.any():
            return
        values = self.cache.values(index) if self.cache else label
        if cv2.LUT(values, self._unknown).any():
            raise self.spec.unknown_value(self.samples[index].label, label)

    def require_labels(self) -> None:
        """UserError when not one pixel of the split has a class; mostly the first image tells."""
        for index in range(len(self)):
            label = self.read_label(index)
            if label is not None and (self.spec.id_to_train[label] != IGNORE).any():
                return
        if not any(sample.label for sample in self.samples):
            raise UserError(f"{os.path.dirname(self.samples[0].image)}: split '{self.split}' has no labels")
        raise UserError(f"{os.path.dirname(self.samples[0].label or self.samples[0].image)}: every pixel of the "
                        f"{len(self)} labels of split '{self.split}' is ignored; expected pixels with a class")

    def augmented(self, index: int, image: np.ndarray, label: np.ndarray | None,
                  augmentation: transforms.Augmentation) -> dict[str, Any]:
        """The training sample of a stored pair for given augmentation parameters."""
        cut, mirrored = windowed_crop if self._windows else transforms.scaled_crop, augmentation.mirrored
        beside = np.zeros(image.shape[:2], np.uint8) if label is None else label
        image, beside = cut(image, beside, augmentation, self.crop_size)
        valid = transforms.valid_rectangle(image.shape[:2], self.crop_size, mirrored)
        if label is not None:
            label = transforms.pad(cv2.LUT(beside, self._table), self.crop_size, self.ignore_label, mirrored)
        item = self._item(index, transforms.pad(image, self.crop_size, 0, mirrored), label, valid)
        return item if self.scores is None else {**item, "scores": self.scores.read(index, mirrored)}

    def _item(self, index: int, image: np.ndarray, label: np.ndarray | None,
              valid: tuple[int, int, int, int]) -> dict[str, Any]:
        if label is None:
            label = np.full(image.shape[:2], self.ignore_label, dtype=np.int16)
        planes = np.empty((3, *image.shape[:2]), dtype=np.uint8)
        cv2.split(image, list(planes))  # written in place
        return {
            "image": torch.from_numpy(planes),
            "label": torch.from_numpy(label),
            "valid": torch.tensor(valid, dtype=torch.int16), "name": self.samples[index].name, "index": index}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Items -> batch: image [B, 3, H, W], label [B, H, W], valid [B, 4], name list of B, index int64 [B], and scores
    [B, C, h, w] of a teacher where the items have them.

    Raises UserError for images of different sizes (whole images; use batch size 1).
    """
    sizes = {tuple(item["label"].shape) for item in items}
    if len(sizes) > 1:
        raise UserError(f"images of different sizes in a batch ({sorted(sizes)}); expected equal sizes or batch size 1")
    # in a loading process, into the memory that the training process reads
    arrays = ("image", "label", "valid", *(["scores"] if "scores" in items[0] else []))
    return {**{key: default_collate([item[key] for item in items]) for key in arrays},
            "name": [item["name"] for item in items],
            "index": torch.tensor([item["index"] for item in items], dtype=torch.int64)}


def worker_init(worker_id: int) -> None:
    """For ``DataLoader(worker_init_fn=...)``: switches OpenCV's own threads off, and leaves signals to the parent."""
    cv2.setNumThreads(0)
    if get_worker_info() is not None:
        leave_signals_to_parent()
