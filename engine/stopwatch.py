"""The time of a run's iterations: speed since the last reading, and what of it is spent on waiting for data."""
from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any


class Stopwatch:
    """Speed since the last reading, and the share of the time that was spent waiting for data.

    A run that is resumed goes on with the window that its state holds (:meth:`held`, :meth:`take_up`).
    """

    def __init__(self) -> None:
        self._earlier: Mapping[str, Any] = {}
        self.restart()

    def take_up(self, window: Mapping[str, Any]) -> None:
        """The next :meth:`restart` goes on with this window, of :meth:`held`; {"steps": None}: nobody knows it."""
        self._earlier = window

    def held(self) -> dict[str, Any]:
        """The window up to the last step; before the :meth:`restart` the one to go on with."""
        return dict(self._earlier) or {
            "seconds": self.mark - self.start, "cpu_seconds": self.cpu_mark - self.cpu_start, "waited": self.waited,
            "images": self.images, "steps": self._all_steps()}

    def _all_steps(self) -> int | None:
        return self.steps if self._whole else None

    def restart(self) -> None:
        """Start a new window now."""
        earlier, self._earlier = self._earlier, {}
        self.mark, self.cpu_mark = time.perf_counter(), time.process_time()
        self.start = self.mark - earlier.get("seconds", 0.0)
        self.cpu_start = self.cpu_mark - earlier.get("cpu_seconds", 0.0)
        self.waited = earlier.get("waited", 0.0)
        self._whole = earlier.get("steps", 0) is not None
        self.images, self.steps = earlier.get("images", 0), earlier.get("steps") or 0

    def skip(self) -> None:
        """What passed since the last step, such as a validation, does not count."""
        now, cpu_now = time.perf_counter(), time.process_time()
        self.start, self.mark = self.start + now - self.mark, now
        self.cpu_start, self.cpu_mark = self.cpu_start + cpu_now - self.cpu_mark, cpu_now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside, between a batch and its step, does not count."""
        start, cpu_start = time.perf_counter(), time.process_time()
        yield
        self.start += time.perf_counter() - start
        self.cpu_start += time.process_time() - cpu_start

    def got_batch(self) -> None:
        """A batch has arrived: what passed since the last step was waiting."""
        self.waited += time.perf_counter() - self.mark

    def count(self, images: int) -> None:
        """One step over that many images is done."""
        self.images += images
        self.steps += 1
        self.mark, self.cpu_mark = time.perf_counter(), time.process_time()

    def time_of(self, steps: int) -> timedelta:
        """How long so many steps take at the speed since the last reading (of one step at least), in whole seconds."""
        return timedelta(seconds=int(steps * (time.perf_counter() - self.start) / self.steps))

    def read(self) -> dict[str, Any]:
        """The window, and start the next one: images per second of all processes, share of the time waiting for data,
        seconds, seconds of CPU time of this process without its loading processes, and steps (None where some are not
        known)."""
        passed = max(time.perf_counter() - self.start, 1e-9)
        window = {"images_per_second": max(self.images / passed, 1e-9), "waiting_for_data": self.waited / passed,
                  "seconds": passed, "cpu_seconds": time.process_time() - self.cpu_start,
                  "steps": self._all_steps()}
        self.restart()
        return window
