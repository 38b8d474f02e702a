"""Which files make up a split: from the folders or from a list file, checked before anything is read."""
from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple, NoReturn

from dataset.spec import DatasetSpec, SplitSpec
from utils.errors import UserError


class Sample(NamedTuple):
    """Paths of one image and its label (None: the split has no labels), and the name under which it is reported.
    upright_label: as ``DatasetSpec.upright_labels``."""

    image: str
    label: str | None
    name: str
    upright_label: bool = False


#: is told the path of a file that does not fit, and why; it raises, or the file is left out
Report = Callable[[str, str], None]


def refuse(path: str, text: str) -> NoReturn:
    """The usual `Report`: UserError."""
    raise UserError(f"{path}: {text}")


def find_samples(spec: DatasetSpec, root: str | os.PathLike, split: str, list_file: str | os.PathLike | None = None,
                 report: Report = refuse) -> list[Sample]:
    """All samples of a split, in list order, or sorted when they come from the folders.

    root: folder of the data set. list_file: names the files instead ("image label" or one id per line, see the spec).
    report: is told of every file that does not fit. Raises UserError that names the unknown or empty split, the missing
    folder, or the list that cannot be read.
    """
    part, root = spec.split(split), os.fspath(root)
    if not os.path.isdir(root):
        raise UserError(f"{root}: folder not found; expected the root of {spec.title} (layout: data/README.md)")
    path = list_file or next((p for p in (os.path.join(root, name) for name in part.lists) if os.path.isfile(p)), None)
    if path:
        pairs, source = _from_list(part, root, os.fspath(path), report), f"{path}: no entries"
    else:
        pairs = [_pair(part, root, key, suffix) for key, suffix in _from_folder(spec, split, root, report)]
        endings = ", ".join(f"*{suffix}" for suffix in part.image_suffix)
        source = f"{os.path.join(root, part.image_dir)}: no images ({endings})"
    if not pairs:
        raise UserError(f"{source}; expected those of split '{split}' of {spec.title}")
    images = _present([image for image, _ in pairs], "image", report)
    labels = _present([label for _, label in pairs if label], "label", report, set(images.values()))
    return [Sample(images[image], label and labels[label], os.path.splitext(os.path.basename(label or image))[0],
                   spec.upright_labels)
            for image, label in pairs if image in images and (label is None or label in labels)]


def labels_without_image(spec: DatasetSpec, root: str | os.PathLike, split: str) -> list[str]:
    """Label files of a split's folder that belong to none of its images. No training notices them."""
    part, root = spec.split(split), os.fspath(root)
    if part.by_label or not part.label_dir:
        return []

    def skip(path: str, text: str) -> None:
        """Names that do not fit are told elsewhere."""

    labels = _keys(os.path.join(root, part.label_dir), (part.label_suffix,), part.nested, skip)
    images = _keys(os.path.join(root, part.image_dir), part.image_suffix, part.nested, skip)
    return [os.path.join(root, part.label_dir, key + labels[key]) for key in labels if key not in images]


def _pair(part: SplitSpec, root: str, key: str, suffix: str) -> tuple[str, str | None]:
    image = os.path.join(root, part.image_dir, key + suffix)
    return image, os.path.join(root, part.label_dir, key + part.label_suffix) if part.label_dir else None


def _keys(folder: str, suffixes: tuple[str, ...], nested: bool, report: Report,
          same_names: bool = False) -> dict[str, str]:
    """key -> actual ending, for all files below `folder` with one of the endings, sorted by path. same_names: the
    ending is part of the key."""
    keys: dict[str, str] = {}
    for path in sorted(_files(folder, suffixes, nested, report)):
        suffix = next((s for s in suffixes if path.lower().endswith(s.lower())), None)
        if suffix is None:
            continue
        key, where = path if same_names else path[:-len(suffix)], os.path.join(folder, path)
        if not _is_text(path):
            report(ascii(where), "a name that is not UTF-8; expected one that lists and logs can hold")
        elif key in keys:
            report(where, f"a second image called '{key}'; expected one per name")
        else:
            keys[key] = path[len(key):]
    return keys


def _files(folder: str, suffixes: tuple[str, ...], nested: bool, report: Report) -> Iterator[str]:
    """Paths of all files below a folder (not nested: directly in it), relative to it; those of folders that are links
    too. Hidden ones do not count."""
    for directory, below, files in os.walk(folder, followlinks=True):
        for name in below:
            if name[0] != "." and name.lower().endswith(tuple(suffix.lower() for suffix in suffixes)):
                report(os.path.join(directory, name), "a folder with the name of a picture; expected a file")
        yield from (os.path.relpath(os.path.join(directory, name), folder) for name in files if name[0] != ".")
        below[:] = [name for name in below if nested and not _leads_back(os.path.join(directory, name), report)]


def _leads_back(path: str, report: Report) -> bool:
    """Whether a folder is a link to one on the way to it, which would have no end."""
    if not os.path.islink(path):
        return False
    target, parent = os.path.realpath(path), os.path.dirname(os.path.abspath(path))
    while os.path.realpath(parent) != target:
        if parent == os.path.dirname(parent):
            return False
        parent = os.path.dirname(parent)
    report(path, f"a link to {target}, in which it lies itself; expected a folder or a link to another one")
    return True


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _from_folder(spec: DatasetSpec, split: str, root: str, report: Report) -> list[tuple[str, str]]:
    """(key, image suffix) of every image of the split."""
    part = spec.split(split)
    for folder, what in ((part.image_dir, "images"), (part.label_dir, "labels")):
        if folder and not os.path.isdir(os.path.join(root, folder)):
            raise UserError(f"{os.path.join(root, folder)}: folder not found; expected the {what} of split '{split}' "
                            f"of {spec.title} (layout: data/README.md)")
    if not part.by_label:
        return list(_keys(os.path.join(root, part.image_dir), part.image_suffix, part.nested, report,
                          part.same_names).items())
    keys = _keys(os.path.join(root, part.label_dir), (part.label_suffix,), part.nested, report)
    for name, other in spec.splits.items():  # no image in two splits, as the published VOC folders would have
        if name == split or not other.by_label:
            continue
        theirs = _keys(os.path.join(root, other.label_dir), (other.label_suffix,), other.nested, report)
        shared = keys.keys() & theirs.keys()
        if shared:
            raise UserError(f"{os.path.join(root, part.label_dir)}: {len(shared)} labels also belong to split '{name}' "
                            f"({min(shared)}, ...); expected a list of the images of '{split}', as "
                            f"{os.path.join(root, part.lists[0])} or given as list file")
    return [(key, part.image_suffix[0]) for key in keys]


def _from_list(part: SplitSpec, root: str, path: str, report: Report) -> list[tuple[str, str | None]]:
    """(image, label) of every line of a list file; empty lines are skipped. In a line with a tab, only tabs separate
    words."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [[word.strip() for word in line.split("\t") if word.strip()] if "\t" in line.strip()
                     else line.split() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this list file: {getattr(error, 'strerror', None) or error}") from None
    columns = 1 if part.id_list or not part.label_dir else 2
    expected = "one id" if part.id_list else "'image label'" if columns == 2 else "one image path"
    pairs: list[tuple[str, str | None]] = []
    for number, entry in enumerate(lines, start=1):
        if entry and len(entry) != columns:
            report(f"{path}, line {number}", f"{len(entry)} words; expected {expected} per line"
                   + (", a tab between paths with spaces" if columns == 2 else ""))
        elif entry and part.id_list:
            pairs.append(_pair(part, root, entry[0], part.image_suffix[0]))
        elif entry:
            pairs.append((os.path.join(root, entry[0]), os.path.join(root, entry[1]) if columns == 2 else None))
    return pairs


def _present(paths: Iterable[str], what: str, report: Report, others: Collection[str] = ()) -> dict[str, str]:
    """path -> file, of the paths that are files; their endings count in any case. Asks once per folder, not per file.
    others: files that are no such thing, for the message on what is there instead."""
    found: dict[str, str] = {}
    folders: dict[str, dict[str, dict[str, bool]]] = {}
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = _entries(folder)
        near = folders[folder].get(os.path.splitext(name)[0], {})
        actual = name if name in near else next((other for other in near if other.lower() == name.lower()), None)
        if actual is None:
            instead = min((other for other in near if os.path.join(folder, other) not in others), default=None)
            there = f" (there is {instead}{'; labels are PNG files' if what == 'label' else ''})" if instead else ""
            report(path, f"{what} not found; expected one for every entry of the split{there}")
        elif near[actual]:
            report(path, f"a folder; expected the {what}")
        else:
            found[path] = os.path.join(folder, actual)
    return found


def _entries(folder: str) -> dict[str, dict[str, bool]]:
    """stem -> {name: whether it is a folder} of all that is in a folder; none when there is no such folder."""
    stems: dict[str, dict[str, bool]] = {}
    for entry in os.scandir(folder) if os.path.isdir(folder) else ():
        stems.setdefault(os.path.splitext(entry.name)[0], {})[entry.name] = entry.is_dir(follow_symlinks=False)
    return stems
