"""What a run writes down: text log, JSON lines, TensorBoard scalars and panels, scalars for a tracker."""
from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from engine.layout import break_lines
from engine.tracker import Tracker
from utils.files import write_text

LOG = logging.getLogger("afdcd")


class _TqdmHandler(logging.StreamHandler):
    """Print through tqdm, so that log lines do not tear the progress bar; on a terminal, long lines are broken."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            tqdm.write(break_lines(text) if sys.stdout.isatty() else text, file=sys.stdout)
        except BrokenPipeError:  # whoever reads has gone, which ends the program
            raise
        except OSError:  # a file on a full disk, say
            return


class _LogFile(logging.FileHandler):
    """A text log that misses lines, with one warning, while they cannot be written."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.failed:
            self.failed = True
            warn_once_full(Path(self.baseFilename), sys.exc_info()[1])


def warn_once_full(path: Path, error: BaseException | None) -> None:
    """Say on the terminal alone that a log cannot be written and the run goes on."""
    with suppress(OSError):
        tqdm.write(f"{path}: cannot be written ({error}): the run goes on without it until there is room",
                   file=sys.stderr)


def setup_logging(is_main_process: bool, path: Path | None = None) -> None:
    """Send the ``afdcd`` log to the terminal and, when given, to a file; other processes only report errors.

    What is logged before the file is known is kept, and written to it when it is. The terminal gets the time of day and
    no messages of level DEBUG.
    """
    early = [h for h in LOG.handlers if isinstance(h, MemoryHandler)]
    for handler in [h for h in LOG.handlers if h not in early]:
        LOG.removeHandler(handler)
        handler.close()
    LOG.propagate = False
    LOG.setLevel(logging.DEBUG if is_main_process else logging.ERROR)
    handlers: list[logging.Handler] = [_TqdmHandler()]
    if is_main_process and path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(_LogFile(path, encoding="utf-8"))
    handlers[0].setLevel(logging.INFO)
    for handler, time in zip(handlers, ("%H:%M:%S", "%Y-%m-%d %H:%M:%S"), strict=False):
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", time))
        LOG.addHandler(handler)
    for handler in early:
        LOG.removeHandler(handler)
        if path is not None:
            handler.setTarget(handlers[-1])
            handler.close()
    if is_main_process and path is None:
        LOG.addHandler(MemoryHandler(10000, flushLevel=logging.CRITICAL + 1, flushOnClose=True))


class RunLogger:
    """JSON lines (always) and TensorBoard (unless switched off) of one run. Only the main process makes one.

    A resumed run drops the records past the step it resumes from, so that a log never holds a step twice. validated:
    step past which it drops validations, if that is an earlier one. tracker: gets the same scalars as TensorBoard.
    """

    def __init__(self, directory: Path, name: str, start_step: int = 0, tensorboard: bool = True,
                 validated: int | None = None, tracker: Tracker | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"{name}.jsonl"
        self._drop_after(start_step, start_step if validated is None else validated)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - open for the whole run
        self._pending, self._warned = b"", False  # what could not be written yet
        self._board, self._tracker = None, tracker
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            folder = directory / f"{name}_tensorboard"
            try:
                self._board = SummaryWriter(str(folder), purge_step=start_step + 1)
            except OSError as error:
                warn_once_full(folder, error)

    def _drop_after(self, step: int, validated: int) -> None:
        if not self.path.is_file():
            return
        lines = [line for line, record in log_lines(self.path) if _is_within(record, step, validated)]
        write_text(self.path, "".join(line + "\n" for line in lines))

    def record(self, kind: str, step: int, **values: Any) -> None:
        """Append one JSON line ``{"kind", "step", ...}`` and plot its numbers (nested dicts become a/b tags)."""
        self._pending += json.dumps({"kind": kind, "step": step, **values}).encode() + b"\n"
        self._write_pending()
        scalars = dict(_flatten(kind, values))
        with self._board_may_fail():
            for tag, value in scalars.items() if self._board is not None else ():
                self._board.add_scalar(tag, value, step)
        if self._tracker is not None:
            self._tracker.log(scalars, step)

    def sync(self) -> None:
        """See to it that what was recorded is on the disk, as far as there is room."""
        self._write_pending()
        with suppress(OSError):
            os.fsync(self._file.fileno())

    def _write_pending(self) -> None:
        """Write what is due. What finds no room is kept for the next time."""
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending):]
        except OSError as error:
            if not self._warned:
                warn_once_full(self.path, error)
            self._warned = True

    @contextmanager
    def _board_may_fail(self) -> Iterator[None]:
        """TensorBoard raises, some time later, what its writing thread has met: it is then left out."""
        try:
            yield
        except OSError as error:
            warn_once_full(Path(self._board.log_dir), error)
            self._board = None

    def picture(self, tag: str, image: np.ndarray, step: int) -> None:
        """Add one picture (uint8 [H, W, 3], RGB) to TensorBoard."""
        with self._board_may_fail():
            if self._board is not None:
                self._board.add_image(tag, image, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close everything."""
        self._write_pending()
        with suppress(OSError):
            self._file.close()
        with self._board_may_fail():
            if self._board is not None:
                self._board.close()
        if self._tracker is not None:
            self._tracker.close()


def log_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(line, record) of a run's JSON lines; a last line that a killed run left half-written is dropped, any other that
    cannot be read is left out with a warning."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict):
            yield line, record
        elif number < len(lines):
            LOG.warning("%s: line %d cannot be read and is left out", path, number)


def _is_within(record: dict[str, Any], step: int, validated: int) -> bool:
    """Whether a record is of a step up to these."""
    if record.get("kind") == "report":  # the end, which comes again
        return False
    return 0 < record.get("step", 0) <= (validated if record.get("kind") == "val" else step)


def _flatten(prefix: str, values: dict[str, Any]):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(f"{prefix}/{key}", value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}/{key}", value
