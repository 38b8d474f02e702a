"""Downloading one file so that an interruption loses nothing and a wrong file never takes its name."""
from __future__ import annotations

import fcntl
import http.client
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

from utils.errors import UserError
from utils.files import sha256, write_text

CHUNK = 1 << 20
#: seconds without a byte, and tries in a row that bring none, after which a download ends
PATIENCE, TRIES = 60.0, 3
#: what cuts a connection off in the middle
CUT_OFF = (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


def download(url: str, target: Path, page: str, digest: str = "") -> str:
    """Fetch a file; its SHA-256 in hexadecimal digits. Bytes lie in ``<target>.part`` until it is whole, and the next
    call goes on behind them.

    page: where a person finds the file, for messages. digest: how its SHA-256 has to begin; '' when it is not known.
    Raises UserError, with the page, when the file is not there, is another one, or the connection does not last."""
    part = target.with_name(target.name + ".part")
    by_hand = f"see {page}, and put the file to {target}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, part)
        got = sha256(part)
    except HTTPError as error:
        raise UserError(f"{url}: the server answers {error.code} ({error.reason}); {by_hand}") from error
    except _NotAFile as error:
        raise UserError(f"{url}: the server sends a page, not a file; {by_hand}") from error
    except (*CUT_OFF, URLError) as error:
        have = part.stat().st_size if part.is_file() else 0
        kept = f", which goes on behind the {have} bytes that are here" if have else ""
        raise UserError(f"{url}: the connection fails ({getattr(error, 'reason', error)}): give the same command again"
                        f"{kept}; or {by_hand}") from error
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error})") from error
    _validator(part).unlink(missing_ok=True)
    if not got.startswith(digest):
        part.unlink()
        raise UserError(f"{url}: has the SHA-256 {got}, expected {digest}{'…' * (len(digest) < len(got))}: it is "
                        f"another file than it was, and was not kept; {by_hand}")
    os.replace(part, target)
    return got


@contextmanager
def one_at_a_time(target: Path) -> Iterator[None]:
    """Let one process of this machine in; the others wait until it is through."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_name(f".{target.name}.lock")
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # the lock goes with the file; its name stays: others may be waiting at it


class _NotAFile(Exception):
    """A server sends a page to read where a file should be."""


def _validator(part: Path) -> Path:
    """Where the server's mark of the version that ``part`` is of is kept."""
    return part.with_name(part.name + ".version")


def _fetch(url: str, part: Path) -> None:
    """Bring ``part`` to its full length, over interruptions that still bring something."""
    fruitless = 0
    while True:
        before = part.stat().st_size if part.is_file() else 0
        try:
            if _read_on(url, part):
                return
        except HTTPError as error:
            if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE or not before:
                raise
            part.unlink()  # longer than the file is now
        except (*CUT_OFF, URLError) as error:
            after = part.stat().st_size if part.is_file() else 0
            fruitless = 0 if after > before else fruitless + 1
            if fruitless >= TRIES or isinstance(error, URLError) and not isinstance(error.reason, CUT_OFF):
                raise


def _read_on(url: str, part: Path) -> bool:
    """One connection: read behind the bytes that are here, or from the start where the server wants that or has another
    version now. Whether the file is whole."""
    have, version = part.stat().st_size if part.is_file() else 0, _validator(part)
    headers = {"User-Agent": "afdcd", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if version.is_file():
            headers["If-Range"] = version.read_text(encoding="utf-8")
    with urlopen(Request(url, headers=headers), timeout=PATIENCE) as response:
        if response.headers.get_content_type() == "text/html":
            raise _NotAFile
        if response.status != http.client.PARTIAL_CONTENT:
            have = 0
        mark = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if mark and not mark.startswith("W/"):  # a weak mark says nothing about single bytes
            write_text(version, mark)
        total = int(response.headers["Content-Length"]) + have if response.headers["Content-Length"] else None
        return _append(response, part, have, total)


def _append(response: Any, part: Path, have: int, total: int | None) -> bool:
    """Write what comes behind the first ``have`` bytes. Whether these are then ``total``; ConnectionError if not."""
    name = part.name.removesuffix(".part")
    with open(part, "ab" if have else "wb") as file, tqdm(total=total, initial=have, unit="B", unit_scale=True,
                                                          desc=name, disable=None) as bar:
        while data := response.read(CHUNK):
            file.write(data)
            have += len(data)
            bar.update(len(data))
        file.flush()
        os.fsync(file.fileno())
    if total is not None and have < total:
        raise ConnectionError(f"it ends after {have} of {total} bytes")
    return True
