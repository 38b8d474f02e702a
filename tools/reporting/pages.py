"""Tables inside pages: blocks between two comments, which ``tools/report.py`` fills.

    <!-- report: gains camvid-cpu-1 student=deeplabv3_resnet18_w0.25 brief -->
    <!-- end of report -->
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tools.reporting.curve import curve
from tools.reporting.groups import Group, Result, groups
from tools.reporting.scan import SUFFIX, scan
from tools.reporting.tables import classes, cost, gains
from tools.reporting.terms import terms
from utils.errors import UserError

KINDS: Mapping[str, Callable[[Group, bool], str]] = {"gains": gains, "classes": classes, "scan": scan, "cost": cost,
                                                         "terms": terms, "curve": curve}
FILTERS = ("dataset", "student", "teacher", "split", "rows")
BEGIN, END = re.compile(r"<!-- report: (.*?) *-->"), "<!-- end of report -->"


@dataclass(frozen=True)
class Block:
    """One block of a page. begin, end: its first line and the line behind its last, counted from 0."""
    request: str
    begin: int
    end: int


def blocks(lines: Sequence[str], page: str) -> Iterator[Block]:
    """The blocks of a page, outside of code. UserError for a beginning without an end, and the other way round."""
    begin, request, in_code = None, "", False
    for i, line in enumerate(lines):
        opening = BEGIN.fullmatch(line.strip())
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code and opening:
            if begin is not None:
                break
            begin, request = i, opening[1]
        elif not in_code and line.strip() == END:
            if begin is None:
                raise UserError(f"{page}:{i + 1}: {END} without a beginning: expected <!-- report: KIND PROTOCOL -->")
            yield Block(request, begin, i + 1)
            begin = None
    if begin is not None:
        raise UserError(f"{page}:{begin + 1}: <!-- report: {request} --> has no {END} below it")


def render(request: str, results: Sequence[Result]) -> str:
    """The Markdown that a request asks for. UserError when it cannot be understood or has no results."""
    kind, _, rest = request.strip().partition(" ")
    protocol, *more = rest.split() or [""]
    values = dict(word.partition("=")[::2] for word in more if word != "brief")
    if kind not in KINDS or not protocol or not all(name in FILTERS and value for name, value in values.items()):
        raise UserError(f"report {request!r}: expected KIND PROTOCOL with KIND of {', '.join(KINDS)}, then any of "
                        f"{', '.join(f'{name}=' for name in FILTERS)} and brief")
    if kind == "scan" and not protocol.endswith(SUFFIX):
        raise UserError(f"report {request!r}: expected a protocol that ends in {SUFFIX}")
    labels = values.pop("rows", "").split(",")
    found = groups(results, protocol, labels=[label for label in labels if label], **values)
    return "\n\n".join(KINDS[kind](group, "brief" in more) for group in found)


def fill(text: str, page: str, results: Sequence[Result]) -> tuple[str, list[str]]:
    """(the page with every block as the results have it, 'PAGE:LINE: REQUEST' of those that were different)."""
    lines, done, stale, at = text.split("\n"), [], [], 0
    for block in blocks(lines, page):
        try:
            body = render(block.request, results)
        except UserError as error:
            raise UserError(f"{page}:{block.begin + 1}: {error}") from error
        wanted = [lines[block.begin], *body.split("\n"), "", lines[block.end - 1]]
        if wanted != lines[block.begin:block.end]:
            stale.append(f"{page}:{block.begin + 1}: {block.request}")
        done += [*lines[at:block.begin], *wanted]
        at = block.end
    return "\n".join([*done, *lines[at:]]), stale
