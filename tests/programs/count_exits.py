"""Run a program with several gloo processes many times beside busy loops and count how its processes end.

    PYTHONPATH=. python tests/programs/count_exits.py --runs 100 --busy 4 PROGRAM ARGUMENT ...

{run} in an argument is the number of the run. The processes are told of each other as by torchrun, but are forked from
one that has loaded torch, which takes most of the time of a short program.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch._dynamo  # noqa: F401  # these for the time they take

import train_kd  # noqa: F401

SECONDS = 300


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """That many endless loops, ended by the process that started them (not by one forked from it)."""
    owner, loops = os.getpid(), [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops if os.getpid() == owner else []:
            loop.kill()
            loop.wait()


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def become(command: list[str], rank: int, processes: int, port: int, errors: Path) -> None:
    """Be one process of a group: run the program, in this process, to its end."""
    signal.alarm(SECONDS)
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in group.items()})
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def main() -> int:
    """Returns 1 when a process ended with another code than 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--busy", type=int, default=4, help="busy loops beside the runs")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    ends, clean, begin = collections.Counter(), 0, time.time()
    folder = Path(tempfile.mkdtemp())
    with busy_loops(options.busy):
        for run in range(options.runs):
            command, port, pids = [a.replace("{run}", str(run)) for a in options.command], free_port(), []
            for rank in range(options.processes):
                pids.append(os.fork())
                if not pids[-1]:
                    become(command, rank, options.processes, port, folder / str(rank))
                    return 0
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
            ends.update(codes)
            clean += not any(codes)
            for rank, code in enumerate(codes):
                if code:
                    print(f"run {run} rank {rank} exit {code}: {(folder / str(rank)).read_text()[-300:]}", flush=True)
    print(f"{clean} of {options.runs} runs clean; exit codes {dict(ends)}; {time.time() - begin:.0f} s", flush=True)
    return int(clean != options.runs)


if __name__ == "__main__":
    sys.exit(main())
