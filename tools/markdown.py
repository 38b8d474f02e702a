"""Tables and figures as the tools print them, in Markdown."""
from __future__ import annotations

import statistics
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    head, *body = (" | ".join([first.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])
                   for first, *cells in (header, *rows))
    rule = "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])])
    return "\n".join([f"| {head} |", f"|{rule}|", *(f"| {line} |" for line in body)])


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """'mean ± standard deviation', or the value alone."""
    text = format(statistics.mean(values), form)
    return f"{text} ± {statistics.stdev(values):{form}}" if len(values) > 1 else text
