"""Does a long run grow: memory, open files, threads and processes after the first steps and after the last."""
from __future__ import annotations

import multiprocessing
import os
import threading
from functools import partial
from pathlib import Path

from reliability.runs import Fault, Material, Result

import train_kd

#: MB that memory may grow by between the two measurements: allocators and caches settle late
GROWTH = 40


def endurance(material: Material, short: bool, tries: int) -> list[Fault]:
    """5,000 steps with a loading process, log, training states and validations."""
    return [] if short else [Fault("5,000 steps", partial(_endured, material))]


def _endured(material: Material, before: int) -> Result:
    steps, settled, seen = 5000, 1000, {}
    original = train_kd.train_batch

    def measured(run, batch):
        if run.step in (settled, steps - 1):
            seen[run.step] = measure()
        return original(run, batch)

    train_kd.train_batch = measured
    try:
        argv = material.arguments("none", "endurance", "--max-iterations", str(steps), "--save-per-iters", "250",
                                  "--val-per-iters", "1000", "--no-skip-val", "--batch-size", "2", "--crop-size", "32",
                                  "32", "--log-iter", "10", "--workers", "1", "--tensorboard")
        code = train_kd.main(argv)
    finally:
        train_kd.train_batch = original
    first, last = seen[settled], seen[steps - 1]
    flat = all(last[name] <= first[name] for name in ("files", "threads", "processes"))
    grown = last["memory"] - first["memory"]
    return 1, int(code == 0 and flat and grown < GROWTH), (
        f"open files {first['files']} to {last['files']}, threads {first['threads']} to {last['threads']}, memory "
        f"{grown:+.0f} MB")


def measure() -> dict[str, float]:
    """memory: resident, MB; files: open; threads, processes: alive."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"memory": pages * os.sysconf("SC_PAGE_SIZE") / 1e6, "files": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(), "processes": len(multiprocessing.active_children())}
