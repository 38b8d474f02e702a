"""Run a program with several gloo processes many times beside busy loops and count how its processes end.

    python count_exits.py --runs 100 --busy 4 -- PROGRAM ARGUMENT ...

{run} in an argument is the number of the run. Started like torchrun does (RANK, WORLD_SIZE, ...), without the launcher.
"""
from __future__ import annotations

import argparse
import collections
import os
import socket
import subprocess
import sys
import time


def start(command: list[str], rank: int, processes: int, port: int) -> subprocess.Popen:
    """One process of a group, as torchrun would start it."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in place.items()}}
    return subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def main() -> int:
    """Returns 1 when a process ended with another code than 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--busy", type=int, default=4, help="busy loops beside the runs")
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    busy = [subprocess.Popen([sys.executable, "-c", "while 1: pass"]) for _ in range(options.busy)]
    ends, clean, begin = collections.Counter(), 0, time.time()
    try:
        for run in range(options.runs):
            command, port = [a.replace("{run}", str(run)) for a in options.command], free_port()
            group = [start(command, rank, options.processes, port) for rank in range(options.processes)]
            try:
                errors = [p.communicate(timeout=options.timeout)[1] for p in group]
            except subprocess.TimeoutExpired:
                errors = ["timeout"] * len(group)
            finally:
                for p in group:
                    p.kill()
                    p.wait()
            codes = [p.returncode for p in group]
            ends.update(codes)
            clean += not any(codes)
            for rank, (code, error) in enumerate(zip(codes, errors, strict=True)):
                if code:
                    print(f"run {run} rank {rank} exit {code}: {error.strip()[-300:]}", flush=True)
    finally:
        for p in busy:
            p.kill()
            p.wait()
    print(f"{clean} of {run + 1} runs clean; exit codes {dict(ends)}; {time.time() - begin:.0f} s", flush=True)
    return int(clean != options.runs)


if __name__ == "__main__":
    sys.exit(main())
