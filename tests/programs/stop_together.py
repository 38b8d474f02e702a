"""Processes of which one gets a signal: all stop after the same step, and the continuation is the whole run.

    torchrun --nproc_per_node 3 stop_together.py FOLDER_OF_WHOLE FOLDER_OF_STOPPED ARGUMENT ...

The arguments are those of ``train_kd.py`` without folders.
"""
from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

import train_kd
from utils.distributed import cleanup, init_distributed


def train(folder: str, *more: str) -> int:
    """One run; its process group is also that of the next."""
    return train_kd.main([*sys.argv[3:], "--save-dir", folder, "--log-dir", f"{folder}/logs", *more])


def main() -> None:
    rank, whole, stopped = init_distributed(no_cuda=True).rank, *sys.argv[1:3]
    train_kd.cleanup = dist.barrier
    assert train(whole) == 0
    train_batch = train_kd.train_batch

    def signaled(run, batch):
        result = train_batch(run, batch)
        if rank == 1 and run.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    train_kd.train_batch = signaled
    assert train(stopped) == 75
    dist.barrier()
    state = next(Path(stopped).glob("*_state.pth"))
    assert torch.load(state, weights_only=True)["step"] == 2
    train_kd.train_batch = train_batch
    assert train(stopped, "--resume", "auto") == 0
    cleanup()


if __name__ == "__main__":
    main()
