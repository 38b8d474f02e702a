"""Run a program with several gloo processes many times beside busy loops and count how its processes end.

    PYTHONPATH=. python tests/programs/count_exits.py --runs 100 --busy 4 PROGRAM ARGUMENT ...

{run} in an argument is the number of the run. The processes are those of ``group.py``.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from group import fork_group


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
            command = [a.replace("{run}", str(run)) for a in options.command]
            pids = fork_group(command, options.processes, folder)
            if pids is None:
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
