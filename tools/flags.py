"""Command lines that a tool makes for another program."""
from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import TypeVar

from utils.errors import UserError

T = TypeVar("T")


def parsed(parse: Callable[[Sequence[str]], T], flags: Sequence[str]) -> T:
    """``parse(flags)``; what the parser says of a wrong flag becomes the message of a UserError."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse(list(flags))
    except SystemExit as end:
        if end.code == 0:  # --help
            raise
        raise UserError(said.getvalue().partition("error: ")[2].strip()) from None
