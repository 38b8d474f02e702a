"""What a figure is a figure of: the machine, the memory it took, the revision of this code."""
from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from utils.distributed import available_cpus

ROOT = Path(__file__).resolve().parent.parent
#: what decides a training
CODE = ("train_kd.py", "engine", "losses", "models", "dataset", "utils", "examples")


def machine(device: str) -> dict[str, Any]:
    """What the figures are figures of. device: "cpu" or "cuda"."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cpu": models[0] if models else platform.processor(), "cores": available_cpus(),
            "cores_of_machine": os.cpu_count(), "instructions": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name() if device == "cuda" else None, "torch": torch.__version__,
            "python": platform.python_version(), "system": platform.platform()}


def peak_memory(device: torch.device) -> int:
    """Bytes that this process held at most: of the device's tensors on a GPU, resident ones on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # rather than ru_maxrss, which starts from the size of the process that started this one
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def others_memory(device: torch.device) -> int | None:
    """Bytes of a GPU that are not of this process's tensors: what other processes hold, and the few hundred MB of this
    one's libraries. None on a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return max(total - free - torch.cuda.memory_reserved(device), 0)


def load() -> float | None:
    """Processes that wanted to run in the last minute, on average (None where the system does not say)."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


@cache
def revision() -> dict[str, Any]:
    """{"commit": of this repository, None outside one, "changed": whether code of training differs from it}."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != ROOT:  # a copy inside somebody else's repository
        return {"commit": None, "changed": None}
    return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--", *CODE))}
