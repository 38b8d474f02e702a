"""What is taken out of the archives: rules that find the files, and a plan of what becomes of them."""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

from dataset.spec import DatasetSpec, SplitSpec
from tools.preparing.archives import LINK, Archive
from utils.errors import UserError

#: (content, how messages call it) -> content of a PNG file
Convert = Callable[[bytes, str], bytes]


class Item(NamedTuple):
    """A file that is to be written. target: path below the root of the data set. name, size: of the member of the
    archive. convert: None for a copy."""

    target: str
    archive: Archive
    name: str
    size: int
    convert: Convert | None

    @property
    def title(self) -> str:
        """How messages call the member."""
        return f"{self.archive.path}: {self.name}"


@dataclass(frozen=True)
class Rule:
    """Which files of the archives are taken, and where they go.

    distributed_as: name of the archive, for messages. shape: the last parts of their paths, with * for anything within
    a part, as "train/*/*.png". into: folder below the root (default: the parts of ``shape`` as they are). convert: see
    Item; a converted file ends in .png. needed: whether it is an error when there are none.
    """

    distributed_as: str
    shape: str
    into: str | None = None
    convert: Convert | None = None
    needed: bool = True

    def find(self, archives: Sequence[Archive]) -> dict[str, Item]:
        """{target: item}. UserError when a needed rule finds nothing, when it finds a link, and when two archives have
        files of one name and different sizes."""
        parts = (re.escape(part).replace(r"\*", r"[^/.][^/]*") for part in self.shape.split("/"))
        pattern, found = re.compile(rf"(?:.*/)?({'/'.join(parts)})"), {}
        for archive in archives:
            for name, size in archive.members.items():
                match = pattern.fullmatch(name)
                if match is None:
                    continue
                item = Item(self._target(match[1]), archive, name, size, self.convert)
                other = found.setdefault(item.target, item)
                if size == LINK:
                    raise UserError(f"{item.title}: a link; expected an ordinary file")
                if size != other.size:
                    raise UserError(f"{item.title}: has {size} bytes, and {other.title} {other.size}; expected one of "
                                    "them, or two that agree")
        if self.needed and not found:
            given = ", ".join(archive.path.name for archive in archives)
            raise UserError(f"--from: no file like {self.shape} in {given}; expected {self.distributed_as} as well")
        return found

    def _target(self, tail: str) -> str:
        path = PurePosixPath(tail) if self.into is None else PurePosixPath(self.into, PurePosixPath(tail).name)
        return str(path.with_suffix(".png") if self.convert else path)


@dataclass
class Plan:
    """items: {target: what is written there}. lists: {path below the root: ids}, for list files."""

    items: dict[str, Item] = field(default_factory=dict)
    lists: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def add(self, items: Mapping[str, Item]) -> None:
        """Take these too; what is there already stays."""
        self.items = {**items, **self.items}

    @classmethod
    def of_rules(cls, rules: Iterable[Rule], archives: Sequence[Archive]) -> Plan:
        """The plan that takes everything that the rules find."""
        plan = cls()
        for rule in rules:
            plan.add(rule.find(archives))
        return plan

    def count(self, spec: DatasetSpec) -> dict[str, int]:
        """{split: images} of the splits that get any. UserError for an image without its label, and the reverse."""
        return {name: count for name, split in spec.splits.items() if (count := self._count(spec, name, split))}

    def _count(self, spec: DatasetSpec, name: str, split: SplitSpec) -> int:
        images = self._keys(split.image_dir, split.image_suffix)
        labels = self._keys(split.label_dir, (split.label_suffix,)) if split.label_dir else images
        wanted = next((set(self.lists[path]) for path in split.lists if path in self.lists), images | labels)
        for what, present in (("image", images), ("label", labels)):
            missing = wanted - present
            if missing:
                raise UserError(f"--from: {len(missing)} of {len(wanted)} {what}s of split '{name}' of {spec.title} "
                                f"are in no archive ({min(missing)}, ...); expected one for every entry")
        return len(wanted)

    def _keys(self, folder: str, suffixes: Sequence[str]) -> set[str]:
        inside = (target.removeprefix(f"{folder}/") for target in self.items if target.startswith(f"{folder}/"))
        return {path[:-len(suffix)] for path in inside for suffix in suffixes if path.endswith(suffix)}
