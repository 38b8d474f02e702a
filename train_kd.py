#!/usr/bin/env python3
"""Train a segmentation network, distilled from a teacher or plain.

    python train_kd.py --help
    torchrun --nproc_per_node 8 train_kd.py --method afdcd --teacher-pretrained FILE ...
"""
from __future__ import annotations

import sys

from engine.build import build_run, check_length, in_iterations
from engine.checkpoint import resume, save_run, save_state
from engine.closing import summarize
from engine.diagnose import diagnose_step
from engine.journal import Journal
from engine.lock import locked
from engine.log import setup_logging
from engine.method_list import method_table
from engine.nonfinite import check_step
from engine.ready import get_ready
from engine.results import check_log, check_result_target, write_result
from engine.run import Run, run_stages, train_batch, training_batches
from engine.run_files import RunFiles
from engine.settings import check_one_method, parse_settings
from engine.signals import StopSignals
from engine.tap_list import tap_table
from engine.validation import report, validate
from utils.cli import run_main
from utils.cpu import prepare_cpu
from utils.distributed import barrier, cleanup, init_distributed
from utils.watchdog import MARGIN, Watchdog, no_step, time_limit


def train(run: Run, signals: StopSignals) -> bool:
    """Train from the current iteration to the last, saving and validating on the way; then report. Whether a signal has
    ended it earlier, after a step that is saved."""
    resumed = resume(run, trains=True)
    if resumed:
        check_log(run)
    with signals.deferred():  # the files of an earlier run move together
        journal = Journal(run, resumed)
        signals.begun = True
    if not resumed:
        with signals.deferred():
            run_stages(run, signals.check)
    get_ready(run)
    journal.start()
    stopped = run_steps(run, journal, signals)
    if not stopped:
        report(run, journal)
        write_result(run)
        summarize(run, journal)
    journal.close()
    barrier()
    return stopped


def run_steps(run: Run, journal: Journal, signals: StopSignals) -> bool:
    """The iterations. Whether a signal has ended them."""
    with signals.deferred():
        if run.wants_validation:  # a run that was stopped between saving and validating
            validate_saved(run, journal, signals)
        for batch in training_batches(run):
            with time_limit(no_step):
                stop = run_step(run, batch, journal, signals)
            if stop:
                signals.end(run.step)
                return True
            if run.wants_validation:
                validate_saved(run, journal, signals)
    return False


def run_step(run: Run, batch: dict, journal: Journal, signals: StopSignals) -> bool:
    """One iteration, logged and saved if that is due. Whether a signal ends the run, which is then saved."""
    running = run.settings.running
    journal.clock.got_batch()
    diagnose_step(run, batch, journal)
    result = train_batch(run, batch)
    run.step += 1
    journal.finished_step(len(batch["name"]))
    check_step(run, result, journal)
    if run.is_due(running.log_iter) and result.fault is None:
        journal.write_step(result)
    stop = signals.agreed()
    if stop or run.is_due(running.save_per_iters) or run.wants_validation:
        save_run(run)
    return stop


def validate_saved(run: Run, journal: Journal, signals: StopSignals) -> None:
    """Validate, after the step is saved: nothing is lost if this fails, and a signal ends it at once."""
    barrier()  # until the main process has saved
    signals.check(now=True)
    with signals.deferred(False):
        validate(run, journal)
    save_state(run)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, build the run, train. Returns the exit code."""
    check_one_method(argv)
    settings = parse_settings(argv)
    if settings.list_methods:
        print(method_table(settings))
        return 0
    if settings.list_taps:
        print(tap_table(settings))
        return 0
    timeout = settings.running.timeout
    distributed = init_distributed(settings.running.no_cuda, timeout=timeout + MARGIN)
    setup_logging(distributed.is_main_process)
    if distributed.device.type == "cpu":
        prepare_cpu(settings.speed.fast)
    settings = in_iterations(settings)
    check_result_target(settings)
    files = RunFiles(settings)
    with Watchdog(timeout, "go on with --resume auto"), StopSignals(settings, distributed) as signals, \
            locked(files, distributed.is_main_process) as lock:
        barrier()  # until the folder is this run's own: only then is it known what there is to go on with
        run = build_run(settings, distributed, files)
        check_length(settings, len(run.train_set))
        run.lock = lock
        stopped = train(run, signals)
        del run  # and with it DDP, which holds the process group
        cleanup()  # not after an error: the other processes may wait in a collective operation
    return signals.code if stopped else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
