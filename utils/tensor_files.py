"""Files of tensors: one reader that loads nothing but tensors and plain values, one atomic writer."""
from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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


def save_tensors(path: Path, content: Any) -> None:
    """Write tensors, numbers, strings, lists and dicts, atomically; the same content gives the same bytes. UserError
    when ``path`` cannot be written."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # given a path, torch puts its name into the file
            torch.save(content, file)

    try:
        write_atomically(path, write)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(f"{path}: cannot be written ({first_line(error)})") from error


def load_tensors(path: Path, what: str, settings: Iterable[str] = ()) -> Any:
    """The content of a file of :func:`save_tensors`, or of any ``torch.save``, on the CPU.

    what: the kind of file, settings: by which it was given, for messages. Raises UserError for whatever holds anything
    but tensors and plain values."""
    if not path.exists():
        raise UserError(f"{path}: no such {what}", settings=settings)
    if not path.is_file():
        raise UserError(f"{path}: expected a {what}, this is {'a folder' if path.is_dir() else 'no plain file'}",
                        settings=settings)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})", settings=settings) from error
    except Exception as error:  # a damaged or hostile file can make the reader raise nearly anything
        refused = isinstance(error, pickle.UnpicklingError) and "unsupported global" in str(error).lower()
        reason = ("it holds Python objects other than tensors, which are refused for safety" if refused else
                  "it is not readable (cut off, or not a PyTorch file)")
        raise UserError(f"{path}: not a {what} that can be loaded: {reason}", settings=settings) from error
