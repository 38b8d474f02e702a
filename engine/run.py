"""A training run: its parts and how far it is, its batches, its steps and the stages before them."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dataset as data
from engine.lock import RunLock
from engine.log import LOG, RunLogger
from engine.run_files import RunFiles
from engine.settings import Settings
from engine.step import StepResult, TrainStep
from engine.stopwatch import Stopwatch
from engine.unlabelled import images_without_labels
from losses.core.facts import Preparation
from losses.core.objective import Objective
from models.prepare import StoredTeacher
from utils.distributed import Distributed, available_cpus, barrier
from utils.watchdog import in_time


@dataclass
class Run:
    """Everything that ``engine.build.build_run`` made, and the state of training: iterations done, best validation mIoU
    (below 0: none yet), a digest of the weights that reached it (None where an earlier version chose them), iterations
    done at the last validation, the time of those since the last that was logged. val_set: None without validation.
    teacher: None when no method reads one. unlabeled: images without labels that join every batch. contents: {setting:
    what the file that it names holds}, as JSON values. sources: {file of its own code: SHA-256}. lock: on the folders,
    logger: of the log, while the main process trains. changed: settings that a resumed run has changed on its way, each
    with the step after which it did. revisions: of this code, of all processes that made steps, known to the main
    process while it trains. teacher_predictions: {index: int64 [H, W]} of the validation images that are drawn."""

    settings: Settings
    distributed: Distributed
    spec: data.DatasetSpec
    train_set: data.SegmentationDataset
    val_set: data.SegmentationDataset | None
    report_sets: list[data.SegmentationDataset]
    student: nn.Module
    teacher: nn.Module | None
    objective: Objective
    model: nn.Module
    optimizer: torch.optim.Optimizer
    step_fn: TrainStep
    files: RunFiles
    unlabeled: data.SegmentationDataset | None = None
    contents: dict[str, object] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    step: int = 0
    best: float = -1.0
    best_weights: str | None = None
    validated: int = 0
    clock: Stopwatch = field(default_factory=Stopwatch)
    logger: RunLogger | None = None
    lock: RunLock | None = None
    changed: list[dict[str, object]] = field(default_factory=list)
    revisions: list[dict[str, object]] = field(default_factory=list)
    teacher_predictions: dict[int, Tensor] = field(default_factory=dict)

    @property
    def training_images(self) -> data.SegmentationDataset | data.MixedDataset:
        """What training steps read: the training images, and those without labels."""
        return self.train_set if self.unlabeled is None else data.MixedDataset(self.train_set, self.unlabeled)

    def check_lock(self) -> None:
        """UserError when another run has taken the folder over: nothing may be written any more."""
        if self.lock is not None:
            self.lock.check()

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many iterations, and after the last one, happens now."""
        return self.step % every == 0 or self.step == self.settings.optimization.max_iterations

    @property
    def wants_validation(self) -> bool:
        """Whether a validation is due that has not been done."""
        return (self.val_set is not None and self.validated < self.step
                and self.is_due(self.settings.running.val_per_iters))


def build_loader(run: Run, start_step: int, steps: int, batch_size: int) -> DataLoader:
    """Batches of this process from ``start_step`` to ``steps``, of ``batch_size`` labeled images over all processes.

    The samples do not depend on worker or process counts. Loading processes: at most one per CPU.
    """
    settings, distributed = run.settings, run.distributed
    sampler = build_sampler(run, start_step, steps, batch_size)
    workers = min(settings.data.workers, available_cpus())
    return DataLoader(run.training_images, batch_sampler=sampler, num_workers=workers, collate_fn=data.collate,
                      worker_init_fn=data.worker_init, pin_memory=distributed.device.type == "cuda",
                      persistent_workers=workers > 0)


def build_sampler(run: Run, start_step: int, steps: int, batch_size: int) -> data.TrainSampler | data.MixedSampler:
    """Which of ``run.training_images`` this process gets from ``start_step`` to ``steps``."""
    settings = run.settings
    sampler = partial(data.TrainSampler, steps=steps, rank=run.distributed.rank, world_size=run.distributed.world_size,
                      seed=settings.optimization.seed, start_step=start_step, mode=settings.data.sampling)
    labeled = sampler(len(run.train_set), batch_size=batch_size)
    if run.unlabeled is None:
        return labeled
    unlabeled = sampler(len(run.unlabeled), batch_size=images_without_labels(settings), stream=data.UNLABELED_STREAM)
    return data.MixedSampler(labeled, unlabeled, settings.speed.grad_accumulation)


def training_batches(run: Run) -> Iterator[dict]:
    """The batches of the remaining iterations."""
    run.model.train()
    o = run.settings.optimization
    if run.step < o.max_iterations:
        yield from in_time(build_loader(run, run.step, o.max_iterations, o.batch_size))


def to_device(run: Run, batch: dict) -> tuple[Tensor, Tensor, Tensor]:
    """(images uint8 [B, 3, H, W], valid int [B, 4], target int64 [B, H, W]) of a batch of the loader."""
    images, valid, target = (batch[k].to(run.distributed.device, non_blocking=True)
                             for k in ("image", "valid", "label"))
    if run.settings.speed.uses_channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return images, valid, target.long()


def network_inputs(run: Run, batch: dict) -> tuple[Tensor, Tensor | None, Tensor]:
    """(images of the student, of the teacher if there is one, float [B, 3, H, W]; target int64 [B, H, W]) of a batch of
    the loader (uint8 images, int16 labels), normalized for each network. A stored teacher gets its scores."""
    images, valid, target = to_device(run, batch)
    student_images = run.student.preprocess(images, valid)
    teacher_images = None
    if isinstance(run.teacher, StoredTeacher):
        teacher_images = batch["scores"].to(run.distributed.device, non_blocking=True)
    elif run.teacher is not None:
        same = run.teacher.preprocess == run.student.preprocess
        teacher_images = student_images if same else run.teacher.preprocess(images, valid)
    return student_images, teacher_images, target


def train_batch(run: Run, batch: dict) -> StepResult:
    """Train on one batch from the loader."""
    return run.step_fn(*network_inputs(run, batch), run.step)


def run_stages(run: Run, check: Callable[[], None] = lambda: None) -> None:
    """Run the stages that methods need before training, on labeled images. A resumed run has their results in its
    state. check: called between the steps of a stage; one that it ends (SystemExit) saves what it has and goes on from
    there."""
    labeled = replace(run, unlabeled=None)

    def batches(steps: int, batch_size: int, start: int,
                role: str) -> Iterator[tuple[Tensor | tuple[Tensor, Tensor], Tensor]]:
        nets = {"teacher": [run.teacher], "student": [run.student], "both": [run.student, run.teacher]}[role]
        for batch in in_time(build_loader(labeled, start, steps, batch_size)):
            images, valid, target = to_device(run, batch)
            inputs = tuple(net.preprocess(images, valid) for net in nets)
            if role == "teacher" and run.objective.common is not None:
                target = run.objective.common.labels(target)
            yield inputs if role == "both" else inputs[0], target
            check()

    stage = Preparation(run.student, run.teacher, run.distributed.device, run.files.directory,
                        run.distributed.is_main_process, batches, LOG.info, run.train_set.digest(), len(run.train_set))
    for distiller in run.objective.distillers.values():
        distiller.prepare(stage)
        barrier()
