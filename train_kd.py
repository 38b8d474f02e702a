#!/usr/bin/env python3
"""Train a segmentation network, distilled from a teacher or plain.

    python train_kd.py --help
    torchrun --nproc_per_node 8 train_kd.py --method afdcd --teacher-pretrained FILE ...
"""
from __future__ import annotations

import sys

from utils.cli import run_main
from utils.config import parse_config
from utils.distributed import cleanup, init_distributed
from utils.trainer import Trainer


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, build the run, train. Returns the exit code."""
    config = parse_config(argv)
    distributed = init_distributed(config.no_cuda)
    Trainer(config, distributed).fit()
    cleanup()  # not after an error: the other processes may wait in a collective operation
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
