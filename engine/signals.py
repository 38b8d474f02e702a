"""Signals that ask a run to stop: it ends its step, saves, says how to go on, and exits with a code to requeue on."""
from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from engine.log import LOG
from engine.settings import Settings
from utils.distributed import Distributed, LargestEverywhere
from utils.watchdog import no_step, time_limit

#: exit code after a signal: EX_TEMPFAIL ("try again later") of sysexits.h; Ctrl-C has the shell's own
REQUEUE, INTERRUPTED = 75, 130
CODES = {signal.SIGTERM: REQUEUE, signal.SIGUSR1: REQUEUE, signal.SIGINT: INTERRUPTED}
#: seconds in which a further signal is an echo: launchers repeat what a terminal or a scheduler has sent to all
ECHO = 1.0


class Stop(SystemExit):
    """A run that ends because of a signal, at a place where nothing has to be saved."""


class StopSignals:
    """Within, SIGTERM, SIGINT and SIGUSR1 ask this process to stop: at once (:class:`Stop`), or, inside
    :meth:`deferred`, when all look (:meth:`agreed`). There a second Ctrl-C ends it at once, as KeyboardInterrupt.

    asked: the signal, 0 for none. begun: whether the run has taken its folder over from an earlier one. settings: for
    the line by which the main process says how to go on."""

    def __init__(self, settings: Settings, distributed: Distributed) -> None:
        self.settings, self.speaks = settings, distributed.is_main_process
        self._largest = LargestEverywhere(distributed.device)
        self.asked, self.begun = 0, False
        self._deferred, self._heard = False, 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in CODES}
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is not Stop:
            return
        if self.begun or self.settings.running.resume:
            self._say("outside of its steps", "goes on from the last training state, if there is one")
        elif self.speaks:  # a state that is there is an earlier run's
            LOG.info("stopped by %s before it has begun: the same command starts it", signal.Signals(self.asked).name)

    @property
    def code(self) -> int:
        """The exit code: 0 as long as nobody has asked to stop."""
        return CODES.get(self.asked, 0)

    def agreed(self, now: bool = False) -> bool:
        """Whether one of the processes was asked to stop. All have to call it, at the same places. now: on GPUs too
        the present answer, which waits for the device, not that of the last call."""
        with time_limit(no_step):
            number = self._largest.now(self.asked) if now else self._largest(self.asked)
        self.asked = self.asked or number
        return number != 0

    def check(self, now: bool = False) -> None:
        """End the run (:class:`Stop`) if one of the processes was asked to. All have to call it, at the same places.
        now: see :meth:`agreed`."""
        if self.agreed(now):
            raise Stop(self.code)

    def end(self, step: int) -> None:
        """The run ends after this step, which is saved."""
        self._say(f"after step {step}, which is saved", "goes on from it")

    def _say(self, when: str, then: str) -> None:
        """One line on why the run ends and how it goes on."""
        if self.speaks:
            how = "" if self.settings.running.resume == "auto" else " with --resume auto"
            LOG.info("stopped by %s %s: the same command%s %s", signal.Signals(self.asked).name, when, how, then)

    @contextmanager
    def deferred(self, value: bool = True) -> Iterator[None]:
        """Inside, a signal is only noted. value: False inside of that, where it counts at once again."""
        before, self._deferred = self._deferred, value
        try:
            self._stop_if_due()
            yield
        finally:
            self._deferred = before

    def _stop_if_due(self) -> None:
        if self.asked and not self._deferred:
            raise Stop(self.code)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now, first = time.monotonic(), not self.asked
        if not first and now - self._heard < ECHO:
            return
        self.asked, self._heard = self.asked or number, now
        self._stop_if_due()
        if not first and number == signal.SIGINT:
            raise KeyboardInterrupt
        if first and self.speaks and number == signal.SIGINT:
            # print could have been interrupted by this very signal
            os.write(sys.__stderr__.fileno(), b"Ctrl-C: saving after this step; once more ends at once\n")
