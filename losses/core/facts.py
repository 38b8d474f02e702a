"""What a method is given: facts of the run and of the networks, a batch, the means for a stage before training."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.output import CLASS_TAPS, SegOutput
from models.preprocess import CAFFE_BGR, Preprocess
from models.registry import NetworkChoice


@dataclass(frozen=True)
class NetInfo:
    """What a method may know about a network without running it. channels: per tap; stride: of its output; strides: of
    taps, where they differ from it; takes_taps: whether the user may name more taps."""
    name: str
    channels: Mapping[str, int]
    num_class: int
    stride: int = 8
    preprocess: Preprocess = CAFFE_BGR
    strides: Mapping[str, int] = field(default_factory=dict)
    takes_taps: bool = False

    @classmethod
    def of(cls, net: nn.Module) -> NetInfo:
        """The description of a network of ``models/``."""
        return cls(net.name, dict(net.channels), net.num_class, net.output_stride, net.preprocess, dict(net.strides),
                   getattr(net, "takes_taps", False))

    def stride_of(self, tap: str) -> int:
        """The stride of a tap's map, in pixels of the image."""
        return self.strides.get(tap, self.stride)

    def resized(self, teacher: NetInfo, taps: Iterable[str]) -> NetInfo:
        """The student as a method sees it when the maps at ``taps`` are brought to the size of the teacher's."""
        return replace(self, strides={**self.strides, **{tap: teacher.stride_of(tap) for tap in taps}})

    def of_classes(self, count: int) -> NetInfo:
        """The network as a method sees it that gets the scores of ``count`` of its classes."""
        return replace(self, num_class=count, channels={
            tap: count if tap in CLASS_TAPS else channels for tap, channels in self.channels.items()})


@dataclass(frozen=True)
class RunFacts:
    """What a method may know about a run; settings have their defaults in ``engine/settings.py``.

    active: the terms with a non-zero weight, {name: weight}; a method neither builds nor computes what only others
    need. group_size: images whose statistics go together (0 = all of the process). compat: "fixed", or "reference" for
    released code with its known defects. resumed: a training state will be loaded over what is built, so weight files
    need not be read. student: where it comes from, for a method that builds a network like it. fast: whether
    the faster forms of a method are wanted, which equal their plain twins up to rounding. common: the classes that the
    teacher scores, None for all; a method that reads its scores is told the number of those as ``num_class``."""
    num_class: int
    ignore_label: int
    crop_size: tuple[int, int]
    active: Mapping[str, float]
    group_size: int
    compat: str
    seed: int
    batch_size: int
    max_iterations: int
    lr: float
    poly_power: float
    momentum: float
    weight_decay: float
    sync_bn: bool
    sampling: str
    save_per_iters: int
    student: NetworkChoice
    resumed: bool = False
    fast: bool = True
    common: tuple[int, ...] | None = None

    @property
    def as_released(self) -> bool:
        """Whether known defects of released code are wanted."""
        return self.compat == "reference"


class Batch(NamedTuple):
    """One step's input of a method. teacher: without a graph; None when no method of the run reads one. target: int64
    [B, H, W] at crop size. images: the student's, float [B, 3, H, W]. step: iterations done so far. labeled: so many
    images, the first ones, have labels; None = all. Where the teacher does not score every class, a method that reads
    its scores gets the student's scores, and the labels, of the common classes, numbered anew
    (``losses/core/common.py``)."""
    student: SegOutput
    teacher: SegOutput | None
    target: Tensor
    images: Tensor
    step: int
    labeled: int | None = None

    def with_labels(self) -> Batch:
        """The images that have labels, as a batch: what a term that needs labels reads."""
        if self.labeled is None:
            return self
        first = slice(self.labeled)
        student, teacher = (maps and SegOutput(*(None if x is None else x[first] for x in maps))
                            for maps in (self.student, self.teacher))
        return Batch(student, teacher, self.target[first], self.images[first], self.step)


@dataclass(frozen=True)
class Preparation:
    """What a stage before training may use (see ``Distiller.prepare``).

    student: as it is before training. teacher: None when no method reads one. batches(steps, batch_size, start, role):
    iterator of (images float [B, 3, H, W] on the device, as the "teacher" or the "student" wants them, or with "both"
    the pair (student's, teacher's); target int64 [B, H, W], as the "teacher" of the classes that it scores) for the
    steps from ``start`` on, the same whatever the number of processes; each process gets its share. directory: where
    the main process caches the result. log: takes one line of text. data: what tells the training set from others;
    images: how many it has."""
    student: nn.Module
    teacher: nn.Module | None
    device: torch.device
    directory: Path
    is_main_process: bool
    batches: Callable[[int, int, int, str], Iterator[tuple[Tensor | tuple[Tensor, Tensor], Tensor]]]
    log: Callable[[str], None]
    data: str
    images: int
