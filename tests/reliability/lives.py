"""Lives of a run, forked from a process that has imported everything: most of a short run is imports."""
from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo  # every optimizer does
from helpers import ROOT
from reliability.victim import LAST_WORDS, Victim
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import train_kd
from utils.cli import run_main

#: seconds after which a life counts as hanging; its own --timeout comes first
PATIENCE = 2400
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["reliability.lives"])


@dataclass(frozen=True)
class Ended:
    """How a life ended. killed: by the kill -9 of its plan, in whichever process. alone: no process is left."""

    code: int | None
    said: str
    killed: bool
    alone: bool


def live(arguments: Sequence[str], processes: int, plan: dict, output: Path) -> Ended:
    """One life of a run under a plan (see :class:`Victim`), with torchrun's launcher for several processes. output:
    file for what it says."""
    with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
                                      "OMP_NUM_THREADS": "1"}):
        one = FORKS.Process(target=_begin, args=([*arguments], processes, plan, str(output)))
        one.start()
    one.join(PATIENCE)
    code = one.exitcode
    try:
        os.killpg(one.pid, signal.SIGKILL)
        alone = False
    except ProcessLookupError:
        alone = True
    one.join()
    said = output.read_text(errors="replace") if output.is_file() else ""
    return Ended(code, said, LAST_WORDS.decode() in said, alone)


def _begin(arguments: list[str], processes: int, plan: dict, output: str) -> None:
    """In a new process."""
    os.setsid()
    gc.freeze()  # what is there needs no look in every life
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    torch.set_num_threads(1)
    if processes == 1:
        sys.exit(_run(arguments, plan))
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=processes, max_restarts=0, start_method="fork",
                          run_id=str(uuid.uuid4()), rdzv_backend="c10d", rdzv_endpoint="localhost:0")
    try:
        elastic_launch(config, _join)(arguments, plan)
    except ChildFailedError as error:
        sys.exit(f"{error}")


def _run(arguments: list[str], plan: dict) -> int:
    Victim(plan).arm()
    return run_main(train_kd.main, arguments, prog="train_kd.py")


def _join(arguments: list[str], plan: dict) -> None:
    if code := _run(arguments, plan):
        sys.exit(code)
