"""``train_kd.py`` with something that happens to it, once, in the first of the lives that torchrun gives it.

$VICTIM, a JSON object: rank; kill_after [steps since the start, seconds]: kill -9 at that moment; kill_in_save [save,
operation]: in the so-manyth save, before the so-manyth write, flush or renaming; signal [steps, number]; not_finite
[steps]: the loss of that process is; samples FILE: which images every step had.
"""
from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from reliability.disk import counted_writes

import train_kd
from losses.core.objective import Objective
from utils.cli import run_main

PLAN = json.loads(os.environ.get("VICTIM", "{}"))
RANK = int(os.environ.get("RANK", 0))
ALIVE = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" and PLAN.get("rank", 0) == RANK
train_batch, save_run, forward = train_kd.train_batch, train_kd.save_run, Objective.forward
done = {"steps": 0, "saves": 0}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def step(run, batch):
    done["steps"] += 1
    if "samples" in PLAN:
        with open(PLAN["samples"], "a") as file:
            file.write(json.dumps([run.step, RANK, batch["index"].tolist()]) + "\n")
    if ALIVE and PLAN.get("kill_after", [0])[0] == done["steps"]:
        threading.Timer(PLAN["kill_after"][1], die).start()
    result = train_batch(run, batch)
    if ALIVE and PLAN.get("signal", [0])[0] == done["steps"]:
        os.kill(os.getpid(), PLAN["signal"][1])
    return result


def save(run):
    done["saves"] += 1
    if not ALIVE or PLAN.get("kill_in_save", [0])[0] != done["saves"]:
        return save_run(run)
    with counted_writes(PLAN["kill_in_save"][1], die):
        return save_run(run)


def poisoned(self, images, teacher, target, step, generator=None):
    terms = forward(self, images, teacher, target, step, generator)
    if step in PLAN["not_finite"] and PLAN.get("rank", 0) == RANK:
        terms["task"] = terms["task"] * float("nan")
    return terms


train_kd.train_batch, train_kd.save_run = step, save
if "not_finite" in PLAN:
    Objective.forward = poisoned

if __name__ == "__main__":
    sys.exit(run_main(train_kd.main))
