"""A training run: build everything, iterate, log, validate, save, resume."""
from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import Tensor

import dataset as data
from losses.distiller import Preparation
from models.preprocess import Preprocess
from models.weights import describe, load_weights, save_state_dict
from utils.build import (
    build_dataset,
    build_loader,
    build_objective,
    build_optimizer,
    build_student,
    build_teacher,
    check_batch,
    wrap_for_processes,
)
from utils.checkpoint import load_state, save_state
from utils.config import DEAD_OPTIONS, teacher_options
from utils.distributed import Distributed, barrier, reduce_mean, same_everywhere
from utils.errors import UserError
from utils.files import check_target
from utils.logger import LOG, Progress, RunLogger, setup_logging
from utils.run_files import RunFiles, changed_settings, plain, readable
from utils.step import StepResult, TrainStep
from utils.validation import Validator


class Trainer:
    """One run of ``train_kd.py``. The constructor builds and checks everything and writes nothing; ``fit`` trains."""

    def __init__(self, config: argparse.Namespace, distributed: Distributed) -> None:
        self.config, self.distributed = config, distributed
        setup_logging(distributed.is_main)
        check_batch(config, distributed)
        self.spec = data.get_dataset_spec(config.dataset, config.data)
        self.train_set = build_dataset(config, self.spec, self.spec.train_split, train=True,
                                       list_file=config.train_list)
        self.val_set, self.report_sets = self._evaluation_sets()
        self.student = build_student(config, self.spec.num_class)
        self.teacher = build_teacher(config, self.spec.num_class)
        self.files = RunFiles(config)
        resumes = self.files.resume_from(config.resume) is not None
        self.objective = build_objective(config, self.student, self.teacher, resumes)
        self.model = wrap_for_processes(config, self.objective, distributed)
        if self.teacher is not None:
            self.teacher.to(distributed.device)
        self.optimizer = build_optimizer(config, self.objective)
        self.step_fn = TrainStep(self.model, self.teacher, self.optimizer, lr=config.lr,
                                 max_iterations=config.max_iterations, power=config.poly_power, seed=config.seed,
                                 rank=distributed.rank)
        config.aux = self.student.aux
        for flag, folder in (("--save-dir", self.files.directory), ("--log-dir", self.files.log_directory)):
            check_target(folder, flag, is_folder=True)
        self.step, self.best = 0, -1.0
        self._resumed = self._resume()
        self.logger: RunLogger | None = None

    # -- building ------------------------------------------------------------------------------------------------

    def _evaluation_sets(self) -> tuple[data.SegmentationDataset | None, list[data.SegmentationDataset]]:
        if self.config.skip_val:
            return None, []
        chosen = self.config.selection_split or self.spec.selection_split
        if chosen == "reference":
            chosen = self.spec.reference_selection_split
        if chosen in self.spec.splits and chosen not in self.spec.eval_splits:
            raise UserError(f"--selection-split {chosen}: {self.spec.title} has no labels of it; "
                            f"expected one of {', '.join(self.spec.eval_splits)}")
        try:
            selection = build_dataset(self.config, self.spec, chosen, train=False, list_file=self.config.val_list)
        except UserError as error:
            raise UserError(f"{error} (--selection-split: another split to validate on; --skip-val: none)") from error
        reports = [build_dataset(self.config, self.spec, s, train=False)
                   for s in self.spec.report_splits if s != chosen]
        return selection, reports

    def _resume(self) -> bool:
        path = self.files.resume_from(self.config.resume)
        if path is None:
            return False
        state = load_state(path)
        try:
            self.student.load_state_dict(state["model"])
            self.objective.distillers.load_state_dict(state["distillers"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.student.preprocess = Preprocess.from_dict(state["net_info"]["preprocess"])
            self.step, self.best = int(state["step"]), float(state["best"])
            changes = changed_settings(state["config"], self.config, self._stage_options())
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--resume {path}: the state is of another model or method than the one asked for "
                            f"({(str(error).splitlines() or [type(error).__name__])[0]})") from error
        if state.get("processes") != self.distributed.world_size:
            changes.append(f"processes: {state.get('processes')} -> {self.distributed.world_size}")
        if not same_everywhere(self.step, self.distributed.device):
            raise UserError(f"--resume {path}: the processes found different states; --save-dir has to be one folder "
                            "that all machines share")
        if path.parent.resolve() != self.files.directory.resolve() or not self.files.best.is_file():
            self.best = -1.0  # the best model so far is not in this folder
        for change in changes:
            LOG.warning("--resume: %s (the continuation will differ from an uninterrupted run)", change)
        best = f", best mIoU {100 * self.best:.2f}" if self.best >= 0 else ""
        LOG.info("resumed from %s at step %d%s", path, self.step, best)
        return True

    def _stage_options(self) -> set[str]:
        return {option for d in self.objective.distillers.values() for option in d.stage_options}

    def _open_files(self) -> None:
        if not self.distributed.is_main:
            return
        if not (self._resumed and self.files.holds(self.config.resume)):
            self.files.set_aside()
        setup_logging(True, self.files.text_log)
        self.logger = RunLogger(self.files.log_directory, self.files.log_name, self.step, self.config.tensorboard)
        self.files.save_config(self.config, self.distributed.world_size)
        for name in DEAD_OPTIONS:
            if getattr(self.config, name) is not None:
                LOG.warning("--%s has no effect (nor has it in the reference)", name)
        unread = self.config.method != "none" and teacher_options(self.config)
        if self.teacher is None and unread:
            LOG.warning("not used, since no method of this run reads that teacher: %s", ", ".join(unread))
        LOG.info("configuration (also in %s):\n%s", self.files.config, readable(self.config))
        count = sum(p.numel() for p in self.student.parameters()) / 1e6
        extra = sum(p.numel() for p in self.objective.distillers.parameters()) / 1e6
        LOG.info("student %s %.2f M parameters, distillers %.2f M (%s), %d training images, %d processes on %s",
                 self.student.name, count, extra, ", ".join(self.objective.distillers) or "none",
                 len(self.train_set), self.distributed.world_size, self.distributed.device.type)

    # -- training ------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train from the current step to the last, validating and saving on the way; then report."""
        self._open_files()
        config, workers = self.config, self.config.workers
        validator = self.val_set and Validator(self.val_set, self.distributed, workers, self.logger,
                                               config.panels)
        self._prepare()
        progress = Progress(config.max_iterations, self.step, self.distributed.is_main)
        clock = Stopwatch()
        for batch in self._batches():
            clock.got_batch()
            result = self.train_step(batch)
            self.step += 1
            clock.count(len(batch["name"]) * self.distributed.world_size)
            progress.advance()
            last = self.step == config.max_iterations
            if self.step % config.log_iter == 0 or last:
                self._log(result, clock, progress)
            if validator and (self.step % config.val_per_iters == 0 or last):
                self.step_fn.check_finite(self.step)
                self._validate(validator)
                clock.restart()
            if self.step % config.save_per_iters == 0 or last:
                self._save()
        progress.close()
        self._report(workers)
        if self.logger is not None:
            self.logger.close()
        barrier()

    def _prepare(self) -> None:
        """Run the stages that methods need before training; a resumed run has their results in its state."""
        if self._resumed:
            return
        stage = Preparation(self.teacher, self.distributed.device, self.files.directory, self.distributed.is_main,
                            self._stage_batches, LOG.info, self.train_set.digest(), len(self.train_set), self.student)
        for distiller in self.objective.distillers.values():
            distiller.prepare(stage)
            barrier()

    def _stage_batches(self, steps: int, batch_size: int, start: int,
                       role: str) -> Iterator[tuple[Tensor | tuple[Tensor, Tensor], Tensor]]:
        device = self.distributed.device
        nets = {"teacher": [self.teacher], "student": [self.student], "both": [self.student, self.teacher]}[role]
        for batch in build_loader(self.config, self.train_set, self.distributed, start, steps, batch_size):
            images, valid, target = (batch[k].to(device, non_blocking=True) for k in ("image", "valid", "label"))
            inputs = tuple(net.preprocess(images, valid) for net in nets)
            yield inputs if role == "both" else inputs[0], target.long()

    def train_step(self, batch: dict) -> StepResult:
        """Train on one batch from the loader (uint8 images, int16 labels): normalise for each network, then step."""
        device = self.distributed.device
        images, valid, target = (batch[k].to(device, non_blocking=True) for k in ("image", "valid", "label"))
        student_images = self.student.preprocess(images, valid)
        teacher_images = None
        if self.teacher is not None:
            same = self.teacher.preprocess == self.student.preprocess
            teacher_images = student_images if same else self.teacher.preprocess(images, valid)
        return self.step_fn(student_images, teacher_images, target.long(), self.step)

    def _batches(self) -> Iterator[dict]:
        self.model.train()
        if self.step < self.config.max_iterations:
            yield from build_loader(self.config, self.train_set, self.distributed, self.step)

    def _log(self, result: StepResult, clock: Stopwatch, progress: Progress) -> None:
        self.step_fn.check_finite(self.step)
        names = list(result.terms)
        values = reduce_mean(torch.stack([*result.terms.values(), *result.weighted.values(), result.total]).double())
        raw, weighted = (dict(zip(names, part.tolist(), strict=True)) for part in values[:-1].chunk(2))
        if not self.distributed.is_main:
            return
        speed, waiting = clock.read()
        left = timedelta(seconds=int((self.config.max_iterations - self.step) * self.config.batch_size / speed))
        notes = {k: float(v) for k, v in self.objective.diagnostics().items()}
        self.logger.record("train", self.step, lr=result.lr, loss=values[-1].item(), raw=raw, weighted=weighted,
                           grad_norm={k: float(v) for k, v in result.grad_norms.items()}, diagnostics=notes,
                           images_per_second=round(speed, 3), waiting_for_data=round(waiting, 4))
        terms = "  ".join(f"{k} {weighted[k]:.4g} ({raw[k]:.4g})" for k in names)
        short = " ".join(f"{k} {weighted[k]:.3g}" for k in names)
        progress.show(f"{short} lr {result.lr:.4f} {speed:.1f} img/s")
        LOG.info("step %d/%d  lr %.5f  loss %.4f = %s  %.1f img/s  data %.0f%%  ETA %s", self.step,
                 self.config.max_iterations, result.lr, values[-1].item(), terms, speed, 100 * waiting, left)

    # -- evaluation and files ------------------------------------------------------------------------------------

    def _validate(self, validator: Validator) -> None:
        score = validator(self.student, self.step)["mIoU"]
        if score > self.best:
            self.best = score
            if self.distributed.is_main:
                save_state_dict(self.student, self.files.best)

    def _save(self) -> None:
        self.step_fn.check_finite(self.step)
        if self.distributed.is_main:
            save_state_dict(self.student, self.files.student)
            save_state(self.files.state, {
                "model": self.student.state_dict(), "net_info": describe(self.student),
                "distillers": self.objective.distillers.state_dict(), "optimizer": self.optimizer.state_dict(),
                "step": self.step, "best": self.best, "config": plain(self.config),
                "processes": self.distributed.world_size})

    def _report(self, workers: int) -> None:
        """Evaluate the best model on the splits that are reported but not selected on (CamVid: test)."""
        if self.val_set is None:
            return
        if self.best < 0:
            LOG.warning("no validation of this run has left a best model in %s", self.files.directory)
            return
        LOG.info("best %s mIoU %.2f  %s", self.val_set.split, 100 * self.best, self.files.best)
        if not self.report_sets:
            return
        barrier()
        load_weights(self.student, str(self.files.best))
        for split in self.report_sets:
            Validator(split, self.distributed, workers, self.logger)(self.student, self.step, "report")


class Stopwatch:
    """Speed since the last reading, and the share of the time that was spent waiting for data."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start a new window now."""
        self.start = self.mark = time.perf_counter()
        self.waited, self.images = 0.0, 0

    def got_batch(self) -> None:
        """A batch has arrived: what passed since the last step was waiting."""
        self.waited += time.perf_counter() - self.mark

    def count(self, images: int) -> None:
        """One step over that many images is done."""
        self.images += images
        self.mark = time.perf_counter()

    def read(self) -> tuple[float, float]:
        """(images per second, share of waiting) of the window, and start the next one."""
        passed = max(time.perf_counter() - self.start, 1e-9)
        speed, share = self.images / passed, self.waited / passed
        self.restart()
        return max(speed, 1e-9), share


