"""CIRKD: relations of pixels across images (Yang et al., "Cross-Image Relational Knowledge Distillation for Semantic
Segmentation", CVPR 2022).

With s and t the pixel vectors of student and teacher at unit length, tau = 0.1:
``cirkd_batch``: mean over the ordered image pairs (i, j) of a group and the pixels p of i of
    KL(softmax(t_i[p] . t_j / tau) || softmax(s_i[p] . s_j / tau)), the softmaxes over the pixels of j.
``cirkd_pixel``, ``cirkd_region``: mean over the labelled pixels of KL(softmax(t . v / tau) || softmax(s . v / tau)),
    where s is projected to the teacher's width and v are vectors of the teacher kept in queues per class: single
    pixels, and class means of whole images.
"""
from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses.cirkd_memory import (
    FeatureQueue,
    check_heads,
    check_maps,
    class_means,
    class_members,
    gather_batch,
    pick_pixels,
    pixel_rows,
    queue_names,
    random_priorities,
    small_labels,
    take_pixels,
)
from losses.distiller import BuildContext, Distiller, Term, register
from losses.relations import relation_divergence
from losses.task import at_least_float32, image_weights
from models.output import SegOutput
from utils.cli import BooleanAction, number
from utils.errors import UserError
from utils.randomness import step_generator


def grouped_relation_loss(student: Tensor, teacher: Tensor, group_size: int = 0, tau: float = 0.1) -> Tensor:
    """Mean over images i, their R rows and the images j of i's group of KL(teacher || student).

    student: [B, R, C], teacher: [B, R, D], rows of unit length; a row of image i gives a distribution over the R rows
    of image j. Groups are ``group_size`` neighbouring images (0 = all), the last one may be smaller; every image has
    the same weight. The teacher gets no gradient.
    """
    batch, rows, _ = student.shape
    size = min(group_size or batch, batch)
    whole = batch - batch % size
    total = student.new_zeros(())
    for images, count in ((slice(0, whole), size), (slice(whole, batch), batch - whole)):
        if not count:
            continue
        keys = [x[images].unflatten(0, (-1, count)) for x in (student, teacher)]
        weight = student.new_full((len(keys[0]), count * rows), 1 / (batch * count * rows))
        total = total + relation_divergence(*(k.flatten(1, 2) for k in keys), *keys, weight, tau)
    return total


def minibatch_pixel_loss(student: Tensor, teacher: Tensor, group_size: int = 2, tau: float = 0.1,
                         pool: int = 1) -> Tensor:
    """Mini-batch pixel-to-pixel relations of student [B, C, h, w] and teacher [B, D, h, w], a scalar.

    For each ordered pair (i, j) of images of a group, the mean over the pixels of i of the KL divergence between the
    softmaxes of their cosines to the pixels of j over ``tau``; then the mean over the pairs (no tau^2). pool: average
    pooling first, with smaller windows at the edge. See :func:`grouped_relation_loss` for the rest. The
    teacher gets no gradient; float32 or better. Raises UserError on maps that do not fit each other or the pooling.
    """
    check_maps(student, teacher, "cirkd")
    if min(student.shape[-2:]) < pool:
        raise UserError(f"--cirkd-pool {pool}: the {student.shape[-2]}x{student.shape[-1]} feature map is smaller")
    maps = [at_least_float32(x) for x in (student, teacher.detach())]
    if pool > 1:
        maps = [F.avg_pool2d(x, pool, ceil_mode=True) for x in maps]
    return grouped_relation_loss(*map(pixel_rows, maps), group_size, tau)


def projection(student_channels: int, teacher_channels: int) -> nn.Sequential:
    """Convolution 1x1, batch norm, ReLU, convolution 1x1: [B, C, h, w] -> [B, D, h, w]."""
    return nn.Sequential(nn.Conv2d(student_channels, teacher_channels, 1, bias=False),
                         nn.BatchNorm2d(teacher_channels), nn.ReLU(inplace=True),
                         nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False))


@dataclass(frozen=True)
class MemorySettings:
    """Settings of :class:`MemoryRelations`; sizes are vectors per class.

    pixel_queue, region_queue: slots; 0 = that term is off. pixel_contrast, region_contrast: slots compared with in a
    step. pixel_update: largest number of pixels that an image adds. tau, kd_tau: temperatures of the similarities and
    of the divergence. only_filled: compare with written slots only. as_released: enqueue the pixels that the published
    code enqueues. group_size: the mean over labelled pixels is taken in each group of so many images.
    """

    pixel_queue: int = 20000
    region_queue: int = 2000
    pixel_contrast: int = 216
    region_contrast: int = 54
    pixel_update: int = 16
    tau: float = 0.1
    kd_tau: float = 1.0
    only_filled: bool = False
    dtype: torch.dtype = torch.float32
    as_released: bool = False
    group_size: int = 2


@dataclass(frozen=True)
class Draws:
    """The random choices of a step: priorities of this process's pixels int64 [B, P] (:func:`pick_pixels`), and the
    order int64 [size] in which the slots of either queue are taken. All processes need the same ones."""

    priority: Tensor
    pixel_order: Tensor | None
    region_order: Tensor | None


class MemoryRelations(nn.Module):
    """Pixel-to-pixel and pixel-to-region relations with queues of teacher vectors. Its state is complete: projection,
    queues, pointers, counters."""

    def __init__(self, student_channels: int, teacher_channels: int, num_class: int,
                 settings: MemorySettings = MemorySettings(), ignore_label: int = -1,
                 generator: torch.Generator | None = None) -> None:
        """generator: source of the first queue contents, on the CPU. Raises UserError on a queue that is too short."""
        super().__init__()
        s = settings
        if 0 < s.pixel_queue < s.pixel_update:
            raise UserError(f"--cirkd-pixel-queue {s.pixel_queue}: expected at least the {s.pixel_update} of "
                            "--cirkd-pixel-update")
        self.settings, self.num_class, self.ignore_label = s, num_class, ignore_label
        self.project_head = projection(student_channels, teacher_channels)
        self.pixel = self.region = None
        if s.pixel_queue:
            self.pixel = FeatureQueue(s.pixel_queue, teacher_channels, num_class, s.dtype, generator)
        if s.region_queue:
            self.region = FeatureQueue(s.region_queue, teacher_channels, num_class, s.dtype, generator)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor, *, draws: Draws | None = None,
                generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """{"pixel": scalar, "region": scalar} of maps [B, C, h, w] and [B, D, h, w] and labels int64 [B, H, W].

        The batch enters the queues first and is compared with them afterwards. draws: the random choices, from
        ``generator`` (on the tensors' device, equally seeded on every process) when not given. A batch without labels
        gives 0 with a zero gradient.
        """
        check_maps(student, teacher, "cirkd")
        student_rows, teacher_rows = pixel_rows(self.project_head(student)), pixel_rows(teacher.detach())
        labels = small_labels(target, tuple(student.shape[-2:]), self.num_class, self.ignore_label)
        if draws is None:
            draws = self.draw(*labels.shape, labels.device, generator)
        self.enqueue(teacher_rows, labels, draws.priority)
        weight = self.pixel_weights(labels >= 0, student_rows.dtype).flatten()[None]
        s, losses = self.settings, {}
        rows = [x.flatten(0, 1)[None] for x in (student_rows, teacher_rows)]
        for name, queue, order, most in (("pixel", self.pixel, draws.pixel_order, s.pixel_contrast),
                                         ("region", self.region, draws.region_order, s.region_contrast)):
            if queue is not None:
                vectors, usable = queue.sample(order, most, s.only_filled)
                keys = vectors.to(student_rows.dtype)[None, None]
                losses[name] = s.kd_tau ** 2 * relation_divergence(
                    *rows, keys, keys, weight, s.tau * s.kd_tau, usable)
        return losses

    def draw(self, batch: int, positions: int, device: torch.device, generator: torch.Generator | None = None) -> Draws:
        """Random choices for a batch of so many images (per process) and positions."""
        orders = [None if queue is None else torch.randperm(queue.size, device=device, generator=generator)
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

    def pixel_weights(self, valid: Tensor, dtype: torch.dtype) -> Tensor:
        """Weights [B, P] that turn a sum over pixels into the mean over the valid ones (bool [B, P]) of each group,
        and that into the mean over the groups, by their number of images."""
        weights = image_weights(valid.sum(1), self.settings.group_size, dtype)
        return valid * weights[:, None]


#: Option name -> default, those of the released scripts.
DEFAULTS = {"cirkd_tau": 0.1, "cirkd_kd_tau": 1.0, "cirkd_pool": 1, "cirkd_pixel_queue": 20000,
            "cirkd_region_queue": 2000, "cirkd_pixel_contrast": 4096, "cirkd_region_contrast": 1024,
            "cirkd_pixel_update": 16, "cirkd_only_filled": False, "cirkd_queue_dtype": "float32", "group_size": 2,
            "compat": "fixed", "seed": 0}


def read_options(context: BuildContext) -> dict:
    """The options of :data:`DEFAULTS` as the command line has them."""
    return {name: getattr(context.options, name, default) for name, default in DEFAULTS.items()}


def build_memory(context: BuildContext, pixel: bool, region: bool, name: str) -> MemoryRelations:
    """:class:`MemoryRelations` of the head maps for the terms asked for; ``name`` seeds the first queue contents."""
    o, classes = read_options(context), context.num_class
    settings = MemorySettings(
        o["cirkd_pixel_queue"] if pixel else 0, o["cirkd_region_queue"] if region else 0,
        o["cirkd_pixel_contrast"] // classes + 1, o["cirkd_region_contrast"] // classes + 1, o["cirkd_pixel_update"],
        o["cirkd_tau"], o["cirkd_kd_tau"], o["cirkd_only_filled"], getattr(torch, o["cirkd_queue_dtype"]),
        o["compat"] == "reference", o["group_size"])
    return MemoryRelations(context.student.channels["head"], context.teacher.channels["head"], classes, settings,
                           context.ignore_label, step_generator(torch.device("cpu"), o["seed"], name, "queues"))


@register("cirkd")
class CIRKD(Distiller):
    """The head maps of both networks through :func:`minibatch_pixel_loss` and :class:`MemoryRelations`.

    Queues: classes * 22000 * teacher width numbers, that is 0.43 GB for 19 classes of width 256 in float32, 3.4 GB for
    150 and 4.1 GB for 182, on every GPU and in every training state.
    """

    title = "cross-image relations; queues take 0.43 GB (19 classes) to 4.1 GB (182 classes)"
    paper = "Yang et al., Cross-Image Relational Knowledge Distillation for Semantic Segmentation"
    year = 2022
    terms = (Term("cirkd_batch", 0.0, "weight of CIRKD's pixel relations between the images of a group"),
             Term("cirkd_pixel", 0.0, "weight of CIRKD's relations with queued pixels (0.39 GB for 19 classes, 3-4 GB "
                                      "for 150 or more)"),
             Term("cirkd_region", 0.0, "weight of CIRKD's relations with queued class means (0.04 GB for 19 classes)"))
    student_taps = ("head",)
    teacher_taps = ("head",)
    cost = "relations of all positions between two images and to about 5000 queue vectors"
    # the released scripts; for VOC the author's answer on the repository (0.1 falls behind the baseline there)
    preset = {"*": {"lambda_kd": 1.0, "lambda_cirkd_batch": 1.0, "lambda_cirkd_pixel": 0.1, "lambda_cirkd_region": 0.1},
              "voc": {"lambda_cirkd_pixel": 0.01, "lambda_cirkd_region": 0.01}}

    def __init__(self, memory: MemoryRelations | None, batch: bool = True, tau: float = 0.1, pool: int = 1,
                 group_size: int = 2, seed: int = 0) -> None:
        """memory: None leaves out the queues; batch: False leaves out ``cirkd_batch``."""
        super().__init__()
        self.memory, self.batch, self.seed = memory, batch, seed
        self.batch_options = {"group_size": group_size, "tau": tau, "pool": pool}

    @classmethod
    def add_arguments(cls, group: argparse._ArgumentGroup) -> None:
        def add(flag: str, kind, help: str, metavar: str = "N", **more) -> None:
            group.add_argument(flag, type=kind, metavar=metavar, default=DEFAULTS[flag[2:].replace("-", "_")],
                               help=help, **more)

        natural, positive = number(int, 1), number(float, 0, open_low=True)
        add("--cirkd-tau", positive, "temperature of the similarities", "T")
        add("--cirkd-kd-tau", positive, "temperature of the divergence in the terms with queues", "T")
        add("--cirkd-pool", natural, "average pooling before the relations in the batch; 1 = off, published for "
                                     "SegFormer: 2")
        add("--cirkd-pixel-queue", natural, "queued pixels per class: 4 bytes each times the teacher's head width, "
                                            "0.39 GB for 19 classes and 3-4 GB for 150 or more")
        add("--cirkd-region-queue", natural, "queued class means per class")
        add("--cirkd-pixel-contrast", natural, "queued pixels compared with in a step, over all classes")
        add("--cirkd-region-contrast", natural, "queued class means compared with in a step, over all classes")
        add("--cirkd-pixel-update", natural, "pixels that enter the queue of a class from one image, at most")
        group.add_argument("--cirkd-only-filled", "--no-cirkd-only-filled", action=BooleanAction, default=False,
                           help="compare with queue slots that hold a vector of the teacher; off, as published: also "
                                "with the random vectors that fill them at the start")
        group.add_argument("--cirkd-queue-dtype", choices=("float32", "float16", "bfloat16"), default="float32",
                           help="precision of the queues; a half one takes half the memory")

    @classmethod
    def build(cls, context: BuildContext) -> CIRKD:
        """Raises UserError when a network has no head map, the strides differ, or a queue is too short."""
        check_heads(cls, context)
        o = read_options(context)
        pixel, region = (term in context.active for term in ("cirkd_pixel", "cirkd_region"))
        memory = build_memory(context, pixel, region, cls.method) if pixel or region else None
        return cls(memory, "cirkd_batch" in context.active, o["cirkd_tau"], o["cirkd_pool"], o["group_size"],
                   o["seed"])

    def forward(self, student: SegOutput, teacher: SegOutput, target: Tensor, step: int,
                generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """``generator`` differs between processes and is not used: the queues need the same draws on all of them."""
        losses = {}
        if self.batch:
            losses["cirkd_batch"] = minibatch_pixel_loss(student.head, teacher.head, **self.batch_options)
        if self.memory is not None:
            shared = step_generator(target.device, self.seed, self.method, step)
            found = self.memory(student.head, teacher.head, target, generator=shared)
            losses.update({f"cirkd_{name}": value for name, value in found.items()})
        return losses

    def unsynchronised(self) -> set[str]:
        return queue_names(self)

    def diagnostics(self) -> dict[str, Tensor]:
        """``pixel_queue_filled``, ``region_queue_filled``: share of the slots written since the start."""
        return queue_diagnostics(self.memory)


def queue_diagnostics(memory: MemoryRelations | None) -> dict[str, Tensor]:
    """{name_queue_filled: share of written slots} of the queues that exist."""
    queues = {} if memory is None else {"pixel": memory.pixel, "region": memory.region}
    return {f"{name}_queue_filled": queue.filled_share() for name, queue in queues.items() if queue is not None}
