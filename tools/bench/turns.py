"""Child processes that do their work in turn: A B A B ..., only one at a time."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent


class Refused(Exception):
    """A child process could not do its work; the message says why."""


@dataclass
class Measured:
    """What one piece of work cost. seconds, cpu_seconds: one value per turn. peak, idle: bytes, the most in a turn, and
    before the work was done for the first time. flops: of one piece of work, None where they were not counted."""

    images: int = 1
    precision: str = "float32"
    facts: dict[str, float] = field(default_factory=dict)
    threads: int = 0
    idle: int = 0
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak: int = 0
    flops: int | None = None

    def add(self, turn: Mapping[str, float]) -> None:
        """Take in the figures of one turn."""
        self.seconds.append(turn["seconds"])
        self.cpu_seconds.append(turn["cpu_seconds"])
        self.peak = max(self.peak, turn["peak"])


class Worker:
    """A child process for one job; it is built when the constructor returns. Raises :class:`Refused` like ``ask``."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        threads = {"OMP_NUM_THREADS": str(job["threads"])} if job["threads"] else {}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tools" / "bench" / "worker.py"), json.dumps(job)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.errors, text=True, env={**os.environ, **threads})
        self.about = self._answer()

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request."""
        with suppress(BrokenPipeError):  # it has ended, and has said why
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.errors.seek(0)
            said = self.errors.read().strip().splitlines()
            self.close()
            raise Refused(said[-1] if said else f"exit code {code}")
        answer = json.loads(line)
        if "refused" in answer:
            self.close()
            raise Refused(answer["refused"])
        return answer

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.errors):
            with suppress(BrokenPipeError):
                file.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass(frozen=True)
class Plan:
    """repeats: rounds over all jobs. steps, warm: of a turn, counted and not. first: steps before the first turn of a
    process, not counted. fresh: a new process for every turn, for what does not fit into memory side by side. flops:
    count them. strict: what is refused ends the benchmark. seconds: no new round after so many."""

    repeats: int
    steps: int = 1
    warm: int = 0
    first: int = 1
    fresh: bool = False
    flops: bool = True
    strict: bool = True
    seconds: float = float("inf")


def say(text: str) -> None:
    """Progress, on stderr."""
    sys.stderr.write(text + "\n")


def measure(jobs: Mapping[str, Mapping[str, Any]], plan: Plan,
            peak: Worker | None = None) -> tuple[dict[str, Measured | Refused], list[dict[str, float]]]:
    """Do every job in turn. Returns what each cost, or why it was refused, and what ``peak`` answered in each round."""
    results: dict[str, Measured | Refused] = {}
    rates: list[dict[str, float]] = []
    end = time.monotonic() + plan.seconds
    with ExitStack() as alive:
        workers: dict[str, Worker] = {}
        for repeat in range(plan.repeats):
            if repeat and time.monotonic() > end:
                break
            if peak is not None:
                rates.append(peak.ask(do="work"))
            for name, job in jobs.items():
                if isinstance(results.get(name), Refused):
                    continue
                say(f"round {repeat + 1} of {plan.repeats}: {name}")
                try:
                    if name not in workers:
                        workers[name] = alive.enter_context(Worker(job))
                        results.setdefault(name, Measured(**workers[name].about))
                        workers[name].ask(do="turn", steps=plan.first, warm=0)
                    results[name].add(workers[name].ask(do="turn", steps=plan.steps, warm=plan.warm))
                    if plan.flops and repeat == 0:
                        results[name].flops = workers[name].ask(do="flops")["flops"]
                    if plan.fresh:
                        workers.pop(name).close()
                except Refused as reason:
                    if plan.strict:
                        raise UserError(f"{name}: {reason}") from None
                    workers.pop(name, None)
                    results[name] = reason
    return results, rates
