"""Several short runs one after the other in one process group, and a comparison of the processes after each.

    torchrun --nproc_per_node 2 train_methods.py JOBS OUT

JOBS: JSON file {name: arguments of train_kd.py}. OUT: JSON file {name: "" or what went wrong}, written by rank 0.
"""
from __future__ import annotations

import json
import signal
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_kd
from engine.build import build_run
from engine.run import Run
from engine.settings import parse_settings
from engine.signals import StopSignals
from utils.distributed import Distributed, cleanup, init_distributed

#: the longest that all jobs together may take: processes that wait for each other must not outlive the test
SECONDS = 280


def differences(run: Run) -> list[str]:
    """Parameters, and what methods keep, that are not the same in both processes (or not finite).

    Running statistics are left out: a batch norm that is never evaluated does not read its own.
    """
    shared = dict(run.objective.named_parameters())
    shared.update({n: kept for n, kept in run.objective.distillers.named_buffers() if "running_" not in n})
    differing = []
    for name, value in shared.items():
        first = value.detach().clone()
        dist.broadcast(first, 0)
        if not torch.equal(first, value) or not value.isfinite().all():
            differing.append(name)
    return differing


def attempt(arguments: list[str], distributed: Distributed) -> str:
    """Train once; "" or the reason why it is not right in this process."""
    try:
        run = build_run(parse_settings(arguments), distributed)
        train_kd.train(run, StopSignals(run.settings, distributed))
    except Exception:
        return traceback.format_exc()
    differing = differences(run)
    return f"processes disagree (see 'A running state' in docs/extending.md) or not finite: {', '.join(differing)}" \
        if differing else ""


def main() -> None:
    signal.alarm(SECONDS)
    torch.set_num_threads(1)
    jobs, out = Path(sys.argv[1]), Path(sys.argv[2])
    distributed = init_distributed(no_cuda=True)
    results = {}
    for name, arguments in json.loads(jobs.read_text()).items():
        everyone: list[str | None] = [None] * distributed.world_size
        dist.all_gather_object(everyone, attempt(arguments, distributed))
        results[name] = "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text)
    if distributed.is_main_process:
        out.write_text(json.dumps(results))
    cleanup()


if __name__ == "__main__":
    main()
