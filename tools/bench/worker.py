"""A child process of the benchmark: builds one piece of work, then does it whenever it is asked.

    python tools/bench/worker.py '{"code": FOLDER, "kind": "step", ...}'

Requests are JSON lines on stdin, answers JSON lines on stdout: the first answer, unasked, says that the work is built.
The measured code comes from FOLDER, which may be another checkout; only this package comes from here.
"""
from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def use_code(folder: str) -> None:
    """Let imports find the measured code in ``folder``, and this package where it is."""
    here = {ROOT, ROOT / "tools", ROOT / "tools" / "bench"}
    sys.path.insert(0, str(ROOT))
    import tools.bench  # noqa: F401 - once imported it is found without the path

    sys.path[:] = [folder, *(path for path in sys.path if Path(path).resolve() not in here)]


def answers(job: dict, requests: Iterator[str]) -> Iterator[dict]:
    """The answer to every request, after one that describes the work: its images, precision, facts, and the memory that
    it holds before it is done for the first time."""
    import torch

    if job["threads"]:
        torch.set_num_threads(job["threads"])
    from tools.bench.jobs import build
    from tools.bench.measure import call_times, count_flops, peak_memory, reset_peak, timed

    work = build(job)
    gc.collect()
    reset_peak(job["device"])
    yield {"images": work.images, "precision": work.precision, "facts": work.facts, "idle": peak_memory(job["device"]),
           "threads": torch.get_num_threads()}
    for line in requests:
        request = json.loads(line)
        if request["do"] == "turn":
            yield timed(work.run, request["steps"], request["warm"], job["device"])
        elif request["do"] == "calls":
            yield call_times(work.run, request["calls"], request["warm"], job["device"], request["most"])
        elif request["do"] == "flops":
            yield {"flops": count_flops(work.run)}
        else:
            yield work.run()


def main() -> int:
    """Build the work that the first argument describes and answer until stdin ends. Returns the exit code."""
    job = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the measured code prints is no answer
    if __spec__ is None:  # run as a file, not as a module of the installed package
        use_code(job["code"])
    from utils.cli import describe_error
    from utils.errors import UserError

    try:
        for answer in answers(job, sys.stdin):
            out.write(json.dumps(answer) + "\n")
            out.flush()
    except UserError as error:
        out.write(json.dumps({"refused": describe_error(error)}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
