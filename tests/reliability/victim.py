"""``train_kd.py`` with something that happens to it, once, in the first of the lives that torchrun gives it.

As a program, it reads its plan from $VICTIM, a JSON object. rank: whom it concerns. kill_after [steps, part]: kill -9
when so many steps of this life are done and that part of the time of the fastest has passed again. kill_in_save [save,
operation]: in the so-manyth save, before the so-manyth write, flush or renaming. signal [steps, number]. not_finite
[steps]: the loss of that process is. samples FILE: which images every step had. saves FILE: of every save its step, the
operations of it, and the checksum of the training state.
"""
from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from reliability.disk import counted_writes

import train_kd
from engine.checkpoint import load_state
from losses.core.objective import Objective
from utils.cli import run_main

LAST_WORDS = b"killed by plan\n"


def checksum(value: Any) -> str:
    """Of what a training state holds, to the last bit; not of its file, where a resumed run may share less."""
    digest = hashlib.sha256()

    def add(part: Any, where: str) -> None:
        if isinstance(part, (dict, list, tuple)):
            for name, one in part.items() if isinstance(part, dict) else enumerate(part):
                add(one, f"{where}/{name}")
            return
        tensor = isinstance(part, torch.Tensor)
        digest.update(f"{where} {(part.dtype, part.shape) if tensor else part!r}\n".encode())
        if tensor:
            digest.update(part.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())

    add(value, "")
    return digest.hexdigest()


class Victim:
    """Stands in the place of the functions of ``train_kd.py`` that make a step and a save."""

    def __init__(self, plan: dict) -> None:
        self.plan, self.rank = plan, int(os.environ.get("RANK", 0))
        first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        self.concerned = first_life and plan.get("rank", 0) == self.rank
        self.steps, self.saves = 0, 0
        self.since, self.pace = 0.0, 0.0  # when the last step began; seconds of the fastest
        self.train_batch, self.save_run, self.forward = train_kd.train_batch, train_kd.save_run, Objective.forward

    def arm(self) -> None:
        """From now on it happens."""
        train_kd.train_batch, train_kd.save_run = self.step, self.save
        if "not_finite" in self.plan:
            Objective.forward = lambda objective, *args, **kwargs: self.poisoned(objective, *args, **kwargs)

    def happens(self, what: str, count: int) -> bool:
        """Whether that is due after so many."""
        return self.concerned and self.plan.get(what, [-1])[0] == count

    def step(self, run, batch):
        """One training step."""
        if "samples" in self.plan:
            with open(self.plan["samples"], "a") as file:
                file.write(json.dumps([run.step, self.rank, batch["index"].tolist()]) + "\n")
        now = time.monotonic()
        if self.steps:
            self.pace = min(self.pace or now - self.since, now - self.since)
        if self.happens("kill_after", self.steps):
            threading.Timer(self.plan["kill_after"][1] * self.pace, die).start()
        self.since = now
        self.steps += 1
        result = self.train_batch(run, batch)
        if self.happens("signal", self.steps):
            os.kill(os.getpid(), self.plan["signal"][1])
        return result

    def save(self, run) -> None:
        """One save."""
        self.saves += 1
        due = self.happens("kill_in_save", self.saves)
        with counted_writes(self.plan["kill_in_save"][1] if due else 0, die) as writes:
            self.save_run(run)
        if "saves" in self.plan and self.rank == 0:
            with open(self.plan["saves"], "a") as file:
                file.write(json.dumps([run.step, writes.count, checksum(load_state(run.files.state))]) + "\n")

    def poisoned(self, objective, images, teacher, target, step, generator=None):
        """The terms of a step, one of them not a number when that is due."""
        terms = self.forward(objective, images, teacher, target, step, generator)
        if step in self.plan["not_finite"] and self.plan.get("rank", 0) == self.rank:
            terms["task"] = terms["task"] * float("nan")
        return terms


def die() -> None:
    """kill -9 of this process, which says so: a launcher may report another one, which has lost it."""
    os.write(2, LAST_WORDS)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    Victim(json.loads(os.environ.get("VICTIM", "{}"))).arm()
    sys.exit(run_main(train_kd.main))
