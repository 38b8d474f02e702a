"""Zip and tar archives, and folders that somebody has unpacked, read file by file in the order in which they lie."""
from __future__ import annotations

import hashlib
import io
import lzma
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path

from utils.errors import UserError

#: size of a member that is no ordinary file
LINK = -1
ZIP_START = b"PK"
ENCRYPTED = 1  # bit of a zip member's flags
BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, NotImplementedError)


class Archive:
    """One of the sources of a data set.

    members: {path inside: bytes, or LINK} of all its files. identity: digest of them; None for a folder, whose files
    may change."""

    identity: str | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        with _damage_named(path):
            self.members: Mapping[str, int] = self._list()
        for name in self.members:
            if name.startswith("/") or "\\" in name or ".." in name.split("/") or re.match("[A-Za-z]:", name):
                raise UserError(f"{path}: holds the path {name!r}, which leads out of the folder that it is unpacked "
                                "in; expected an archive as it is distributed")

    def read(self, names: Set[str]) -> Iterator[tuple[str, bytes]]:
        """(path inside, content) of these members. UserError when the archive is damaged."""
        with _damage_named(self.path):
            yield from self._read(names)

    def checksums(self, names: Set[str]) -> dict[str, int]:
        """{path inside: CRC-32 of the content} of these members. UserError when the archive is damaged."""
        return {name: zlib.crc32(data) for name, data in self.read(names)}

    def _list(self) -> dict[str, int]:
        raise NotImplementedError

    def _read(self, names: Set[str]) -> Iterator[tuple[str, bytes]]:
        raise NotImplementedError


class Folder(Archive):
    """A folder; its own name is the first part of its members' paths, as if it had just been unpacked."""

    def _list(self) -> dict[str, int]:
        members = {}
        for directory, folders, files in os.walk(self.path, followlinks=True):
            folders.sort()
            for name in sorted(files):
                file = Path(directory, name)
                members[file.relative_to(self.path.parent).as_posix()] = file.stat().st_size
        return members

    def file(self, name: str) -> Path:
        """Where a member lies."""
        return self.path.parent / name

    def _read(self, names: Set[str]) -> Iterator[tuple[str, bytes]]:
        for name in self.members:
            if name in names:
                yield name, self.file(name).read_bytes()


class Zip(Archive):
    """A zip file. Its directory names the checksums."""

    def checksums(self, names: Set[str]) -> dict[str, int]:
        return {info.filename: info.CRC for info in self._file.infolist() if info.filename in names}

    def _list(self) -> dict[str, int]:
        self._file = zipfile.ZipFile(self.path)
        infos = [info for info in self._file.infolist() if not info.is_dir()]
        if any(info.flag_bits & ENCRYPTED for info in infos):
            raise UserError(f"{self.path}: has a password; expected an archive without one")
        self.identity = _digest((info.filename, info.file_size, info.CRC) for info in infos)
        return {info.filename: info.file_size for info in infos}

    def _read(self, names: Set[str]) -> Iterator[tuple[str, bytes]]:
        for info in sorted(self._file.infolist(), key=lambda one: one.header_offset):
            if info.filename in names:
                yield info.filename, self._file.read(info)


class Tar(Archive):
    """A tar file, compressed in any way that the standard library reads."""

    def _list(self) -> dict[str, int]:
        self._file = tarfile.open(self.path)  # noqa: SIM115 (as long as this object lives)
        infos = [info for info in self._file.getmembers() if not info.isdir()]
        if isinstance(self._file.fileobj, io.BufferedReader):  # not compressed: no end mark but that of tar itself
            self._file.fileobj.seek(self._file.offset)
            if self._file.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise EOFError("no end mark")
        self.identity = _digest((info.name, info.size, info.mtime) for info in infos)
        return {info.name: info.size if info.isreg() else LINK for info in infos}

    def _read(self, names: Set[str]) -> Iterator[tuple[str, bytes]]:
        for info in self._file.getmembers():
            if info.name in names and info.isreg():
                data = self._file.extractfile(info).read()
                if len(data) != info.size:
                    raise EOFError(f"{info.name} ends early")
                yield info.name, data


def open_archive(path: Path) -> Archive:
    """The archive or folder of a path. UserError when there is none, or when it is damaged, has a password or holds a
    path that leads out of it."""
    if path.is_dir():
        return Folder(path.resolve())
    if not path.is_file():
        raise UserError(f"--from {path}: not found; expected a zip or tar archive, or a folder")
    with _damage_named(path), open(path, "rb") as file:
        start = file.read(len(ZIP_START))
    return Zip(path) if start == ZIP_START else Tar(path)


def _digest(values: Iterable[tuple[object, ...]]) -> str:
    text = "\n".join(" ".join(map(str, value)) for value in values)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """What goes wrong inside, while a source is read, as a UserError."""
    try:
        yield
    except BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: damaged, cut off or no archive ({reason}); expected a complete zip or tar file: "
                        "download it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
