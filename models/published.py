"""Files that others have published, by name: ``get:NAME`` in place of a path, from the table ``weight_links.toml``."""
from __future__ import annotations

import difflib
import logging
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from utils.download import download, one_at_a_time
from utils.errors import UserError
from utils.files import sha256, write_text

log = logging.getLogger("afdcd")
TABLE = Path(__file__).with_name("weight_links.toml")
PREFIX = "get:"


@dataclass(frozen=True)
class Published:
    """A file that somebody else has published.

    about: in a few words. page: where it is published. file: what it is called here. url: None where only a person at a
    browser gets it, from ``page``. digest: how its SHA-256 begins, as far as its publisher says so. data: whether it is
    a data set, not weights."""

    name: str
    about: str
    page: str
    file: str
    url: str | None = None
    digest: str = ""
    data: bool = False

    @property
    def folder(self) -> Path:
        """Where it goes unless told otherwise: ``data``, or the folder of weights, which $CKPT may name."""
        return Path("data") if self.data else Path(os.environ.get("CKPT") or "pretrained_ckpt")


@cache
def published() -> Mapping[str, Published]:
    """Every file of the table by its name."""
    groups = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return {name: _entry(name, group, entry) for group in groups.values() for name, entry in group["files"].items()}


def _entry(name: str, group: Mapping[str, str], entry: Mapping[str, str]) -> Published:
    path = entry.get("path")
    file = entry.get("file") or str(path).rpartition("/")[2]
    return Published(name, entry.get("about", group["about"]), entry.get("page", group["page"]), file,
                     None if path is None else group["base"] + path, entry.get("digest", ""), entry.get("data", False))


def find(name: str) -> Published:
    """The entry of a name; UserError, with the nearest ones, when there is none."""
    known = published()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise UserError(f"{PREFIX}{name}: no published file of that name"
                        f"{' (did you mean ' + ', '.join(near) + '?)' if near else ''}: python tools/get_weights.py "
                        "--list prints all")
    return known[name]


def how_to_get(path: Path) -> str:
    """The end of a message on a file that is not there: how it gets there, if it is called like one of the table."""
    one = next((one for one in published().values() if one.file == path.name), None)
    if one is None:
        return ""
    if one.url is None:
        return f"; only a browser gets it, from {one.page}"
    to = "" if path.parent == one.folder.expanduser() else f" --to {path.parent}"
    return f"; python tools/get_weights.py {one.name}{to} downloads it"


def fetch(name: str, folder: Path | None = None) -> Path:
    """The file of a name, downloaded when it is not there. Of several processes of a machine one downloads and the
    others wait. A SHA-256 that nobody has published is written beside it.

    folder: default as :attr:`Published.folder`. Raises UserError for an unknown name, as ``utils.download.download``,
    and for a file that has to be fetched by hand."""
    one = find(name)
    target = (folder or one.folder).expanduser() / one.file
    if target.is_file():  # perhaps of another origin
        check(one, target)
        return target
    if one.url is None:
        raise UserError(f"{PREFIX}{name}: has no link that a program could follow; see {one.page}, and put the file to "
                        f"{target}")
    try:
        with one_at_a_time(target):
            if not target.is_file():  # another process may have brought it meanwhile
                _download(one, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error})") from error
    return target


def _download(one: Published, target: Path) -> None:
    log.info("%s%s: downloading %s", PREFIX, one.name, one.url)
    got = download(one.url, target, one.page, one.digest)
    if len(one.digest) < len(got):
        write_text(target.with_name(target.name + ".sha256"), f"{got}  {target.name}\n")
    said = "as published" if len(one.digest) == len(got) else f"{one.digest}… is published" if one.digest else \
        "nobody has published it, so it was not compared"
    log.info("%s: SHA-256 %s (%s)", target, got, said)


def check(one: Published, path: Path) -> None:
    """UserError when a file that is here does not begin with the digest of the table."""
    if not (got := sha256(path)).startswith(one.digest):
        raise UserError(f"{path}: has the SHA-256 {got}, expected {one.digest}: remove it, and fetch it again")


def place(source: str | os.PathLike) -> str | os.PathLike:
    """Where the file of a ``get:NAME`` is or would go; any other source as it is."""
    if isinstance(source, str) and source.startswith(PREFIX):
        one = find(source.removeprefix(PREFIX))
        return str(one.folder.expanduser() / one.file)
    return source


def local(source: str | os.PathLike | None) -> str | os.PathLike | None:
    """The path of a ``get:NAME``, fetched first if need be; any other source as it is."""
    if isinstance(source, str) and source.startswith(PREFIX):
        return str(fetch(source.removeprefix(PREFIX)))
    return source
