"""What CIRKD and CIRKDv2 share: relations with queues of teacher vectors, their settings, and how they are built."""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from losses.core.checks import check_maps
from losses.core.facts import NetInfo, RunFacts
from losses.core.groups import image_weights
from losses.core.labels import class_members, position_labels
from losses.core.needs import Needs
from losses.core.queues import (
    FeatureQueue,
    class_means,
    draw_slots,
    gather_batch,
    pick_pixels,
    random_priorities,
    take_pixels,
)
from losses.core.relations import pixel_rows, queue_relation_loss
from utils.errors import UserError
from utils.options import OptionGroup, option
from utils.randomness import step_generator

#: what both methods compare
HEADS = Needs.both("head", same_stride=True)


@dataclass(frozen=True)
class RelationOptions(OptionGroup):
    """Settings of both methods; the defaults are those of the released scripts."""
    cirkd_tau: float = option(0.1, "temperature of the similarities", above=0, metavar="T")
    cirkd_kd_tau: float = option(1.0, "temperature of the divergence in the terms with queues", above=0, metavar="T")
    cirkd_pool: int = option(
        1, "average pooling before the relations in the batch; 1 = off, published for SegFormer: 2; cirkdv2: at least "
           "4 for head maps of 256x256 or more", at_least=1)
    cirkd_pixel_queue: int = option(
        20000, "queued pixels per class: 4 bytes each times the teacher's head width, 0.39 GB for 19 classes and 3-4 "
               "GB for 150 or more", at_least=1)
    cirkd_region_queue: int = option(2000, "queued class means per class", at_least=1)
    cirkd_pixel_contrast: int = option(4096, "queued pixels compared with in a step, over all classes", at_least=1)
    cirkd_region_contrast: int = option(
        1024, "queued class means compared with in a step, over all classes", at_least=1)
    cirkd_pixel_update: int = option(16, "pixels that enter the queue of a class from one image, at most", at_least=1)
    cirkd_only_filled: bool = option(
        False, "compare with queue slots that hold a vector of the teacher; off, as published: also with the random "
               "vectors that fill them at the start")
    cirkd_queue_dtype: str = option("float32", "precision of the queues; a half one takes half the memory",
                                    choices=("float32", "float16", "bfloat16"))

    @property
    def queue_dtype(self) -> torch.dtype:
        """The precision of the queues."""
        return getattr(torch, self.cirkd_queue_dtype)


def relation_needs(method: str, options: RelationOptions, run: RunFacts) -> Needs:
    """Head maps of one size, and large enough for the pooling of the relations in the batch."""
    pool = options.cirkd_pool if f"{method}_batch" in run.active else 1
    return replace(HEADS, smallest_map=(pool, pool), why="to be pooled", settings=("cirkd_pool",))


def projection(student_channels: int, teacher_channels: int) -> nn.Sequential:
    """Convolution 1x1, batch norm, ReLU, convolution 1x1: [B, C, h, w] -> [B, D, h, w]."""
    return nn.Sequential(nn.Conv2d(student_channels, teacher_channels, 1, bias=False),
                         nn.BatchNorm2d(teacher_channels), nn.ReLU(inplace=True),
                         nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False))


@dataclass(frozen=True)
class MemorySettings:
    """Settings of :class:`MemoryRelations`; sizes are vectors per class.

    pixel_queue, region_queue: slots; 0 = that term is off. pixel_contrast, region_contrast: slots compared with in a
    step. pixel_update: most pixels that an image adds. tau, kd_tau: temperatures of the similarities and of the
    divergence. only_filled: compare with written slots only. as_released: enqueue the pixels that the published code
    enqueues. group_size: images over whose labeled pixels the mean is taken. fast: the faster form of the relations."""
    pixel_queue: int
    region_queue: int
    pixel_contrast: int
    region_contrast: int
    pixel_update: int
    tau: float
    kd_tau: float
    group_size: int
    only_filled: bool = False
    dtype: torch.dtype = torch.float32
    as_released: bool = False
    fast: bool = True


@dataclass(frozen=True)
class Draws:
    """The random choices of a step: priorities of this process's pixels int64 [B, P] (``pick_pixels``), drawn for all
    processes alike, and the order int64 [size] in which the slots of either queue are taken, each process its own."""
    priority: Tensor
    pixel_order: Tensor | None
    region_order: Tensor | None


class MemoryRelations(nn.Module):
    """Pixel-to-pixel and pixel-to-region relations with queues of teacher vectors."""

    def __init__(self, student_channels: int, teacher_channels: int, num_class: int, settings: MemorySettings,
                 ignore_label: int = -1, generator: torch.Generator | None = None) -> None:
        """generator: source of the first queue contents, on the CPU. Raises UserError on a queue that is too short."""
        super().__init__()
        s = settings
        if 0 < s.pixel_queue < s.pixel_update:
            raise UserError(f"pixel queue of {s.pixel_queue}: expected at least the pixel update of {s.pixel_update}",
                            settings=["cirkd_pixel_queue", "cirkd_pixel_update"])
        self.settings, self.num_class, self.ignore_label = s, num_class, ignore_label
        self.project_head = projection(student_channels, teacher_channels)
        self.pixel, self.region = (
            FeatureQueue(size, teacher_channels, num_class, s.dtype, generator) if size else None
            for size in (s.pixel_queue, s.region_queue))

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor, *, draws: Draws | None = None,
                generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """{"pixel": scalar, "region": scalar} of maps [B, C, h, w] and [B, D, h, w] and labels int64 [B, H, W].

        The batch enters the queues first and is then compared with them. draws: from ``generator`` (on the tensors'
        device, equally seeded on every process) when not given. A batch without labels gives 0 with a zero gradient."""
        check_maps("relations with queues", student, teacher)
        student_rows, teacher_rows = pixel_rows(self.project_head(student)), pixel_rows(teacher.detach())
        labels = position_labels(target, student.shape[-2:], self.num_class, self.ignore_label)
        draws = draws or self.draw(*labels.shape, labels.device, generator)
        self.enqueue(teacher_rows, labels, draws.priority)
        valid = labels >= 0
        weight = valid * image_weights(valid.sum(1), self.settings.group_size, student_rows.dtype)[:, None]
        s, losses = self.settings, {}
        rows = [x.flatten(0, 1) for x in (student_rows, teacher_rows)]
        for name, queue, order, most in (("pixel", self.pixel, draws.pixel_order, s.pixel_contrast),
                                         ("region", self.region, draws.region_order, s.region_contrast)):
            if queue is not None:
                vectors, usable = queue.sample(order, most, s.only_filled)
                keys = vectors.to(student_rows.dtype)
                losses[name] = s.kd_tau ** 2 * queue_relation_loss(*rows, keys, weight.flatten(), s.tau * s.kd_tau,
                                                                   usable, s.fast)
        return losses

    def draw(self, batch: int, positions: int, device: torch.device, generator: torch.Generator | None = None) -> Draws:
        """Random choices for a batch of so many images (per process) and positions. generator: as in ``forward``."""
        orders = [None if queue is None else draw_slots(queue.size, device, generator)
                  for queue in (self.pixel, self.region)]
        return Draws(random_priorities(batch, positions, device, generator), *orders)

    @torch.no_grad()
    def enqueue(self, teacher: Tensor, labels: Tensor, priority: Tensor) -> None:
        """Push class means and picked pixels of every process's batch: unit vectors [B, P, D], labels [B, P]."""
        members = class_members(labels, self.num_class)
        if self.region is not None:
            means, present = class_means(teacher, members), members.any(-1).long()
            self.region.push(gather_batch(means).unsqueeze(2), gather_batch(present))
        if self.pixel is not None:
            pixel, count = pick_pixels(labels, members, self.settings.pixel_update, priority, self.settings.as_released)
            self.pixel.push(gather_batch(take_pixels(teacher, pixel)), gather_batch(count))


def build_batch(method: str, options: RelationOptions, run: RunFacts) -> dict[str, float] | None:
    """Arguments of ``minibatch_pixel_loss``; None when its term does not count."""
    if f"{method}_batch" not in run.active:
        return None
    return {"group_size": run.group_size, "tau": options.cirkd_tau, "pool": options.cirkd_pool, "fast": run.fast}


def build_memory(method: str, options: RelationOptions, run: RunFacts, student: NetInfo,
                 teacher: NetInfo) -> MemoryRelations | None:
    """The relations of the head maps with those queues whose terms count, None without any; UserError on a queue that
    is too short. The first queue contents depend on seed and method only."""
    pixel, region = (f"{method}_{name}" in run.active for name in ("pixel", "region"))
    if not (pixel or region):
        return None
    o, classes = options, run.num_class
    settings = MemorySettings(
        o.cirkd_pixel_queue if pixel else 0, o.cirkd_region_queue if region else 0,
        o.cirkd_pixel_contrast // classes + 1, o.cirkd_region_contrast // classes + 1, o.cirkd_pixel_update,
        o.cirkd_tau, o.cirkd_kd_tau, run.group_size, o.cirkd_only_filled, o.queue_dtype, run.as_released,
        run.fast)
    return MemoryRelations(student.channels["head"], teacher.channels["head"], classes, settings, run.ignore_label,
                           step_generator(torch.device("cpu"), run.seed, method, "queues"))


def queue_diagnostics(memory: MemoryRelations | None) -> dict[str, Tensor]:
    """{name_queue_filled: share of written slots} of the queues that exist."""
    queues = {} if memory is None else {"pixel": memory.pixel, "region": memory.region}
    return {f"{name}_queue_filled": queue.filled_share() for name, queue in queues.items() if queue is not None}
