"""Which files make up a split: from the folders or from a list file, checked before anything is read."""
from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

from dataset.spec import DatasetSpec, SplitSpec
from utils.errors import UserError


class Sample(NamedTuple):
    """Paths of one image and its label (None: the split has no labels), and the name under which it is reported."""

    image: str
    label: str | None
    name: str


def find_samples(spec: DatasetSpec, root: str | os.PathLike, split: str,
                 list_file: str | os.PathLike | None = None) -> list[Sample]:
    """All samples of a split, in list order, or sorted when they come from the folders.

    root: folder of the data set. list_file: names the files instead ("image label" or one id per line, see the spec).
    Raises UserError that names the unknown or empty split, the missing folder or file, or the malformed list.
    """
    part, root = spec.split(split), os.fspath(root)
    if not os.path.isdir(root):
        raise UserError(f"{root}: folder not found; expected the root of {spec.title} (layout: data/README.md)")
    path = list_file or next((p for p in (os.path.join(root, name) for name in part.lists) if os.path.isfile(p)), None)
    if path:
        pairs, source = _from_list(part, root, os.fspath(path)), f"{path}: no entries"
    else:
        pairs = [_pair(part, root, key, suffix) for key, suffix in _from_folder(spec, split, root)]
        endings = ", ".join(f"*{suffix}" for suffix in part.image_suffix)
        source = f"{os.path.join(root, part.image_dir)}: no images ({endings})"
    if not pairs:
        raise UserError(f"{source}; expected those of split '{split}' of {spec.title}")
    _require_files((image for image, _ in pairs), "image")
    _require_files((label for _, label in pairs if label), "label")
    return [Sample(image, label, os.path.splitext(os.path.basename(label or image))[0]) for image, label in pairs]


def _pair(part: SplitSpec, root: str, key: str, suffix: str) -> tuple[str, str | None]:
    image = os.path.join(root, part.image_dir, key + suffix)
    return image, os.path.join(root, part.label_dir, key + part.label_suffix) if part.label_dir else None


def _keys(folder: str, suffixes: tuple[str, ...], nested: bool) -> dict[str, str]:
    """key -> actual ending, for all files below `folder` with one of the endings, sorted by path."""
    paths = []
    for directory, below, files in os.walk(folder):
        if not nested:
            below.clear()
        paths += [os.path.relpath(os.path.join(directory, name), folder) for name in files if name[0] != "."]
    keys: dict[str, str] = {}
    for path in sorted(paths):
        suffix = next((s for s in suffixes if path.lower().endswith(s.lower())), None)
        if suffix is None:
            continue
        key = path[:-len(suffix)]
        if key in keys:
            raise UserError(f"{os.path.join(folder, path)}: a second image called '{key}'; expected one per name")
        keys[key] = path[-len(suffix):]
    return keys


def _from_folder(spec: DatasetSpec, split: str, root: str) -> list[tuple[str, str]]:
    """(key, image suffix) of every image of the split."""
    part = spec.split(split)
    for folder, what in ((part.image_dir, "images"), (part.label_dir, "labels")):
        if folder and not os.path.isdir(os.path.join(root, folder)):
            raise UserError(f"{os.path.join(root, folder)}: folder not found; expected the {what} of split '{split}' "
                            f"of {spec.title} (layout: data/README.md)")
    if not part.by_label:
        return list(_keys(os.path.join(root, part.image_dir), part.image_suffix, part.nested).items())
    keys = _keys(os.path.join(root, part.label_dir), (part.label_suffix,), part.nested)
    for name, other in spec.splits.items():  # no image in two splits, as the published VOC folders would have
        if name == split or not other.by_label:
            continue
        shared = keys.keys() & _keys(os.path.join(root, other.label_dir), (other.label_suffix,), other.nested).keys()
        if shared:
            raise UserError(f"{os.path.join(root, part.label_dir)}: {len(shared)} labels also belong to split '{name}' "
                            f"({min(shared)}, ...); expected a list of the images of '{split}', as "
                            f"{os.path.join(root, part.lists[0])} or given as list file")
    return [(key, part.image_suffix[0]) for key in keys]


def _from_list(part: SplitSpec, root: str, path: str) -> list[tuple[str, str | None]]:
    """(image, label) of every line of a list file; empty lines are skipped."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.split() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this list file: {getattr(error, 'strerror', None) or error}") from None
    columns = 1 if part.id_list or not part.label_dir else 2
    expected = "one id" if part.id_list else "'image label'" if columns == 2 else "one image path"
    for number, entry in enumerate(lines, start=1):
        if entry and len(entry) != columns:
            raise UserError(f"{path}, line {number}: {len(entry)} words; expected {expected} per line")
    if part.id_list:
        return [_pair(part, root, entry[0], part.image_suffix[0]) for entry in lines if entry]
    return [(os.path.join(root, entry[0]), os.path.join(root, entry[1]) if columns == 2 else None)
            for entry in lines if entry]


def _require_files(paths: Iterable[str], what: str) -> None:
    """Every path exists; asks once per folder, not per file."""
    present: dict[str, set[str]] = {}
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in present:
            present[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in present[folder]:
            raise UserError(f"{path}: {what} not found; expected one for every entry of the split")
