"""CIRKDv2: CIRKD with relations of channels, and a context block on the student's side (technical report, 2025).

The channel terms treat each channel of the pooled head map as a vector over positions. ``cirkdv2_fitnet`` regresses the
teacher's head map from the student's behind a graph-convolution block (attention over all positions); when it is on,
every term sees the block's output. The pixel terms are those of CIRKD, under their own names because of that block.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses.core import Batch, Distiller, Needs, NetInfo, RunFacts, Term, memory, option, register
from losses.core.checks import at_least_float32, check_maps
from losses.core.feature_losses import CriterionFitNet
from losses.core.queues import FeatureQueue, draw_slots, gather_batch, queue_names
from losses.core.relations import grouped_relation_loss, minibatch_pixel_loss, queue_relation_loss
from utils.distributed import rank_and_world
from utils.errors import UserError
from utils.randomness import step_generator

POOL, UPDATE = 4, 256  #: average pooling before the channel relations, most channels that enter the queue in a step
LARGE = 256  #: head maps of at least this height and width are pooled before the pixel relations in the batch, by POOL


def _conv_bn_relu(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True))


class ContextBlock(nn.Module):
    """Attention over all positions, joined with its input by 1x1 convolutions: [B, C, h, w] -> the same shape. The
    attention map (h * w squared) is never kept. Raises UserError on a width below 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 2:
            raise UserError(f"cirkdv2: the student's head has {channels} channel, expected at least 2")
        half = channels // 2
        self.node_k, self.node_v, self.node_q = (nn.Conv2d(channels, half, 1, bias=False) for _ in range(3))
        self.conv1, self.out_conv = _conv_bn_relu(half, channels), _conv_bn_relu(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (node(x).flatten(2).transpose(1, 2).unsqueeze(1) for node in (self.node_q, self.node_k, self.node_v))
        context = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).unflatten(2, x.shape[-2:])
        return self.out_conv(torch.cat([x, self.conv1(context)], dim=1))


class ChannelRelations(nn.Module):
    """Relations of channels: in the batch, with a queue of the teacher's channels, and their squared error. size: of
    head maps, (h, w). queue: slots; contrast: those compared with in a step. terms: which of "batch", "memory", "mse"
    to compute; the queue is there for "memory" only. generator: source of the first queue contents, on the CPU. fast:
    the faster form of the relations. only_filled: compare with written slots only."""

    def __init__(self, student_channels: int, teacher_channels: int, size: tuple[int, int], queue: int,
                 contrast: int, terms: frozenset[str], group_size: int, tau: float, kd_tau: float,
                 dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None,
                 fast: bool = True, only_filled: bool = False) -> None:
        super().__init__()
        self.project_head = memory.projection(student_channels, teacher_channels)
        self.size, self.contrast, self.terms = tuple(size), contrast, terms
        self.group_size, self.tau, self.kd_tau, self.fast = group_size, tau, kd_tau, fast
        self.only_filled = only_filled
        self.channel = None
        if "memory" in terms:
            self.channel = FeatureQueue(queue, math.prod(-(-side // POOL) for side in size), None, dtype, generator)

    def forward(self, student: Tensor, teacher: Tensor, *, draws: tuple[Tensor, Tensor] | None = None,
                generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """{term: scalar} of maps [B, C, h, w] and [B, D, h, w], of the queue's size or UserError. draws: permutations
        of the B * D channels of all processes' images, the same on all of them, and of the slots, each process its own;
        default: of ``generator``, equally seeded on every process."""
        check_maps("cirkdv2", student, teacher)
        if self.channel is not None and tuple(student.shape[-2:]) != self.size:
            raise UserError(f"cirkdv2: the channel queue was made for {self.size[0]}x{self.size[1]} head maps, got "
                            f"{student.shape[-2]}x{student.shape[-1]}", settings=["crop_size"])
        maps = [F.avg_pool2d(at_least_float32(x), POOL, ceil_mode=True) for x in (student, teacher.detach())]
        s, t = (F.normalize(at_least_float32(x).flatten(2), dim=2) for x in (self.project_head(maps[0]), maps[1]))
        losses = {}
        if "batch" in self.terms:
            losses["batch"] = grouped_relation_loss(s, t, self.group_size, self.tau, self.fast)
        if "memory" in self.terms:
            losses["memory"] = self._memory(s, t, draws, generator)
        return losses | ({"mse": F.mse_loss(s, t)} if "mse" in self.terms else {})

    def _memory(self, student: Tensor, teacher: Tensor, draws: tuple[Tensor, Tensor] | None,
                generator: torch.Generator | None) -> Tensor:
        batch, channels, _ = teacher.shape
        if draws is None:
            count = rank_and_world()[1] * batch * channels
            draws = (torch.randperm(count, device=teacher.device, generator=generator),
                     draw_slots(self.channel.size, teacher.device, generator))
        rows = gather_batch(teacher).flatten(0, 1)[draws[0][:UPDATE]]
        self.channel.push(rows[None, None], draws[0].new_full((1, 1), len(rows)))
        vectors, usable = self.channel.sample(draws[1], self.contrast, self.only_filled)
        keys = vectors.to(student.dtype)
        weight = student.new_full((batch * channels,), self.kd_tau ** 2 / (batch * channels))
        return queue_relation_loss(student.flatten(0, 1), teacher.flatten(0, 1), keys, weight, self.tau * self.kd_tau,
                                   usable, self.fast)


CHANNEL_TERMS = {"cirkdv2_channel": "batch", "cirkdv2_channel_memory": "memory", "cirkdv2_channel_mse": "mse"}


def _published(fitnet: float) -> dict[str, float]:
    return {"lambda_kd": 1.0, "lambda_cirkdv2_fitnet": fitnet, "lambda_cirkdv2_batch": 1.0,
            "lambda_cirkdv2_pixel": 0.1, "lambda_cirkdv2_region": 0.1, "lambda_cirkdv2_channel": 1.0,
            "lambda_cirkdv2_channel_memory": 0.1, "lambda_cirkdv2_channel_mse": 100.0}


@dataclass(frozen=True)
class CIRKDv2Options(memory.RelationOptions):
    """The settings of CIRKD, which hold here too, and two of the channel queue."""
    cirkdv2_channel_queue: int = option(10000, "queued channels", at_least=UPDATE)  # at least what a step adds
    cirkdv2_channel_contrast: int = option(2048, "queued channels compared with in a step", at_least=1)


@register("cirkdv2")
class CIRKDv2(Distiller):
    """The head maps of both networks through the pixel terms of CIRKD, :class:`ChannelRelations` and FitNet, behind a
    :class:`ContextBlock` when ``cirkdv2_fitnet`` is on. Memory: the queues of CIRKD (0.43 GB for 19 classes, 3.4 GB for
    150, 4.1 GB for 182) and 10000 channels of ceil(h / 4) * ceil(w / 4) numbers (0.02 GB for 512x1024 crops)."""
    title = "CIRKD with channel relations and a context block; queues take 0.45 GB (19 classes) to 4.1 GB (182)"
    paper = "CIRKDv2, technical report of the CIRKD authors"
    year = 2025
    terms = (Term("cirkdv2_batch", 0.0, "weight of CIRKDv2's pixel relations between the images of a group"),
             Term("cirkdv2_pixel", 0.0, "weight of CIRKDv2's relations with queued pixels (0.39 GB for 19 classes, "
                                        "3-4 GB for 150 or more)", needs_labels=True),
             Term("cirkdv2_region", 0.0, "weight of CIRKDv2's relations with queued class means", needs_labels=True),
             Term("cirkdv2_channel", 0.0, "weight of CIRKDv2's channel relations between the images of a group"),
             Term("cirkdv2_channel_memory", 0.0, "weight of CIRKDv2's relations with queued channels"),
             Term("cirkdv2_channel_mse", 0.0, "weight of CIRKDv2's squared error between normalised channels"),
             Term("cirkdv2_fitnet", 0.0, "weight of CIRKDv2's feature regression; adds the context block in front of "
                                         "all its terms"))
    Options = CIRKDv2Options
    needs = memory.HEADS
    cost = "what CIRKD does, attention over all positions, relations between channels"
    # the released scripts, of ResNet-18 where they differ; their batch, learning rate, 80k iterations are not set
    preset = {"*": _published(10.0), "citys": _published(1.0), "ade20k": _published(1.0)}

    def __init__(self, options: CIRKDv2Options, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> None:
        """Raises UserError when a queue is too short, or the student's head too narrow for the context block."""
        super().__init__()
        o, widths = options, (student.channels["head"], teacher.channels["head"])
        self.gcn = self.fit = self.channels = None
        if "cirkdv2_fitnet" in run.active:
            self.gcn, self.fit = ContextBlock(widths[0]), CriterionFitNet(*widths, method=self.method)
        self.memory = memory.build_memory(self.method, o, run, student, teacher)
        kinds = frozenset(kind for term, kind in CHANNEL_TERMS.items() if term in run.active)
        if kinds:
            size = tuple(-(-side // student.stride_of("head")) for side in run.crop_size)
            self.channels = ChannelRelations(
                *widths, size, o.cirkdv2_channel_queue, o.cirkdv2_channel_contrast, kinds, run.group_size, o.cirkd_tau,
                o.cirkd_kd_tau, o.queue_dtype, step_generator(torch.device("cpu"), run.seed, self.method, "channels"),
                run.fast, o.cirkd_only_filled)
        self.batch_options, self.seed = memory.build_batch(self.method, o, run), run.seed
        self.whole_batch = bool(queue_names(self))

    @classmethod
    def requires(cls, options: CIRKDv2Options, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> Needs:
        return memory.relation_needs(cls.method, options, run)

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """``generator`` differs between processes and is not used: what enters the queues has to be the same on all of
        them. (The slots that they compare with are not: ``draw_slots``.)"""
        student, teacher = batch.student.head, batch.teacher.head
        check_maps("cirkdv2", student, teacher)
        if self.gcn is not None:
            student = self.gcn(student)
        shared = step_generator(batch.target.device, self.seed, self.method, batch.step)
        losses = {} if self.fit is None else {"cirkdv2_fitnet": self.fit(student, teacher)}
        if self.batch_options is not None:
            least = POOL if min(student.shape[-2:]) >= LARGE else 1
            options = self.batch_options | {"pool": max(self.batch_options["pool"], least)}
            losses["cirkdv2_batch"] = minibatch_pixel_loss(student, teacher, **options)
        if self.memory is not None:
            labeled = slice(batch.labeled)
            queued = self.memory(student[labeled], teacher[labeled], batch.target[labeled], generator=shared)
            losses |= {f"cirkdv2_{name}": value for name, value in queued.items()}
        if self.channels is not None:
            channels = self.channels(student, teacher, generator=shared)
            losses |= {term: channels[kind] for term, kind in CHANNEL_TERMS.items() if kind in channels}
        return losses

    def unsynchronized(self) -> set[str]:
        return queue_names(self)

    def diagnostics(self) -> dict[str, Tensor]:
        """``pixel_queue_filled``, ``region_queue_filled``: share of the slots written since the start."""
        return memory.queue_diagnostics(self.memory)
