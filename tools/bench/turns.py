"""Child processes that do their work in turn: A B A B ..., only one at a time."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
#: what a child process runs: a file, which may measure the code of another checkout, or a module of the package
PROGRAM = [str(Path(__file__).with_name("worker.py"))] if __package__ == "tools.bench" else \
    ["-m", f"{__package__}.worker"]


class Refused(UserError):
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
            [sys.executable, *PROGRAM, json.dumps(job)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors, text=True, env={**os.environ, **threads})
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


class Group:
    """The child processes of one comparison, and what they have cost so far. A context: leaving it ends them."""

    def __init__(self, jobs: Mapping[str, Mapping[str, Any]], plan: Plan) -> None:
        self.jobs, self.plan, self.alive = jobs, plan, ExitStack()
        self.workers: dict[str, Worker] = {}
        self.results: dict[str, Measured | Refused] = {}

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *error: object) -> None:
        self.alive.close()

    def attempt(self, name: str, do: Callable[[str], None]) -> None:
        """``do(name)`` unless the job was refused before; what is refused now is remembered, or ends everything."""
        if isinstance(self.results.get(name), Refused):
            return
        try:
            do(name)
        except Refused as reason:
            if self.plan.strict:
                raise UserError(f"{name}: {reason}") from None
            self.workers.pop(name, None)
            self.results[name] = reason

    def start(self, name: str) -> None:
        """Have the job's process build its work."""
        self.workers[name] = self.alive.enter_context(Worker(self.jobs[name]))
        self.results.setdefault(name, Measured(**self.workers[name].about))

    def turn(self, name: str) -> None:
        """One turn of the job, after the steps that come before the first one of its process."""
        if name not in self.workers:
            self.start(name)
        worker, result = self.workers[name], self.results[name]
        if self.plan.fresh or not result.seconds:
            worker.ask(do="turn", steps=self.plan.first, warm=0)
        result.add(worker.ask(do="turn", steps=self.plan.steps, warm=self.plan.warm))
        if self.plan.flops and result.flops is None:
            result.flops = worker.ask(do="flops")["flops"]
        if self.plan.fresh:
            self.workers.pop(name).close()


def measure(jobs: Mapping[str, Mapping[str, Any]], plan: Plan,
            peak: Worker | None = None) -> tuple[dict[str, Measured | Refused], list[dict[str, float]]]:
    """Do every job in turn. Returns what each cost, or why it was refused, and what ``peak`` answered in each round."""
    rates: list[dict[str, float]] = []
    end = time.monotonic() + plan.seconds
    with Group(jobs, plan) as group:
        if not plan.fresh:  # what is refused is refused before anything takes time
            for name in jobs:
                group.attempt(name, group.start)
        for repeat in range(plan.repeats):
            if repeat and time.monotonic() > end:
                break
            if peak is not None:
                rates.append(peak.ask(do="work"))
            for name in jobs:
                say(f"round {repeat + 1} of {plan.repeats}: {name}")
                group.attempt(name, group.turn)
    return group.results, rates
