"""What a run says while it trains: its files are opened, every logged iteration is written down, the speed is kept."""
from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from engine.checkpoint import is_finished, versions
from engine.introduction import introduce
from engine.layout import INDENT, fold
from engine.log import LOG, RunLogger, setup_logging
from engine.nonfinite import check_finite
from engine.options import DEAD_OPTIONS
from engine.run import Run
from engine.run_files import plain
from engine.settings import given_teacher_flags, ineffective_backbones, ineffective_options
from engine.step import StepResult
from engine.tracker import Tracker
from utils.distributed import reduce_mean
from utils.files import write_json
from utils.flops import peak_flops
from utils.machine import load, others_memory, peak_memory, revision
from utils.options import flag

LONG_RUN = 100  # iterations
#: the revision of a run of which nothing says it
UNKNOWN = {"commit": None, "changed": None}


class Journal:
    """The log of one run. Only the main process writes files; all of them take part in averages.

    The constructor moves the files of an earlier run aside, unless this one continues it, and writes the configuration.
    logger: None on the other processes.
    """

    def __init__(self, run: Run, resumed: bool) -> None:
        self.run, self.logger, self.resumed = run, None, resumed
        self.clock, self._peak = run.clock, None  # FLOP/s of a device
        if not resumed:
            self.clock.restart()
        running, distributed = run.settings.running, run.distributed
        if distributed.is_main_process:
            if not (resumed and run.files.goes_on_here):
                run.files.set_aside()
            setup_logging(True, run.files.text_log)
            self.logger = RunLogger(run.files.log_directory, run.files.log_name, run.step, running.tensorboard,
                                    run.validated, self._tracker())
            run.logger = self.logger
            run.revisions = self._revisions()
            write_json(run.files.config, {
                "config": plain(run.settings), "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
                "processes": distributed.world_size, "versions": versions(), "revision": run.revisions[-1],
                "sources": run.sources,
                **({"changed": run.changed} if run.changed else {})})
            self._introduce()
        # a bar on a terminal; elsewhere the log lines carry the same numbers
        self.progress = tqdm(total=run.settings.optimization.max_iterations, initial=run.step, unit="it",
                             disable=not (distributed.is_main_process and sys.stderr.isatty()), dynamic_ncols=True,
                             smoothing=0.1)

    def _revisions(self) -> list[dict[str, object]]:
        """Those that make the steps of the run: what its state says (of an earlier version: its configuration, where it
        does), and the code of now where a step is left."""
        found = self.run.revisions
        if not found and self.resumed:
            found = [revision_in(self.run.files.config) if self.run.files.goes_on_here else UNKNOWN]
        if found and (is_finished(self.run) or found[-1] == revision()):
            return found
        return [*found, revision()]

    def _tracker(self) -> Tracker | None:
        running, files = self.run.settings.running, self.run.files
        if running.tracker is None:
            return None
        return Tracker(running.tracker, running.tracker_project, files.directory.resolve().name, files.log_directory,
                       files.log_name, plain(self.run.settings))

    def _introduce(self) -> None:
        run = self.run
        for name in DEAD_OPTIONS:
            if getattr(run.settings.running, name) is not None:
                LOG.warning("%s has no effect (nor has it in the reference)", flag(name))
        unread = given_teacher_flags(run.settings)
        if run.teacher is None and run.settings.distillation.method != "none" and unread:
            LOG.warning("not used, since no method of this run reads that teacher: %s", ", ".join(unread))
        for line in ineffective_backbones(run.settings):
            LOG.warning("%s", line)
        if run.teacher is None and run.settings.speed.teacher_precision:
            LOG.warning("--teacher-precision has no effect: no method of this run reads that teacher")
        if unused := ineffective_options(run.settings):
            LOG.warning("no effect in this run, which has no term that reads them: %s", ", ".join(unused))
        introduce(run)

    def start(self) -> None:
        """The iterations start now, after the stages: speeds count from here."""
        settings, device = self.run.settings, self.run.distributed.device
        # measuring a CPU takes a moment, so not in a run that takes no longer itself
        if self.logger is not None and (device.type == "cuda" or settings.optimization.max_iterations >= LONG_RUN):
            dtype = settings.speed.amp_dtype or settings.speed.teacher_dtype or torch.get_default_dtype()
            self._peak = peak_flops(device, dtype)
        if self.logger is not None and not self.resumed:
            window = self.clock.read()
            self.logger.record("stages", 1, **{k: round(window[k], 4) for k in ("seconds", "cpu_seconds")})
        self.clock.restart()
        self.progress.unpause()

    def finished_step(self, images: int) -> None:
        """One more iteration is done, over so many images of this process."""
        self.clock.count(images * self.run.distributed.world_size)
        self.progress.update()

    def write_step(self, result: StepResult) -> None:
        """Write down the last iteration, averaged over the processes. Raises UserError when a loss is not finite."""
        run = self.run
        check_finite(run)
        names = list(result.terms)
        values = reduce_mean(torch.stack([*result.terms.values(), *result.weighted.values(), result.total]).double())
        raw, weighted = (dict(zip(names, part.tolist(), strict=True)) for part in values[:-1].chunk(2))
        if self.logger is None:
            return
        iterations = run.settings.optimization.max_iterations
        left = self.clock.time_of(iterations - run.step)
        window = self.clock.read()
        speed = window["images_per_second"]
        flops, said = self._utilization(speed)
        device, others = run.distributed.device, others_memory(run.distributed.device)
        diagnostics = {k: float(v) for k, v in run.objective.diagnostics().items()}
        if run.step_fn.scaler.is_enabled():
            diagnostics["loss_scale"] = run.step_fn.scaler.get_scale()
        self.logger.record("train", run.step, lr=result.lr, loss=values[-1].item(), raw=raw, weighted=weighted,
                           grad_norm={k: float(v) if v.isfinite() else None for k, v in result.grad_norms.items()},
                           diagnostics=diagnostics, load=load(),
                           memory_mb=round(peak_memory(device) / 1e6),
                           others_mb=None if others is None else round(others / 1e6),
                           **{k: v and round(v, 4) for k, v in window.items()}, **flops)
        total, waiting = values[-1].item(), f"data {100 * window['waiting_for_data']:.0f}%"
        self.progress.set_postfix_str(f"loss {total:.3g} {speed:.1f} img/s", refresh=False)
        LOG.info("%s", fold([f"step {run.step}/{iterations}", f"loss {total:.4g}:",
                             *(f"{k} {weighted[k]:.4g}" for k in names), f"lr {result.lr:.4g}",
                             f"{speed:.1f} img/s", waiting, f"ETA {left}"]))
        LOG.debug("%s", fold([f"{INDENT}without weights:", *(f"{k} {raw[k]:.4g}" for k in names), *said]))

    def _utilization(self, speed: float) -> tuple[dict[str, float], list[str]]:
        """TFLOP/s of all processes, and their share of the devices' peak where that is known, for the record and for
        the text log; nothing where operations were not counted (``--compile``)."""
        if self.run.step_fn.flops is None:
            return {}, []
        reached = speed * self.run.step_fn.flops
        record, said = {"tflops": round(reached / 1e12, 4)}, f"{reached / 1e12:.3g} TFLOP/s"
        if self._peak:
            share = reached / (self._peak * self.run.distributed.world_size)
            record["utilization"], said = round(share, 4), f"{said} ({100 * share:.0f}% of peak)"
        return record, [said]

    def close(self) -> None:
        """Close the progress bar and the files."""
        self.progress.close()
        if self.logger is not None:
            self.run.logger = None
            self.logger.close()


def revision_in(config: Path) -> dict[str, object]:
    """That of a run's configuration; :data:`UNKNOWN` where that does not say it."""
    try:
        return json.loads(config.read_text(encoding="utf-8"))["revision"]
    except (OSError, ValueError, KeyError):
        return UNKNOWN
