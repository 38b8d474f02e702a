"""``train_kd.py`` in which a process stops itself (SIGSTOP), and the others then wait for two seconds only.

$STOP: the rank that does, after its first step; "worker": the loading process, at its third batch.
"""
from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import dataset
import engine.run
import train_kd
from utils import watchdog
from utils.cli import run_main

train_batch, collate = train_kd.train_batch, dataset.collate
loaded = []


def then_stop(run, batch):
    result = train_batch(run, batch)
    if os.environ["STOP"] == str(run.distributed.rank):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the launcher, also while stopped
        os.kill(os.getpid(), signal.SIGSTOP)
    while os.environ["STOP"] == "worker" and run.step == 0 and not is_stopped(multiprocessing.active_children()[0].pid):
        time.sleep(0.05)
    if os.environ["STOP"] != "worker" or run.step == 0:
        watchdog.Watchdog.active.seconds = 2
    return result


def is_stopped(pid):
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


def stop_at_third(items):
    loaded.append(1)
    if len(loaded) == 3:
        os.kill(os.getpid(), signal.SIGSTOP)
    return collate(items)


if os.environ["STOP"] == "worker":
    engine.run.data.collate = stop_at_third
train_kd.train_batch = then_stop

if __name__ == "__main__":
    sys.exit(run_main(train_kd.main))
