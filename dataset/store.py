"""The files of a cache: decoded pictures one after the other, and an index of lines that says what lies where.

    NAME.pixels   64 bytes that tell this file from any other, then the pictures: BGR, and the label behind it
    NAME.index    one line per picture, written after its pixels: a checksum and a JSON object

Nothing is moved or written over, except for a damaged picture by its own bytes. So readers need no lock, a process that
dies leaves at worst a picture that no line speaks of, and a run goes on with the pictures that it started with.
"""
from __future__ import annotations

import json
import mmap
import os
import secrets
import threading
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import UserError

MAGIC, HEADER = b"decoded pictures, format 1: ", 64


class Entry(NamedTuple):
    """One picture of a store, and which files it is.

    image, label: paths relative to the root of the data set (None: no label). stamp: size and time of change of both
    files. content: digest of their bytes. decoder: what the pixels depend on beside them. values: hexadecimal bit mask
    of the label values. checksum: of the pixels. offset: of the first of them.
    """

    image: str
    label: str | None
    stamp: tuple[int, ...]
    content: str
    decoder: str
    height: int
    width: int
    values: str
    checksum: int
    offset: int = 0

    @property
    def end(self) -> int:
        """Position behind the last of its pixels."""
        return self.offset + self.height * self.width * (3 if self.label is None else 4)


class Store:
    """The two files of one split; they need not exist yet."""

    def __init__(self, folder: Path, name: str) -> None:
        self.pixels, self.index = folder / f"{name}.pixels", folder / f"{name}.index"

    def identity(self) -> bytes | None:
        """The head of the pixel file, or None when there is none. UserError for a file that is something else."""
        try:
            with open(self.pixels, "rb") as file:
                head = file.read(HEADER)
        except FileNotFoundError:
            return None
        if len(head) == HEADER and not head.startswith(MAGIC):
            raise UserError(f"{self.pixels}: not a file of the cache; expected none of that name", settings=["cache"])
        return head if len(head) == HEADER else None

    def entries(self) -> list[Entry]:
        """Of all pictures that are complete. Lines that are damaged or belong to other pixels do not count."""
        entries = self._lines()
        end = self.pixels.stat().st_size if entries else 0
        return [entry for entry in entries if entry.end <= end]

    def end(self) -> int:
        """Where the next picture goes: behind all others, and those that were lost because the file was cut off."""
        ends = [self.pixels.stat().st_size, *(entry.end for entry in self._lines())]
        return -(-max(ends) // HEADER) * HEADER

    def _lines(self) -> list[Entry]:
        identity = self.identity()
        if identity is None or not self.index.exists():
            return []
        entries = (_parsed(line, identity) for line in self.index.read_bytes().split(b"\n"))
        return [entry for entry in entries if entry is not None]

    def map(self, identity: bytes) -> mmap.mmap:
        """The pixel file, read-only. UserError when it is not the one that had this identity."""
        if self.identity() != identity:
            raise UserError(f"{self.pixels}: replaced or removed while in use; start again", settings=["cache"])
        with open(self.pixels, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def mend(self, identity: bytes, offset: int, pixels: bytes) -> None:
        """Write the pixels of a picture again where they were, in the file of this identity."""
        self.map(identity).close()
        with open(self.pixels, "rb+") as file:
            _write(file.fileno(), pixels, offset)


class StoreWriter:
    """Adds pictures to a store, from several threads; one process at a time. Use it in a ``with`` block."""

    def __init__(self, store: Store) -> None:
        self.identity = store.identity()
        self._mutex = threading.Lock()
        self._pixels = os.open(store.pixels, os.O_RDWR | os.O_CREAT, 0o666)
        self._index = os.open(store.index, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        if self.identity is None:
            self.identity = (MAGIC + secrets.token_hex(16).encode()).ljust(HEADER, b"\n")
            _write(self._pixels, self.identity, 0)
        self._end = store.end()
        os.write(self._index, b"\n")  # ends a line that was cut off

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._pixels)
        os.close(self._index)

    def add(self, entry: Entry, pixels: bytes) -> None:
        """Append the pixels of a picture, then its entry."""
        with self._mutex:
            offset = self._end
            self._end += -(-len(pixels) // HEADER) * HEADER
        _write(self._pixels, pixels, offset)
        self.note(entry._replace(offset=offset))

    def note(self, entry: Entry) -> None:
        """Append the entry of pixels that are there."""
        text = json.dumps(entry._asdict()).encode()
        line = b"%08x %s\n" % (zlib.crc32(text, zlib.crc32(self.identity)), text)
        with self._mutex:
            while line:
                line = line[os.write(self._index, line):]


def pixel_bytes(image: np.ndarray, label: np.ndarray | None) -> bytes:
    """The pixels of a picture as a store keeps them: uint8 [H, W, 3], then uint8 [H, W]."""
    return image.tobytes() + (b"" if label is None else label.tobytes())


def _parsed(line: bytes, identity: bytes) -> Entry | None:
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text, zlib.crc32(identity)):
        return None
    entry = Entry(**json.loads(text))
    return entry._replace(stamp=tuple(entry.stamp))


def _write(file: int, data: bytes, offset: int) -> None:
    """Write all of it; one call may write less."""
    rest = memoryview(data)
    while rest:
        done = os.pwrite(file, rest, offset)
        rest, offset = rest[done:], offset + done
