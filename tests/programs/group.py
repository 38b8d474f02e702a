"""Run a program with several gloo processes that are forked from one that has loaded torch.

    PYTHONPATH=. python tests/programs/group.py PROCESSES PROGRAM ARGUMENT ...

The program finds the group in its environment, as with torchrun, but no store of a launcher. torch, which takes most of
the time of a short program, is loaded once. Forked processes also share the seed of Python's hashes, and so the order
of sets: where that could differ, torchrun is the test.
"""
from __future__ import annotations

import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

import torch._dynamo  # noqa: F401  # these for the time they take

import train_kd  # noqa: F401

SECONDS = 300


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def become(command: list[str], rank: int, processes: int, port: int) -> None:
    """Be one process of a group: run the program, in this process, to its end."""
    signal.alarm(SECONDS)
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in group.items()})
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def write_output(standard: str, error: str | Path) -> None:
    """From now on this process writes its output and its errors to these files."""
    for number, path in ((1, standard), (2, error)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)


def fork_group(command: list[str], processes: int, folder: Path | None = None) -> list[int] | None:
    """The process ids, by rank; None in a new process, when the program has ended there.

    folder: each process writes its errors to the file RANK in it, and its output nowhere.
    """
    port, pids = free_port(), []
    for rank in range(processes):
        pids.append(os.fork())
        if not pids[-1]:
            if folder:
                write_output(os.devnull, folder / str(rank))
            become(command, rank, processes, port)
            return None
    return pids


def main() -> int:
    """The code of the first process that failed, after which the others are killed; 0 when none did."""
    pids = fork_group(sys.argv[2:], int(sys.argv[1]))
    failed = 0
    while pids:
        pid, status = os.waitpid(-1, 0)
        pids.remove(pid)
        code = os.waitstatus_to_exitcode(status)
        if code and not failed:
            failed = code
            time.sleep(2)  # for what the others have to say of it
            for other in pids:
                os.kill(other, signal.SIGKILL)
    return abs(failed)


if __name__ == "__main__":
    sys.exit(main())
