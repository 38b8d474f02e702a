"""CIRKDv2: CIRKD with relations of channels, and a context block on the student's side (technical report, 2025).

The channel terms treat each channel of the pooled head map as a vector over positions. ``cirkdv2_fitnet`` puts a
graph-convolution block (attention over all positions) behind the student's head map and regresses the teacher's map
from it; when it is on, every other term sees the block's output instead of the head map. The pixel terms are those of
``losses/cirkd.py``, under their own names because of that block.
"""
from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses.cirkd import (
    MemoryRelations,
    build_memory,
    grouped_relation_loss,
    minibatch_pixel_loss,
    projection,
    queue_diagnostics,
    read_options,
)
from losses.cirkd_memory import (
    FeatureQueue,
    check_heads,
    check_maps,
    gather_batch,
    queue_names,
)
from losses.distiller import BuildContext, Distiller, Term, register
from losses.relations import relation_divergence
from losses.task import at_least_float32
from models.output import SegOutput
from utils.cli import number
from utils.distributed import place
from utils.errors import UserError
from utils.randomness import step_generator

#: average pooling in front of the channel relations, and the most channels that enter the queue in a step
POOL, UPDATE = 4, 256
#: head maps of at least this height and width are pooled before the pixel relations in the batch
LARGE = 256


def _conv_bn_relu(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True))


class ContextBlock(nn.Module):
    """Attention over all positions, joined with its input by 1x1 convolutions: [B, C, h, w] -> the same shape.

    The attention map (h * w squared) is never kept. Raises UserError on a width below 2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 2:
            raise UserError(f"cirkdv2: the student's head has {channels} channel, expected at least 2")
        half = channels // 2
        self.node_k = nn.Conv2d(channels, half, 1, bias=False)
        self.node_v = nn.Conv2d(channels, half, 1, bias=False)
        self.node_q = nn.Conv2d(channels, half, 1, bias=False)
        self.conv1 = _conv_bn_relu(half, channels)
        self.out_conv = _conv_bn_relu(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (node(x).flatten(2).transpose(1, 2).unsqueeze(1) for node in (self.node_q, self.node_k, self.node_v))
        context = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).unflatten(2, x.shape[-2:])
        return self.out_conv(torch.cat([x, self.conv1(context)], dim=1))


class FitNet(nn.Module):
    """Mean squared error between a 1x1 convolution of the student's map [B, C, h, w] and the teacher's [B, D, h, w]."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(student_channels, teacher_channels, 1, bias=False)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.mse_loss(at_least_float32(self.conv(student)), at_least_float32(teacher.detach()))


class ChannelRelations(nn.Module):
    """Relations of channels: in the batch, with a queue of the teacher's channels, and their squared error.

    size: (h, w) of the head maps, which fixes the length of the queued vectors. queue: slots, 0 = no queue. contrast:
    slots compared with in a step. terms: which of "batch", "memory", "mse" to compute. generator: source of the first
    queue contents, on the CPU.
    """

    def __init__(self, student_channels: int, teacher_channels: int, size: tuple[int, int], queue: int = 10000,
                 contrast: int = 2048, terms: frozenset[str] = frozenset({"batch", "memory", "mse"}),
                 group_size: int = 2, tau: float = 0.1, kd_tau: float = 1.0,
                 dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.project_head = projection(student_channels, teacher_channels)
        self.size, self.contrast, self.terms = tuple(size), contrast, terms
        self.group_size, self.tau, self.kd_tau = group_size, tau, kd_tau
        self.channel = None
        if "memory" in terms:
            length = math.prod(-(-side // POOL) for side in size)
            self.channel = FeatureQueue(queue, length, None, dtype, generator)

    def forward(self, student: Tensor, teacher: Tensor, *, draws: tuple[Tensor, Tensor] | None = None,
                generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """{term: scalar} of maps [B, C, h, w] and [B, D, h, w].

        draws: permutations of the B * D channels of all processes' images and of the queue's slots; from ``generator``
        (equally seeded on every process) when not given. Raises UserError when the maps are not of the size that the
        queue was made for.
        """
        check_maps(student, teacher, "cirkdv2")
        if self.channel is not None and tuple(student.shape[-2:]) != self.size:
            raise UserError(f"cirkdv2: the channel queue was made for {self.size[0]}x{self.size[1]} head maps "
                            f"(--crop-size), got {student.shape[-2]}x{student.shape[-1]}")
        maps = [F.avg_pool2d(at_least_float32(x), POOL, ceil_mode=True) for x in (student, teacher.detach())]
        s, t = (F.normalize(at_least_float32(x).flatten(2), dim=2) for x in (self.project_head(maps[0]), maps[1]))
        losses = {}
        if "batch" in self.terms:
            losses["batch"] = grouped_relation_loss(s, t, self.group_size, self.tau)
        if "memory" in self.terms:
            losses["memory"] = self._memory(s, t, draws, generator)
        if "mse" in self.terms:
            losses["mse"] = F.mse_loss(s, t)
        return losses

    def _memory(self, student: Tensor, teacher: Tensor, draws: tuple[Tensor, Tensor] | None,
                generator: torch.Generator | None) -> Tensor:
        batch, channels, _ = teacher.shape
        if draws is None:
            counts = (place()[1] * batch * channels, self.channel.size)
            draws = tuple(torch.randperm(n, device=teacher.device, generator=generator) for n in counts)
        rows = gather_batch(teacher).flatten(0, 1)[draws[0][:UPDATE]]
        self.channel.push(rows[None, None], draws[0].new_full((1, 1), len(rows)))
        keys = self.channel.sample(draws[1], self.contrast)[0].to(student.dtype)[None, None]
        weight = student.new_full((1, batch * channels), self.kd_tau ** 2 / (batch * channels))
        return relation_divergence(*(x.flatten(0, 1)[None] for x in (student, teacher)), keys, keys, weight,
                                   self.tau * self.kd_tau)


#: Option name -> default, those of the released scripts.
DEFAULTS = {"cirkdv2_channel_queue": 10000, "cirkdv2_channel_contrast": 2048}
CHANNEL_TERMS = {"cirkdv2_channel": "batch", "cirkdv2_channel_memory": "memory", "cirkdv2_channel_mse": "mse"}


def _published(fitnet: float) -> dict[str, float]:
    return {"lambda_kd": 1.0, "lambda_cirkdv2_fitnet": fitnet, "lambda_cirkdv2_batch": 1.0,
            "lambda_cirkdv2_pixel": 0.1, "lambda_cirkdv2_region": 0.1, "lambda_cirkdv2_channel": 1.0,
            "lambda_cirkdv2_channel_memory": 0.1, "lambda_cirkdv2_channel_mse": 100.0}


@register("cirkdv2")
class CIRKDv2(Distiller):
    """The head maps of both networks through the pixel terms of CIRKD, :class:`ChannelRelations` and FitNet, behind a
    :class:`ContextBlock` when ``cirkdv2_fitnet`` is on. The ``--cirkd-*`` options hold here too.

    Memory: the queues of CIRKD (0.43 GB for 19 classes, 3.4 GB for 150, 4.1 GB for 182) and 10000 channels of
    ceil(h / 4) * ceil(w / 4) numbers (0.02 GB for 512x1024 crops).
    """

    title = "CIRKD with channel relations and a context block; queues take 0.45 GB (19 classes) to 4.1 GB (182)"
    paper = "CIRKDv2, technical report of the CIRKD authors"
    year = 2025
    terms = (Term("cirkdv2_batch", 0.0, "weight of CIRKDv2's pixel relations between the images of a group"),
             Term("cirkdv2_pixel", 0.0, "weight of CIRKDv2's relations with queued pixels (0.39 GB for 19 classes, "
                                        "3-4 GB for 150 or more)"),
             Term("cirkdv2_region", 0.0, "weight of CIRKDv2's relations with queued class means"),
             Term("cirkdv2_channel", 0.0, "weight of CIRKDv2's channel relations between the images of a group"),
             Term("cirkdv2_channel_memory", 0.0, "weight of CIRKDv2's relations with queued channels"),
             Term("cirkdv2_channel_mse", 0.0, "weight of CIRKDv2's squared error between normalised channels"),
             Term("cirkdv2_fitnet", 0.0, "weight of CIRKDv2's feature regression; adds the context block in front of "
                                         "all its terms"))
    student_taps = ("head",)
    teacher_taps = ("head",)
    cost = "what CIRKD does, attention over all positions, relations between channels"
    # the released scripts, those for ResNet-18 where they differ by student; their batch, learning rate and 80k
    # iterations are not set here
    preset = {"*": _published(10.0), "citys": _published(1.0), "ade20k": _published(1.0)}

    def __init__(self, context_block: ContextBlock | None, fitnet: FitNet | None, memory: MemoryRelations | None,
                 channels: ChannelRelations | None, batch: dict | None, seed: int = 0) -> None:
        """batch: options of :func:`minibatch_pixel_loss`. What is None is left out."""
        super().__init__()
        self.gcn, self.fit, self.memory, self.channels = context_block, fitnet, memory, channels
        self.batch_options, self.seed = batch, seed

    @classmethod
    def add_arguments(cls, group: argparse._ArgumentGroup) -> None:
        # at least what a step adds to the queue
        for flag, low, help in (("--cirkdv2-channel-queue", UPDATE, "queued channels"),
                                ("--cirkdv2-channel-contrast", 1, "queued channels compared with in a step")):
            group.add_argument(flag, type=number(int, low), metavar="N", default=DEFAULTS[flag[2:].replace("-", "_")],
                               help=help)

    @classmethod
    def build(cls, context: BuildContext) -> CIRKDv2:
        """Raises UserError when a network has no head map, strides differ, or a queue is too short."""
        check_heads(cls, context)
        active, o = context.active, read_options(context)
        widths = context.student.channels["head"], context.teacher.channels["head"]
        block = fitnet = memory = batch = channels = None
        if "cirkdv2_fitnet" in active:
            block, fitnet = ContextBlock(widths[0]), FitNet(*widths)
        pixel, region = "cirkdv2_pixel" in active, "cirkdv2_region" in active
        if pixel or region:
            memory = build_memory(context, pixel, region, cls.method)
        if "cirkdv2_batch" in active:
            batch = {"group_size": o["group_size"], "tau": o["cirkd_tau"], "pool": o["cirkd_pool"]}
        if active & set(CHANNEL_TERMS):
            channels = cls._build_channels(context, widths, o)
        return cls(block, fitnet, memory, channels, batch, o["seed"])

    @classmethod
    def _build_channels(cls, context: BuildContext, widths: tuple[int, int], o: dict) -> ChannelRelations:
        own = {name: getattr(context.options, name, default) for name, default in DEFAULTS.items()}
        size = tuple(-(-side // context.student.stride) for side in context.crop_size)
        return ChannelRelations(
            *widths, size, own["cirkdv2_channel_queue"], own["cirkdv2_channel_contrast"],
            frozenset(kind for term, kind in CHANNEL_TERMS.items() if term in context.active), o["group_size"],
            o["cirkd_tau"], o["cirkd_kd_tau"], getattr(torch, o["cirkd_queue_dtype"]),
            step_generator(torch.device("cpu"), o["seed"], cls.method, "channels"))

    def forward(self, student: SegOutput, teacher: SegOutput, target: Tensor, step: int,
                generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """``generator`` differs between processes and is not used: the queues need the same draws on all of them."""
        check_maps(student.head, teacher.head, "cirkdv2")
        feature = student.head if self.gcn is None else self.gcn(student.head)
        shared = step_generator(target.device, self.seed, self.method, step)
        losses = {}
        if self.fit is not None:
            losses["cirkdv2_fitnet"] = self.fit(feature, teacher.head)
        if self.batch_options is not None:
            options = dict(self.batch_options)
            if min(feature.shape[-2:]) >= LARGE:
                options["pool"] = POOL
            losses["cirkdv2_batch"] = minibatch_pixel_loss(feature, teacher.head, **options)
        if self.memory is not None:
            found = self.memory(feature, teacher.head, target, generator=shared)
            losses.update({f"cirkdv2_{name}": value for name, value in found.items()})
        if self.channels is not None:
            found = self.channels(feature, teacher.head, generator=shared)
            losses.update({term: found[kind] for term, kind in CHANNEL_TERMS.items() if kind in found})
        return losses

    def unsynchronised(self) -> set[str]:
        return queue_names(self)

    def diagnostics(self) -> dict[str, Tensor]:
        """``pixel_queue_filled``, ``region_queue_filled``: share of the slots written since the start."""
        return queue_diagnostics(self.memory)
