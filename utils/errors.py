"""The one exception that means "the user gave us something that does not fit"."""
from __future__ import annotations

from collections.abc import Iterable


class UserError(Exception):
    """Bad input, with a one-line message that names the file, setting or tensor and what was expected.

    settings: names of the settings that would mend it (``crop_size``). The programs print the message on stderr with
    these as flags (``--crop-size``) and exit with code 2, without a traceback."""

    def __init__(self, message: str, *, settings: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.settings = tuple(settings)
