"""Decoded images and labels in memory-mapped files, so that no epoch and no later run decodes them again.

Any number of processes may use and fill a cache at the same time: one of them fills it, the others wait for it.
"""
from __future__ import annotations

import hashlib
import mmap
import os
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from tqdm import tqdm

from dataset.discovery import Sample
from dataset.io import PNG_START, decode_pair, image_size, read_files
from dataset.spec import DatasetSpec
from dataset.store import Entry, Store, StoreWriter, pixel_bytes
from utils.distributed import available_cpus
from utils.errors import UserError
from utils.files import readable_size

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MOST_THREADS = 32
#: what a cache keeps of an entry; an array, which processes share as long as nobody writes to it
ROW = np.dtype([("offset", np.int64), ("height", np.int32), ("width", np.int32), ("checksum", np.uint32),
                ("labelled", bool), ("content", "S65"), ("values", "S64")])


class Cache:
    """The decoded pictures of the samples of one split; :func:`use_cache` makes it. Processes may share it."""

    def __init__(self, store: Store, samples: Sequence[Sample], entries: Sequence[Entry]) -> None:
        self.store, self.samples = store, samples
        self.rows = np.array([(e.offset, e.height, e.width, e.checksum, e.label is not None, e.content, e.values)
                              for e in entries], dtype=ROW)
        self._identity = store.identity()
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_checked": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        self._file = self.store.map(self._identity)
        self._checked = mmap.mmap(-1, len(self.rows))  # shared with the processes that are forked from this one

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The stored pair, read-only: uint8 [H, W, 3] BGR, and uint8 [H, W] label values (None without labels).

        The first time the checksum is compared; what is damaged is decoded again and mended, with a warning. UserError
        when that cannot be done.
        """
        offset, height, width, checksum, labelled, *_ = self.rows[index].item()
        count = height * width
        pixels = np.frombuffer(self._file, np.uint8, count * (4 if labelled else 3), offset)
        if not self._checked[index]:
            if zlib.crc32(pixels) != checksum:
                self._mend(index, pixels)
            self._checked[index] = 1
        image = pixels[:3 * count].reshape(height, width, 3)
        return image, pixels[3 * count:].reshape(height, width) if labelled else None

    def values(self, index: int) -> np.ndarray:
        """uint8 [N]: the different stored values of the label."""
        mask = np.frombuffer(bytes.fromhex(self.rows[index]["values"].decode()), np.uint8)
        return np.flatnonzero(np.unpackbits(mask)).astype(np.uint8)

    def _mend(self, index: int, pixels: np.ndarray) -> None:
        row, sample = self.rows[index], self.samples[index]
        files = read_files(sample)
        where = f"{self.store.pixels}: the picture of {sample.image} is damaged"
        unchanged = _content(*files) == row["content"].decode()
        decoded = pixel_bytes(*decode_pair(sample, *files)) if unchanged else b""
        if zlib.crc32(decoded) != row["checksum"]:
            raise UserError(f"{where}, and the file has changed since; start again", settings=["cache"])
        try:
            self.store.mend(self._identity, int(row["offset"]), decoded)
        except OSError as error:
            raise UserError(f"{where} and cannot be written again: {error.strerror or error}",
                            settings=["cache"]) from None
        if zlib.crc32(pixels) != row["checksum"]:
            raise UserError(f"{where} again after it was written; expected a disk that keeps it", settings=["cache"])
        warnings.warn(f"{where}; decoded again and written anew", stacklevel=3)


class CachedDataset(Protocol):
    """What :func:`use_cache` reads of a dataset, and sets: ``cache``."""

    spec: DatasetSpec
    split: str
    root: str
    samples: list[Sample]
    cache: Cache | None


def use_cache(datasets: Sequence[CachedDataset], folder: str | os.PathLike,
              log: Callable[[str], object] = lambda text: None) -> None:
    """Let splits of one data set read their pictures from a cache in ``folder``; what is missing there is added first.

    What the files are decides: path below the root, size and time of change of image and label, or else their content.
    log: is told what will be added and how large it is. Raises UserError for a folder that cannot be used, for too
    little space, and for images and labels that cannot be decoded.
    """
    if fcntl is None:
        raise UserError("a cache needs Linux or macOS, whose files can be locked", settings=["cache"])
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file; expected a folder for decoded images", settings=["cache"])
    try:
        splits = [_Split(folder, dataset) for dataset in datasets]
        if any(split.missing for split in splits):
            folder.mkdir(parents=True, exist_ok=True)
            log(_announcement(folder, splits))
            with _locked(folder / f"{datasets[0].spec.name}.lock", log):
                _fill(folder, splits)
        for split in splits:
            split.dataset.cache = Cache(split.store, split.dataset.samples, split.found)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be used as a cache: {error.strerror or error}",
                        settings=["cache"]) from None


class _Split:
    """One split to be cached: its store, and what of its samples lies there."""

    def __init__(self, folder: Path, dataset: CachedDataset) -> None:
        self.dataset, self.store = dataset, Store(folder, f"{dataset.spec.name}_{dataset.split}")
        self.wanted = [_identified(sample, dataset.root) for sample in dataset.samples]
        self.look_up()
        # files of which only the date is new have mostly been copied, and are there under their content
        known = {(entry.image, entry.label, *entry.stamp[::2]) for entry in self.known}
        self.sizes = {index: 0 if (image, label, *stamp[::2]) in known else _size(dataset.samples[index])
                      for index, (image, label, stamp) in enumerate(self.wanted) if self.found[index] is None}

    def look_up(self) -> None:
        """Find the samples in the store as it is now."""
        self.known = [entry for entry in self.store.entries() if entry.decoder in ("", cv2.__version__)]
        by_files = {entry[:3]: entry for entry in self.known}
        self.found = [by_files.get(files) for files in self.wanted]

    @property
    def missing(self) -> list[int]:
        """Positions of the samples that are not there."""
        return [index for index, entry in enumerate(self.found) if entry is None]

    @property
    def needed(self) -> int:
        """Bytes that the missing samples will take."""
        return sum(self.sizes.get(index, 0) for index in self.missing)

    def fill(self, bar: tqdm) -> None:
        """Decode what is missing, while the lock is held."""
        self.look_up()  # two datasets may share a store
        by_content = {entry.content: entry for entry in self.known}
        threads = min(available_cpus(), MOST_THREADS)
        with StoreWriter(self.store) as writer, ThreadPoolExecutor(threads) as pool:
            tasks = [pool.submit(self.add, writer, by_content, index) for index in self.missing]
            try:
                for task in as_completed(tasks):
                    task.result()
                    bar.update()
            finally:
                pool.shutdown(cancel_futures=True)
        self.look_up()
        if self.missing:
            raise UserError(f"{self.dataset.samples[self.missing[0]].image}: changed while it was read; start again")

    def add(self, writer: StoreWriter, by_content: dict[str, Entry], index: int) -> None:
        """Decode one sample into the store, unless its pixels are there under another name or date."""
        sample = self.dataset.samples[index]
        image_path, label_path, stamp = _identified(sample, self.dataset.root)
        files = read_files(sample)
        content = _content(*files)
        if content in by_content:
            writer.note(by_content[content]._replace(image=image_path, label=label_path, stamp=stamp))
            return
        image, label = decode_pair(sample, *files)
        pixels = pixel_bytes(image, label)
        present = np.zeros(256) if label is None else np.bincount(label.ravel(), minlength=256)
        decoder = "" if files[0].startswith(PNG_START) else cv2.__version__
        values = np.packbits(present > 0).tobytes().hex()
        writer.add(Entry(image_path, label_path, stamp, content, decoder, *image.shape[:2], values,
                         zlib.crc32(pixels)), pixels)


def _identified(sample: Sample, root: str) -> tuple[str, str | None, tuple[int, ...]]:
    """The first fields of an entry: paths below the root, sizes and times of change."""
    paths = [path for path in (sample.image, sample.label) if path is not None]
    image, label = [os.path.relpath(path, root) for path in paths] + [None] * (2 - len(paths))
    states = [os.stat(path) for path in paths]
    return image, label, tuple(number for state in states for number in (state.st_size, state.st_mtime_ns))


def _content(image_data: bytes, label_data: bytes | None) -> str:
    """Digest of the bytes of both files."""
    parts = [image_data] if label_data is None else [image_data, label_data]
    return " ".join(hashlib.sha256(part).hexdigest()[:32] for part in parts)


def _size(sample: Sample) -> int:
    """Bytes of the decoded sample, from the head of the image."""
    height, width = image_size(sample.image)
    return height * width * (3 if sample.label is None else 4)


def _announcement(folder: Path, splits: Sequence[_Split]) -> str:
    parts = [f"{len(split.missing)} of {len(split.found)} images of {split.dataset.split}" for split in splits
             if split.missing]
    return (f"cache {folder}: decoding {', '.join(parts)}: {readable_size(sum(split.needed for split in splits))} "
            f"({readable_size(shutil.disk_usage(folder).free)} are free)")


def _fill(folder: Path, splits: Sequence[_Split]) -> None:
    """Add what is still missing, with a progress bar on a terminal."""
    for split in splits:
        split.look_up()
    needed, free = sum(split.needed for split in splits), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder}: the decoded images need {readable_size(needed)}, but {readable_size(free)} are "
                        "free; expected a folder on a larger disk", settings=["cache"])
    with tqdm(desc="decode", total=sum(len(split.missing) for split in splits), unit="img", leave=False,
              disable=not sys.stderr.isatty()) as bar:
        for split in splits:
            split.fill(bar)


@contextmanager
def _locked(path: Path, log: Callable[[str], object]) -> Iterator[None]:
    """Hold the lock of a file. The system gives it back when the process ends, however it ends."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"cache {path.parent}: another process is filling it; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
