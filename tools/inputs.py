"""Pictures, folders, videos and cameras that a command line names."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.folder import IMAGE_SUFFIXES
from utils.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")


@dataclass(frozen=True)
class Input:
    """One picture, video or camera. name: of what is made of it, a relative path without an ending."""

    path: Path
    name: str
    camera: int | None = None

    @property
    def moves(self) -> bool:
        """Whether it is a video or a camera."""
        return self.camera is not None or self.path.suffix.lower() in VIDEO_SUFFIXES


def find_inputs(names: Sequence[str], out: Path) -> list[Input]:
    """Every picture, video and camera that ``names`` mean; folders are searched, but for ``out``.

    Two that would have one name keep their endings in it. UserError for what is not there, for a folder without a
    picture, and for two of one name all the same."""
    found = [one for name in names for one in _find(name, out.resolve())]
    found = _with_endings(found)
    counts = Counter(one.name for one in found)
    if double := next((one for one in found if counts[one.name] > 1), None):
        paths = " and ".join(str(one.path) for one in found if one.name == double.name)
        raise UserError(f"{paths} would both become {double.name}: name the folder above them instead, or predict them "
                        "one after the other into different folders")
    return found


def _find(name: str, out: Path) -> Iterator[Input]:
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
                       and p.is_file() and out not in p.resolve().parents)
        if not files:
            raise UserError(f"{path}: no picture or video in this folder; expected files ending in "
                            f"{', '.join((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))}")
        yield from (Input(p, p.relative_to(path).with_suffix("").as_posix()) for p in files)
    elif path.is_file():
        yield Input(path, path.stem)
    elif name.isdecimal():
        yield Input(path, f"camera{name}", int(name))
    else:
        raise UserError(f"{name}: no such picture, folder or video, and no number of a camera")


def _with_endings(found: list[Input]) -> list[Input]:
    """a.png and a.jpg as a.png and a.jpg instead of twice a."""
    counts = Counter(one.name for one in found)
    return [Input(one.path, one.name + one.path.suffix, one.camera) if counts[one.name] > 1 else one for one in found]
