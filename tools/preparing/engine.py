"""Carries out a plan: every file is written whole or not at all, and one that is there is not written again."""
from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dataset.discovery import find_samples
from dataset.spec import DatasetSpec
from tools.preparing.archives import Archive, Folder
from tools.preparing.plan import Item, Plan
from utils.errors import UserError
from utils.files import check_target, readable_size, remove_leftovers, temporary_name, write_json, write_text

MANIFEST = "prepared.json"
PNG_FOOT = b"\0\0\0\0IEND\xaeB`\x82"
#: bytes before the first part of a PNG file, and around the content of each
PNG_START, PNG_AROUND = 8, 12
BLOCK = 4096  # a file takes whole ones
#: errors of a link where a copy would go well
NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP)
#: files that are read ahead of the writing threads, for each of them
AHEAD = 4


@dataclass(frozen=True)
class Target:
    """A folder that holds, or is to hold, a data set that was made from archives.

    link: files of an unpacked folder become hard links where they need no conversion."""

    spec: DatasetSpec
    root: Path
    plan: Plan
    archives: Sequence[Archive]
    link: bool = False

    def __post_init__(self) -> None:
        check_target(self.root, "--to", is_folder=True)
        self._check_manifest()

    def missing(self, threads: int = 1) -> list[Item]:
        """What has not been written yet. UserError when an archive is damaged.

        Sizes tell, and after a call that did not come to its end, checksums: a power failure leaves files whose
        content has not reached the disk."""
        items = self.plan.items.values()
        there = {item.target for item in items if is_complete(item, self.root / item.target)}
        before = self._manifest()
        if before is not None and not before["complete"]:
            there = self._intact([item for item in items if item.target in there], threads)
        return [item for item in items if item.target not in there]

    def _intact(self, items: Sequence[Item], threads: int) -> set[str]:
        """Those of these files that hold what the plan wants."""
        whole = {item.target for item in items if self._is_original(item)}
        items = [item for item in items if item.target not in whole]
        wanted = {id(archive): archive.checksums({item.name for item in items if item.archive is archive
                                                  and item.convert is None}) for archive in self.archives}

        def check(item: Item) -> bool:
            data = (self.root / item.target).read_bytes()
            return is_whole_png(data) if item.convert else zlib.crc32(data) == wanted[id(item.archive)][item.name]

        with ThreadPoolExecutor(threads) as pool, tqdm(total=len(items), desc="compare", unit="file", leave=False,
                                                       disable=not sys.stderr.isatty()) as bar:
            for item, good in zip(items, pool.map(check, items), strict=True):
                bar.update()
                whole |= {item.target} if good else set()
        return whole

    def _manifest(self) -> dict | None:
        """What the last call wrote about itself; None when there was none."""
        path = self.root / MANIFEST
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        try:
            return {"dataset": None, "archives": {}, "complete": False, **json.loads(text)}
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: cannot be read ({error}); remove it together with what it describes") from None

    def _identities(self) -> dict[str, str]:
        return {archive.path.name: archive.identity for archive in self.archives if archive.identity}

    def _check_manifest(self) -> None:
        """UserError when the folder holds something else than an earlier call for these archives has left."""
        before = self._manifest()
        if before is None:
            strangers = (item for item in self.plan.items.values() if self._is_strange(item))
            if stranger := next(strangers, None):
                raise UserError(f"--to {self.root}: holds {stranger.target}, which this tool has not written; expected "
                                "a new folder, or one that an earlier call has begun")
            return
        if before["dataset"] != self.spec.name:
            raise UserError(f"--to {self.root}: holds '{before['dataset']}'; expected another folder for "
                            f"'{self.spec.name}'")
        for name, identity in self._identities().items():
            if before["archives"].get(name, identity) != identity:
                raise UserError(f"--to {self.root}: was made from another {name}; expected a new folder")

    def _is_strange(self, item: Item) -> bool:
        """Whether another file lies where this is to go."""
        return (self.root / item.target).exists() and not self._is_original(item)

    def _is_original(self, item: Item) -> bool:
        """Whether what lies there is the very file that it is made from."""
        path = self.root / item.target
        return isinstance(item.archive, Folder) and path.exists() and path.samefile(item.archive.file(item.name))

    def needed(self, items: Sequence[Item]) -> int:
        """About how many bytes these files will take; a converted one is counted as large as what it is made from."""
        return sum(-(-item.size // BLOCK) * BLOCK for item in items if not self._is_link(item))

    def free(self) -> int:
        """Bytes that are free where the folder is or will be."""
        return shutil.disk_usage(next(p for p in (self.root, *self.root.resolve().parents) if p.exists())).free

    def _is_link(self, item: Item) -> bool:
        return self.link and item.convert is None and isinstance(item.archive, Folder)

    def fill(self, items: Sequence[Item], threads: int) -> dict[str, int]:
        """Write these files and the lists; {split: images}, as the data set finds them.

        UserError when the disk is too small or an archive is damaged. What was written until then stays, and the next
        call goes on."""
        needed, free = self.needed(items), self.free()
        if needed > free:
            raise UserError(f"--to {self.root}: {len(items)} files need about {readable_size(needed)}, but "
                            f"{readable_size(free)} are free; expected a folder on a larger disk")
        try:
            self._note(None)
            for folder in {self.root, *((self.root / target).parent for target in self.plan.items)}:
                folder.mkdir(parents=True, exist_ok=True)
                remove_leftovers(folder, MANIFEST)
            self._write_all(items, threads)
            for path, ids in self.plan.lists.items():
                write_text(self.root / path, "".join(f"{one}\n" for one in ids))
            os.sync()  # before they are called complete
            counts = {split: len(find_samples(self.spec, self.root, split)) for split in self.plan.count(self.spec)}
            self._note(counts)
        except OSError as error:
            raise UserError(f"--to {self.root}: cannot be written ({error.strerror or error}); what is there stays, "
                            "and the same command goes on") from error
        return counts

    def _note(self, counts: dict[str, int] | None) -> None:
        """Write the manifest; counts: None while something is missing."""
        archives = {**(self._manifest() or {"archives": {}})["archives"], **self._identities()}
        write_json(self.root / MANIFEST, {"dataset": self.spec.name, "archives": archives,
                                          "files": len(self.plan.items), "complete": counts is not None,
                                          "images": counts})

    def _write_all(self, items: Sequence[Item], threads: int) -> None:
        pending: set[Future] = set()
        with ThreadPoolExecutor(threads) as pool, tqdm(total=len(items), desc=self.spec.name, unit="file", leave=False,
                                                       disable=not sys.stderr.isatty()) as bar:
            try:
                for task in self._tasks(items):
                    pending.add(pool.submit(task))
                    if len(pending) >= AHEAD * threads:
                        done, pending = wait(pending, return_when=FIRST_COMPLETED)
                        bar.update(sum(one.result() for one in done))
                bar.update(sum(one.result() for one in pending))
            finally:
                pool.shutdown(cancel_futures=True)

    def _tasks(self, items: Sequence[Item]) -> Iterator[Callable[[], int]]:
        """A function per file that writes it and returns 1. An archive is read here, in its own order."""
        for archive in self.archives:
            mine = [item for item in items if item.archive is archive]
            links, read = [item for item in mine if self._is_link(item)], {}
            for item in mine:
                if not self._is_link(item):
                    read.setdefault(item.name, []).append(item)
            yield from (lambda item=item: self._link(item) for item in links)
            for name, data in archive.read(read.keys()):
                yield from (lambda item=item, data=data: self._write(item, data) for item in read[name])

    def _write(self, item: Item, data: bytes) -> int:
        content = data if item.convert is None else item.convert(data, item.title)
        self._put(item, lambda path: path.write_bytes(content))
        return 1

    def _link(self, item: Item) -> int:
        source = item.archive.file(item.name).resolve()
        try:
            self._put(item, lambda path: os.link(source, path))
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            raise UserError(f"--link: {source} cannot be linked to from {self.root} ({error.strerror}); hard links "
                            "want both on one file system, and one that has them: leave it out to copy") from error
        return 1

    def _put(self, item: Item, make: Callable[[Path], object]) -> None:
        """As utils.files.write_atomically but for the flush, which would take longer than all the rest; ``fill``
        flushes all at once, and :meth:`missing` finds what was lost before."""
        path = self.root / item.target
        temporary = temporary_name(path)
        try:
            make(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def is_complete(item: Item, path: Path) -> bool:
    """Whether a file is there as the plan wants it: of the size of its original, or a PNG file with an end."""
    try:
        if item.convert is None:
            return path.stat().st_size == item.size
        with open(path, "rb") as file:
            file.seek(-len(PNG_FOOT), os.SEEK_END)
            return file.read() == PNG_FOOT
    except OSError:  # not there, or shorter than that
        return False


def is_whole_png(data: bytes) -> bool:
    """Whether every part of a PNG file has the checksum that stands behind it, to the last one."""
    at, kind = PNG_START, b""
    while at + PNG_AROUND <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + PNG_AROUND + length
        if data[end - 4:end] != struct.pack(">I", zlib.crc32(data[at + 4:end - 4])):
            return False
        at = end
    return at == len(data) and kind == b"IEND"
