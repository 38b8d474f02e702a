"""The one exception that means "the user gave us something that does not fit"."""
from __future__ import annotations


class UserError(Exception):
    """Bad input, with a one-line message that names the file, flag or tensor and what was expected.

    The command-line programs print the message on stderr and exit with code 2, without a traceback.
    """
