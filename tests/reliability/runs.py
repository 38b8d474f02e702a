"""Tiny runs that things happen to, in processes of their own."""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from helpers import ROOT, assert_same, records, train_arguments, without_times, write_folder_dataset
from method_cases import RUN_STUDENT, run_arguments, write_run_teacher
from reliability.lives import Ended, live

from utils.errors import UserError

VICTIM = str(ROOT / "tests" / "reliability" / "victim.py")
STEM = f"kd_{RUN_STUDENT[0]}_{RUN_STUDENT[1]}_folder"
#: flags that make a method cheaper than in the tests of all methods
CHEAPER = {"afdcd": ("--crop-size", "64", "64", "--pool-size", "2")}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node")
AUTO = ("--resume", "auto")
#: file of a folder of runs, which may be deleted
MARK = ".reliability-runs"
#: (tries, survived, a note for the table)
Result = tuple[int, int, str]


@dataclass(frozen=True)
class Fault:
    """Something that is tried. attempt: from the tries that there were to what more of them show. tries: wanted."""

    name: str
    attempt: Callable[[int], Result]
    tries: int = 1


@dataclass
class Material:
    """Where runs are made, and what they read."""

    base: Path

    @cache  # noqa: B019 - one of them per program
    def data(self) -> tuple[Path, Path]:
        """(data set, teacher), in the folder made anew. UserError when there is one that this program has not made."""
        if self.base.exists():
            if not (self.base / MARK).is_file():
                raise UserError(f"{self.base}: not a folder of these runs, it has no {MARK}; expected another --out")
            shutil.rmtree(self.base)
        self.base.mkdir(parents=True)
        (self.base / MARK).touch()
        return write_folder_dataset(self.base / "set", train=7, val=3), write_run_teacher(self.base / "teacher.pth")

    def arguments(self, method: str, name: str, *more: str) -> list[str]:
        """The command line of a run of a method in a folder of its own, saved after every third step."""
        data, teacher = self.data()
        common = ("--save-per-iters", "3", "--log-iter", "5", "--batch-size", "4", *CHEAPER.get(method, ()), *more)
        if method == "none":
            return train_arguments(data, self.base / name, "--student-model", RUN_STUDENT[0], "--student-backbone",
                                   RUN_STUDENT[1], "--method", "none", "--skip-val", *common)
        return run_arguments(method, data, teacher, self.base / name, *common)

    def live(self, method: str, name: str, flags: Sequence[str], processes: int, plan: dict | None = None) -> Ended:
        """One life of the run of a method in a folder of its own; see :func:`reliability.lives.live`."""
        return live(self.arguments(method, name, *flags), processes, plan or {}, self.base / f"{name}.out")

    def keep(self, folder: Path, why: str) -> None:
        """Keep a copy of a run that has not survived, with the reason, beside the folder of all runs."""
        kept = self.base.with_name("failed")
        copy = kept / f"{folder.name}-{1 + len([*kept.glob('*.txt')])}"
        if folder.is_dir():
            shutil.copytree(folder, copy)
        kept.mkdir(exist_ok=True)
        copy.with_suffix(".txt").write_text(why)
        print(f"{copy}: {why[:2000]}", file=sys.stderr, flush=True)

    def __hash__(self) -> int:
        return hash(self.base)


def run(arguments: list[str], processes: int = 1, plan: dict | None = None, launcher: tuple[str, ...] = (),
        program: str = VICTIM) -> subprocess.CompletedProcess:
    """One life of a run. plan: see ``victim.py``. launcher: more of torchrun's arguments."""
    with start(arguments, processes, plan, launcher, program) as process:
        try:
            output, error = process.communicate(timeout=1200)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, output, error)


def start(arguments: list[str], processes: int = 1, plan: dict | None = None, launcher: tuple[str, ...] = (),
          program: str = VICTIM) -> subprocess.Popen:
    """The same, without waiting for it."""
    command = [sys.executable, program, *arguments]
    if processes > 1 or launcher:
        command = [*TORCHRUN, str(processes), *(launcher or ("--standalone",)), program, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VICTIM": json.dumps(plan or {}),
                   "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, start_new_session=True)


def content(folder: Path, suffix: str = "_state") -> dict:
    """A file of a run."""
    return torch.load(folder / f"{STEM}{suffix}.pth", weights_only=True)


def step_of(folder: Path) -> int:
    """The step of its training state, 0 without one."""
    return content(folder)["step"] if (folder / f"{STEM}_state.pth").is_file() else 0


def is_same(one: Path, two: Path) -> bool:
    """Whether two runs ended with the same weights, training state and log, bit for bit."""
    try:
        for suffix in ("", "_state"):
            assert_same(*({**content(folder, suffix), "config": 0} for folder in (one, two)))
        assert_same(*(without_times(records(folder)) for folder in (one, two)))
    except (AssertionError, FileNotFoundError):
        return False
    return True
