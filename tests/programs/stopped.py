"""``train_kd.py`` or ``eval.py`` (the first argument) in which a process stops itself (SIGSTOP), and the others then
wait for it for two seconds only; computing may take as long as ever.

$STOP: the rank that does, after its first batch; "worker": the loading process, at its third item.
"""
from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import dataset
import engine.evaluate
import engine.run
import eval as evaluation
import train_kd
from utils import watchdog
from utils.cli import run_main
from utils.score import SegmentationMetric

STOP = os.environ["STOP"]
collate, loaded, done = dataset.collate, [], []


class Impatient(watchdog.Watchdog):
    """In a hurry, it waits for two seconds for what is stopped."""

    hurry = False

    @property
    def seconds(self) -> float:
        meant = watchdog.no_batch if STOP == "worker" else watchdog.no_step
        return 2 if self.hurry and self.advice is meant else self._seconds

    @seconds.setter
    def seconds(self, value: float) -> None:
        self._seconds = value


def then_stop(function: Callable) -> Callable:
    """The function, and after its first call what $STOP says."""
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        done.append(1)
        if os.environ.get("RANK", "0") == STOP:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the launcher, also while stopped
            os.kill(os.getpid(), signal.SIGSTOP)
        while STOP == "worker" and len(done) == 1 and not is_stopped(multiprocessing.active_children()[0].pid):
            time.sleep(0.05)
        if STOP != "worker" or len(done) == 1:
            watchdog.Watchdog.active.hurry = True
        return result
    return call


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


def stop_at_third(items: list) -> dict:
    loaded.append(1)
    if len(loaded) == 3:
        os.kill(os.getpid(), signal.SIGSTOP)
    return collate(items)


if STOP == "worker":
    engine.run.data.collate = engine.evaluate.collate = stop_at_third
train_kd.Watchdog = evaluation.Watchdog = Impatient
train_kd.train_batch, SegmentationMetric.update = then_stop(train_kd.train_batch), then_stop(SegmentationMetric.update)

if __name__ == "__main__":
    signal.alarm(300)  # ends who waits for ever, and with it the launcher
    sys.exit(run_main({"train_kd.py": train_kd, "eval.py": evaluation}[sys.argv[1]].main, sys.argv[2:]))
