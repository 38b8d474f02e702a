"""Every write of a save, counted, and something that happens in the place of one of them."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import utils.files
import utils.tensor_files


class Writes:
    """Writes, flushes and renamings so far. at: the one before which ``happen`` is called."""

    def __init__(self, at: int, happen: Callable[[], None]) -> None:
        self.count, self.at, self.happen = 0, at, happen

    def __call__(self) -> None:
        self.count += 1
        if self.count == self.at:
            self.happen()


class CountedFile:
    """A file whose writes are counted."""

    def __init__(self, file: Any, writes: Writes) -> None:
        self._file, self._writes = file, writes

    def write(self, content: Any) -> int:
        self._writes()
        return self._file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> CountedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@contextmanager
def counted_writes(at: int = 0, happen: Callable[[], None] = lambda: None) -> Iterator[Writes]:
    """Inside, what the writers of this repository write goes through :class:`Writes`."""
    writes = Writes(at, happen)
    fsync, replace, write_text = os.fsync, os.replace, Path.write_text

    def counted(function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            writes()
            return function(*args, **kwargs)
        return call

    def opened(*args: Any, **kwargs: Any) -> CountedFile:
        return CountedFile(open(*args, **kwargs), writes)

    with mock.patch.object(utils.tensor_files, "open", opened, create=True), \
            mock.patch.object(os, "fsync", counted(fsync)), mock.patch.object(os, "replace", counted(replace)), \
            mock.patch.object(Path, "write_text", counted(write_text)):
        yield writes
