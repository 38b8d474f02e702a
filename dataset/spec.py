"""What a data set is: classes, colors, label ids and where the files of each split lie. And the list of all of them."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from dataset.palette import bit_palette, read_only
from utils.errors import UserError

IGNORE = -1
#: for messages on label values of a set whose class file says which is which
HOW_TO_SAY_VALUES = 'give each class its value as "id" in classes.json (data/README.md)'


@dataclass(frozen=True)
class SplitSpec:
    """Where one split lies under the root.

    An image ``<image_dir>/<key><image suffix>`` belongs to the label ``<label_dir>/<key><label_suffix>``.
    label_dir: None where a split has no (public) labels. image_suffix: accepted endings; the case of what follows the
    last dot does not count, in label_suffix neither. nested: the key may contain folders (Cityscapes: one per city).
    lists: list files that are used, in this order, when they exist under the root and none is given. id_list: they hold
    one key per line; otherwise "image label", relative to the root. by_label: without a list, the files of the label
    folder decide which images belong to the split. published: number of images of the published split, None when there
    is no such number. same_names: names of images may differ in the ending alone, because nothing belongs to an image
    or is written under its name.
    """

    image_dir: str
    label_dir: str | None
    image_suffix: tuple[str, ...] = (".png",)
    label_suffix: str = ".png"
    nested: bool = False
    lists: tuple[str, ...] = ()
    id_list: bool = False
    by_label: bool = False
    published: int | None = None
    same_names: bool = False


@dataclass(frozen=True, eq=False)
class DatasetSpec:
    """Everything that distinguishes one data set from another."""

    name: str  # as given to the programs
    title: str  # as printed
    classes: tuple[str, ...]  # names in the order of the train ids
    id_to_train: np.ndarray  # int16 [256], stored label value -> train id, or -1 for "ignore"
    splits: Mapping[str, SplitSpec]
    train_crop: tuple[int, int]  # (height, width) in the published settings
    palette: np.ndarray | None = None  # uint8 [K, 3], RGB; generated when none is given
    known_ids: np.ndarray | None = None  # bool [256], the stored values that may occur (default: all)
    train_split: str = "train"
    selection_split: str = "val"  # chooses the best weights
    report_splits: tuple[str, ...] = ()  # evaluated at the end
    reference_selection_split: str = "val"  # on which the reference implementation selects
    absent_classes: tuple[int, ...] = ()  # train ids that never occur in the published labels (still count in mIoU)
    values_from_file: bool = False  # whoever made the labels says in a class file which value is which class
    upright_labels: bool = False  # labels fit images as EXIF data turn them; if not known, such images are refused

    def __post_init__(self) -> None:
        count = len(self.classes)
        palette = bit_palette(count, first=1) if self.palette is None else self.palette
        known = np.ones(256, dtype=bool) if self.known_ids is None else self.known_ids
        table = np.asarray(self.id_to_train)
        if table.shape != (256,) or table.min() < IGNORE or table.max() >= count:
            raise ValueError(f"{self.name}: id_to_train must hold 256 values in -1..{count - 1}")
        if np.asarray(palette).shape != (count, 3):
            raise ValueError(f"{self.name}: palette must be [{count}, 3], got {list(np.asarray(palette).shape)}")
        for name, value in (("classes", tuple(self.classes)), ("id_to_train", read_only(table, np.int16)),
                            ("palette", read_only(palette, np.uint8)), ("known_ids", read_only(known, bool))):
            object.__setattr__(self, name, value)

    @property
    def num_class(self) -> int:
        """Number of classes K."""
        return len(self.classes)

    @property
    def eval_splits(self) -> tuple[str, ...]:
        """Splits that have labels, training split included."""
        return tuple(name for name, split in self.splits.items() if split.label_dir is not None)

    @property
    def train_to_id(self) -> np.ndarray:
        """uint8 [K], train id -> the (smallest) stored value, for label files and submissions."""
        trains, stored = np.unique(self.id_to_train, return_index=True)  # first occurrences
        ids = np.zeros(self.num_class, dtype=np.uint8)
        ids[trains[trains >= 0]] = stored[trains >= 0]
        return ids

    def split(self, name: str) -> SplitSpec:
        """The split of that name; UserError that lists the splits when there is none."""
        if name not in self.splits:
            raise UserError(f"{self.title} has no split '{name}'; expected one of {', '.join(self.splits)}")
        return self.splits[name]

    def allowed_ids(self) -> str:
        """The stored label values that may occur, as text: "0..20, 255"."""
        ids = np.flatnonzero(self.known_ids)
        runs = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1)
        return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)

    def unknown_value(self, path: str, stored: np.ndarray) -> UserError:
        """The error for a label file with these stored values, of which some may not occur."""
        wrong = stored[~self.known_ids[stored]][0]
        values = np.unique(stored[(self.id_to_train[stored] >= 0) | ~self.known_ids[stored]])
        from_one = values[0] == 1 and values[-1] == self.num_class and (self.train_to_id == range(self.num_class)).all()
        hint = f"; if the labels begin at 1, {HOW_TO_SAY_VALUES}" if from_one and self.values_from_file else ""
        return UserError(f"{path}: label value {wrong}; {self.title} expects {self.allowed_ids()}{hint}")


def id_tables(mapping: Mapping[int, int], ignore: Iterable[int] = ()) -> dict[str, np.ndarray]:
    """``id_to_train`` and ``known_ids`` of a set whose stored values are exactly those of ``mapping`` and ``ignore``.

    mapping: stored value -> train id (or -1). ignore: further stored values that mean "ignore".
    """
    table, known = np.full(256, IGNORE, dtype=np.int16), np.zeros(256, dtype=bool)
    table[list(mapping)] = list(mapping.values())
    known[[*mapping, *ignore]] = True
    return {"id_to_train": table, "known_ids": known}


_REGISTRY: dict[str, Callable[[str | os.PathLike | None], DatasetSpec]] = {}


def register_dataset(spec: DatasetSpec) -> DatasetSpec:
    """Make a fixed spec known under its name; returns it."""
    register_builder(spec.name)(lambda root: spec)
    return spec


def register_builder(name: str) -> Callable[[Callable], Callable]:
    """Decorator for a function ``root -> DatasetSpec``, for sets whose classes are read from their folder."""

    def add(builder: Callable) -> Callable:
        if name in _REGISTRY:
            raise ValueError(f"a data set called '{name}' is registered already")
        _REGISTRY[name] = builder
        return builder

    return add


def list_datasets() -> list[str]:
    """Names of all data sets, sorted."""
    return sorted(_REGISTRY)


def get_dataset_spec(name: str, root: str | os.PathLike | None = None) -> DatasetSpec:
    """The spec of a data set of :func:`list_datasets`. root: folder of the data; only 'folder' needs it.

    Raises UserError for an unknown name (lists the known ones), or a class file that is missing or malformed.
    """
    if name not in _REGISTRY:
        raise UserError(f"unknown data set '{name}'; expected one of {', '.join(list_datasets())}")
    return _REGISTRY[name](root)
