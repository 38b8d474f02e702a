#!/usr/bin/env python3
"""Train a segmentation network, distilled from a teacher or plain.

    python train_kd.py --help
    torchrun --nproc_per_node 8 train_kd.py --method afdcd --teacher-pretrained FILE ...
"""
from __future__ import annotations

import sys

from engine.build import build_run
from engine.checkpoint import resume, save_run
from engine.diagnose import diagnose_step
from engine.journal import Journal
from engine.lock import locked
from engine.log import setup_logging
from engine.method_list import method_table
from engine.ready import get_ready
from engine.results import write_result
from engine.run import Run, run_stages, train_batch, training_batches
from engine.settings import parse_settings
from engine.validation import report, validate
from utils.allocator import keep_freed_memory
from utils.cli import run_main
from utils.distributed import barrier, cleanup, init_distributed


def train(run: Run) -> None:
    """Train from the current iteration to the last, validating and saving on the way; then report."""
    running = run.settings.running
    resumed = resume(run)
    journal = Journal(run, resumed)
    if not resumed:
        run_stages(run)
    get_ready(run)
    journal.start()
    for batch in training_batches(run):
        journal.clock.got_batch()
        diagnose_step(run, batch, journal)
        result = train_batch(run, batch)
        run.step += 1
        journal.finished_step(len(batch["name"]))
        if run.is_due(running.log_iter):
            journal.write_step(result)
        if run.val_set is not None and run.is_due(running.val_per_iters):
            validate(run, journal)
        if run.is_due(running.save_per_iters):
            save_run(run)
    report(run, journal)
    journal.close()
    write_result(run)
    barrier()


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, build the run, train. Returns the exit code."""
    settings = parse_settings(argv)
    if settings.list_methods:
        print(method_table(settings))
        return 0
    distributed = init_distributed(settings.running.no_cuda)
    setup_logging(distributed.is_main_process)
    if settings.speed.fast and distributed.device.type == "cpu":
        keep_freed_memory()
    run = build_run(settings, distributed)
    with locked(run.files, distributed.is_main_process) as run.lock:
        train(run)
    del run  # and with it DDP, which holds the process group
    cleanup()  # not after an error: the other processes may wait in a collective operation
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
