"""A time limit on waiting for what may never come: a batch of a stopped loading process, a step of a stopped process.

Neither PyTorch's time limit of its loader (it does not hold while a tensor is handed over) nor an exception (Python
waits for its loading processes at the end) ends a program whose worker hangs. A thread does.
"""
from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from utils.cli import launcher_store, say
from utils.options import option

T = TypeVar("T")
Advice = Callable[[float, str], str]
#: seconds that the processes which wait give each other to say so
GRACE = 3.0
CODE = 2
#: seconds beyond --timeout that processes wait for each other: the watchdog, which says more, comes first
MARGIN = 60


def timeout_option(what: str) -> Any:
    """The field of the setting ``timeout``. what: it is that ends."""
    return option(1800, "seconds without an answer of a loading process or of another process after which the "
                        f"{what} ends", at_least=1, metavar="SECONDS")


class Watchdog:
    """Within, a :func:`time_limit` ends the process with one line when it has lasted so many seconds. Time in which the
    process itself was stopped does not count. then: what to do when the cause is gone, for the line."""

    active: Watchdog | None = None

    def __init__(self, seconds: float, then: str) -> None:
        self.seconds, self.then, self.interval = seconds, then, min(1.0, seconds / 4)
        self.waited, self.advice = 0.0, None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        Watchdog.active = self
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        Watchdog.active = None
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._end.wait(self.interval):
            now = time.monotonic()
            advice = self.advice
            if advice is not None:
                self.waited += min(now - before, 2 * self.interval)
                if self.waited > self.seconds:
                    self._expire(advice)
            before = now

    def _expire(self, advice: Advice) -> None:
        said = advice(self.seconds, self.then)
        say(f"{os.path.basename(sys.argv[0])}: error: {said} (--timeout {self.seconds:g})\n")
        sys.stderr.flush()
        for child in multiprocessing.active_children():
            child.kill()  # a stopped one would never end, and keep waiting whoever reads our output
        os._exit(CODE)


@contextmanager
def time_limit(advice: Advice) -> Iterator[None]:
    """Inside, the active watchdog counts. advice: from its seconds and what to do then to the line that the program
    ends with."""
    dog = Watchdog.active
    if dog is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    outer, waited = dog.advice, dog.waited
    dog.waited, dog.advice = 0.0, advice
    try:
        yield
    finally:
        dog.advice, dog.waited = outer, waited


def in_time(batches: Iterable[T]) -> Iterator[T]:
    """The same batches, each with a time limit."""
    with time_limit(no_batch):
        iterator = iter(batches)
    while True:
        with time_limit(no_batch):
            batch = next(iterator, None)
        if batch is None:
            return
        yield batch


def no_batch(seconds: float, then: str) -> str:
    """Why there may be no batch: what the system says of the loading processes."""
    workers = {child.pid: _state(child.pid) for child in multiprocessing.active_children()}
    for letter, what in (("T", "is stopped (SIGSTOP, a debugger): kill it"),
                         ("D", "waits for a disk: check that the data set's disk answers")):
        found = [pid for pid, state in workers.items() if state == letter]
        if found:
            return f"no batch for {seconds:g} s: loading process {found[0]} {what}, then {then}"
    full = "/dev/shm is nearly full, " if _is_full(Path("/dev/shm")) else ""
    names = ", ".join(map(str, workers)) or "none"
    return (f"no batch for {seconds:g} s: {full}the loading processes ({names}) do not deliver: check the data set's "
            "disk, df -h /dev/shm and ulimit -n, or take fewer --workers")


def no_prediction(seconds: float, then: str) -> str:
    """Nobody else takes part in one."""
    return f"a prediction has lasted {seconds:g} s: the device does not answer (nvidia-smi, dmesg)"


def no_step(seconds: float, then: str) -> str:
    """Which of the processes does not take part, as far as it can be known."""
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if world == 1:
        return f"a step has lasted {seconds:g} s: the device does not answer (nvidia-smi, dmesg)"
    silent = _silent(rank, world)
    names = ", ".join(map(str, silent)) or "none of them"
    return (f"process {rank} of {world} has waited {seconds:g} s for the others; without an answer: {names}: stopped, "
            f"or its machine or device is gone; look there (ps, nvidia-smi, dmesg), then {then}")


def _silent(rank: int, world: int) -> list[int]:
    """The processes that do not say, within GRACE seconds, that they wait too; all others where nobody can be asked."""
    others = [other for other in range(world) if other != rank]
    store = launcher_store()
    if store is None:
        return others
    key = f"waits/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    store.add(f"{key}/{rank}", 1)
    time.sleep(GRACE)
    return [other for other in others if not store.add(f"{key}/{other}", 0)]


def _state(pid: int) -> str:
    """The letter that /proc gives a process; '' where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()[0].upper()
    except (OSError, IndexError):
        return ""


def _is_full(folder: Path) -> bool:
    try:
        space = os.statvfs(folder)
    except OSError:
        return False
    return space.f_bavail < 0.05 * space.f_blocks
