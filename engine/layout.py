"""How lines of the log are laid out: they fit a terminal of 100 columns, the time before them included."""
from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

TERMINAL = 100
#: columns of a message; the time of day stands before its first line
WIDTH = TERMINAL - len("12:00:00 ")
INDENT = "    "


def fold(parts: Sequence[str], end: str = "", between: str = "  ", width: int = WIDTH) -> str:
    """The parts in a row, in indented further lines where one does not hold them; no part is broken. end: of every line
    but the last."""
    lines = [parts[0]]
    for part in parts[1:]:
        longer = lines[-1] + between + part
        if len(longer) + len(end) <= width:
            lines[-1] = longer
        else:
            lines.append(INDENT + part)
    return f"{end}\n".join(lines)


def aligned(cells: Sequence[str]) -> str:
    """The cells in indented columns of one width."""
    width = max(map(len, cells), default=0)
    per_line = max((WIDTH - len(INDENT) + 2) // (width + 2), 1)
    padded = [cell.ljust(width) for cell in cells]
    rows = (padded[i:i + per_line] for i in range(0, len(padded), per_line))
    return "\n".join(INDENT + "  ".join(row).rstrip() for row in rows)


def break_lines(text: str) -> str:
    """The text with its long lines broken between words; those that are indented have their layout already."""
    width = min(TERMINAL, shutil.get_terminal_size().columns)
    return "\n".join(line if line.startswith(" ") else textwrap.fill(
        line, width, subsequent_indent=INDENT, break_long_words=False, break_on_hyphens=False) or line
        for line in text.split("\n"))
