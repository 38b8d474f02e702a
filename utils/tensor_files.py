"""Files of tensors: one reader that loads nothing but tensors and plain values, one atomic writer."""
from __future__ import annotations

import copy
import hashlib
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from utils.errors import UserError
from utils.files import write_atomically


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, at most 160 characters; its class name when there is none."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


def in_plain_order(content: Any) -> Any:
    """Dicts and lists of tensors with every tensor laid out in the order of its dimensions; one that is so is shared,
    the containers are new."""
    if isinstance(content, torch.Tensor):
        return content.contiguous()
    if isinstance(content, dict):
        ordered = copy.copy(content)  # of the same class, with the versions that modules note down
        ordered.update((key, in_plain_order(value)) for key, value in content.items())
        return ordered
    return [in_plain_order(value) for value in content] if isinstance(content, list) else content


#: before the checksum at the end of a file: a comment of the zip archive that ``torch.save`` makes, which readers skip
MARK = b"afdcd sha256 "
COMMENT = len(MARK) + 64
#: the first bytes of a file that torch reads as an archive
ZIP_START = b"PK\3\4"
#: times the size of a file, what it may unpack to: files that others have compressed are read, a bomb is not
MOST_UNPACKED = 8


def save_tensors(path: Path, content: Any, keep: Path | None = None) -> None:
    """Write tensors, numbers, strings, lists and dicts, atomically and with a checksum inside; the same content gives
    the same bytes. keep: what the file that was there becomes. UserError when ``path`` cannot be written."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # given a path, torch puts its name into the file
            torch.save(content, file)
        _seal(temporary)

    try:
        write_atomically(path, write, keep)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(f"{path}: cannot be written ({first_line(error)})") from error


def load_tensors(path: Path, what: str, settings: Iterable[str] = ()) -> Any:
    """The content of a file of :func:`save_tensors`, or of any ``torch.save``, on the CPU.

    what: the kind of file, settings: by which it was given, for messages. Raises UserError for whatever holds anything
    but tensors and plain values, and for a file that does not fit the checksum that it has."""
    if not path.exists():
        raise UserError(f"{path}: no such {what}", settings=settings)
    if not path.is_file():
        raise UserError(f"{path}: expected a {what}, this is {'a folder' if path.is_dir() else 'no plain file'}",
                        settings=settings)
    try:
        if not _is_intact(path):
            raise _Damaged
        _check_unpacked_size(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})", settings=settings) from error
    except Exception as error:  # a damaged or hostile file can make the reader raise nearly anything
        raise UserError(f"{path}: not a {what} that can be loaded: {_reason(error)}", settings=settings) from error


class _Damaged(Exception):
    """A file does not fit the checksum inside it."""


class _TooLarge(Exception):
    """A file unpacks to far more than it is."""


def _check_unpacked_size(path: Path) -> None:
    """`_TooLarge` for an archive with parts of more than MOST_UNPACKED times its size together, as they are listed in
    it; torch takes that much memory for them. One that cannot be listed is an error, too."""
    with open(path, "rb") as file:
        if file.read(len(ZIP_START)) != ZIP_START:
            return  # the older form, whose tensors are read one after the other
    with zipfile.ZipFile(path) as archive:
        unpacked, stored = sum(part.file_size for part in archive.infolist()), path.stat().st_size
    if unpacked > MOST_UNPACKED * stored:
        raise _TooLarge(f"its {stored} bytes unpack to {unpacked}, which is refused (PyTorch stores tensors unpacked)")


def _reason(error: Exception) -> str:
    """Why a file cannot be loaded."""
    if isinstance(error, _Damaged):
        return "it is damaged (the checksum inside does not fit: it was cut off or changed after it was written)"
    if isinstance(error, _TooLarge):
        return str(error)
    if isinstance(error, pickle.UnpicklingError) and "unsupported global" in str(error).lower():
        return "it holds Python objects other than tensors, which are refused for safety"
    return "it is not readable (cut off, or not a PyTorch file)"


def _seal(path: Path) -> None:
    """Append the checksum of everything before it, as the comment of the archive."""
    with open(path, "rb+") as file:
        file.seek(-2, os.SEEK_END)  # an archive without a comment ends with the length of it
        file.write(COMMENT.to_bytes(2, "little"))
        digest = _sha256(file, file.tell())
        file.seek(0, os.SEEK_END)
        file.write(MARK + digest)


def _is_intact(path: Path) -> bool:
    """Whether a file fits its checksum; True for one that has none."""
    with open(path, "rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - 2 * COMMENT)
        file.seek(start)
        end = file.read()
        at = end.rfind(MARK)
        return at < 0 or end[at + len(MARK):] == _sha256(file, start + at)


def _sha256(file: BinaryIO, count: int) -> bytes:
    """SHA-256 of the first so many bytes of an open file, in hexadecimal digits."""
    digest = hashlib.sha256()
    file.seek(0)
    while count and (part := file.read(min(count, 1 << 20))):
        digest.update(part)
        count -= len(part)
    return digest.hexdigest().encode()
