"""Time, memory and operations of a piece of work, in the process that does it."""
from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def reset_peak(device: str) -> None:
    """Forget the peak so far (on Linux; elsewhere the peak of a CPU process cannot be forgotten)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> int:
    """Bytes: what the allocator held at most on a GPU, the largest resident size of the process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():  # rather than ru_maxrss, which starts from the size of the process that started this one
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def synchronize(device: str) -> None:
    """Wait for the GPU, if that is where the work is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], object], steps: int, warm: int, device: str) -> dict[str, float]:
    """Mean seconds of ``run()`` over ``steps`` calls, after ``warm`` that do not count, and the peak of memory.

    cpu_seconds: of all threads, without what other programs took; on a CPU the steadier figure on a busy machine.

    The device is waited for at the end of the turn, not at every step: so does a training run."""
    for _ in range(warm):
        run()
    synchronize(device)
    reset_peak(device)
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(steps):
        run()
    synchronize(device)
    costs = {"seconds": (time.perf_counter() - start) / steps, "cpu_seconds": (time.process_time() - cpu_start) / steps,
             "peak": peak_memory(device)}
    if device == "cuda":
        torch.cuda.empty_cache()  # room for the processes that have their turn next
    return costs


def call_times(run: Callable[[], object], calls: int, warm: int, device: str, most: float) -> dict[str, Any]:
    """Seconds of every single ``run()``, after ``warm`` that do not count, and the peak of memory.

    most: seconds after which no more calls are made, but for three. The device is waited for at every call."""
    for _ in range(warm):
        run()
    synchronize(device)
    reset_peak(device)
    seconds: list[float] = []
    while len(seconds) < calls and (len(seconds) < 3 or sum(seconds) < most):
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "peak": peak_memory(device)}


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of the convolutions and matrix products of ``run()``; other work is not counted."""
    if hasattr(torch.compiler, "set_stance"):  # compiled code hides its operations
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            run()
    else:
        with FlopCounterMode(display=False) as counter:
            run()
    return counter.get_total_flops()
