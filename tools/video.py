"""Videos and cameras, frame by frame, through OpenCV."""
from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import cv2
import numpy as np

from utils.errors import UserError

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what cannot be opened is said in one line, by us

#: frames per second of a camera that does not say
USUAL_RATE = 25.0
#: files that say how many frames they have; of others OpenCV knows the duration, which may be that of a longer sound
COUNTED = (".mp4", ".m4v", ".mov", ".avi")


class VideoReader:
    """The frames of a video file or a camera, RGB. A context: leaving it closes the source.

    rate: frames per second. broken_off: after reading, how the source ended before its end, in words; None when it did
    not. is_sure: whether that can be known of such a source. UserError when the source cannot be opened."""

    def __init__(self, source: Path | int) -> None:
        self.is_camera = isinstance(source, int)
        self.name = f"camera {source}" if self.is_camera else str(source)
        self._capture = cv2.VideoCapture(source if self.is_camera else str(source))
        if not self._capture.isOpened():
            what = "a camera that is there" if self.is_camera else "a video that OpenCV can decode"
            raise UserError(f"{self.name}: cannot be opened; expected {what}")
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate < 1000 else USUAL_RATE
        self.broken_off: str | None = None
        self.is_sure = self.is_camera or source.suffix.lower() in COUNTED

    def frames(self, most: int | None = None) -> Iterator[np.ndarray]:
        """uint8 [H, W, 3] RGB, to the end or ``most`` of them."""
        for done in count() if most is None else range(most):
            there, frame = self._capture.read()
            if not there:
                self.broken_off = self._missing(done)
                return
            yield np.ascontiguousarray(frame[..., ::-1])

    def _missing(self, done: int) -> str | None:
        """What is wrong when nothing comes after so many frames. Containers may name a rounded number of them."""
        if self.is_camera:
            return f"{self.name}: gives no more frames after {done}"
        named = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        if named - done <= max(1, named // 100):
            return None
        if not self.is_sure:
            return f"{self.name}: ends after {done} frames but lasts for {named}: it breaks off, or its sound is longer"
        return f"{self.name}: breaks off, {done} of its {named} frames can be read"

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._capture.release()


class VideoWriter:
    """An .mp4 file that appears when it is finished. rate: frames per second."""

    def __init__(self, path: Path, rate: float) -> None:
        self.path, self.rate = path, rate
        self._temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")  # OpenCV reads the ending
        self._file: cv2.VideoWriter | None = None

    def add(self, frame: np.ndarray) -> None:
        """Append a frame, uint8 [H, W, 3] RGB, all of one size. UserError when OpenCV cannot write videos."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = cv2.VideoWriter(str(self._temporary), cv2.VideoWriter.fourcc(*"mp4v"), self.rate,
                                         frame.shape[1::-1])
            if not self._file.isOpened():
                raise UserError(f"{self.path}: OpenCV cannot write this video")
        self._file.write(np.ascontiguousarray(frame[..., ::-1]))

    def finish(self) -> None:
        """Close the file and give it its name."""
        self._file.release()
        os.replace(self._temporary, self.path)

    def discard(self) -> None:
        """Remove what is not finished; nothing after `finish`."""
        if self._file is not None:
            self._file.release()
        self._temporary.unlink(missing_ok=True)
