"""The one exception that means "the user gave us something that does not fit", and the nearest name for its message."""
from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input, with a one-line message that names the file, setting or tensor and what was expected.

    settings: names of the settings that would mend it (``crop_size``). The programs print the message on stderr with
    these as flags (``--crop-size``) and exit with code 2, without a traceback."""

    def __init__(self, message: str, *, settings: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.settings = tuple(settings)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that an unknown one resembles most, None when it resembles none."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown name: "; did you mean NEAREST?", or nothing when none is near."""
    close = nearest(name, known)
    return f"; did you mean {close}?" if close else ""
