"""The interface of a distillation method, and the registry that finds them.

A method is one file in this folder: a pure loss function, and a :class:`Distiller` beside it that owns the trainable
extras (aligners, projectors, queues) and says which named tensors it wants from either network. Decorate the class
with :func:`register`; nothing else has to be edited.
"""
from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from models.preprocess import CAFFE_BGR, Preprocess
from utils.errors import UserError


@dataclass(frozen=True)
class Term:
    """One scalar that a method adds to the loss: its name, default weight and a line for ``--help``.

    ``Term("fd", 4e-5, ...)`` becomes the flag ``--lambda-fd``; underscores in the name become dashes in the flag.
    """

    name: str
    weight: float
    help: str

    @property
    def dest(self) -> str:
        return f"lambda_{self.name}"

    @property
    def flag(self) -> str:
        return "--" + self.dest.replace("_", "-")


@dataclass(frozen=True)
class NetInfo:
    """What a method may know about a network without running it: channels per tap, class count, output stride, and the
    preprocessing of its images."""

    name: str
    channels: Mapping[str, int]
    num_class: int
    stride: int = 8
    preprocess: Preprocess = CAFFE_BGR


@dataclass(frozen=True)
class BuildContext:
    """Everything a distiller is built from.

    teacher: None when only methods run that read none (``teacher_taps = ()``). options: the parsed command line (see
    ``Distiller.add_arguments``). active: the terms with a non-zero weight; a method neither builds nor computes what
    only the others need. resumed: a training state will be loaded over what is built, so that weight files need not be
    read.
    """

    student: NetInfo
    teacher: NetInfo | None
    num_class: int
    ignore_label: int = -1
    active: frozenset[str] = frozenset()
    crop_size: tuple[int, int] = (512, 1024)
    dataset: str = "citys"
    options: argparse.Namespace = field(default_factory=argparse.Namespace)
    resumed: bool = False


@dataclass(frozen=True)
class Preparation:
    """What a stage before training may use (see ``Distiller.prepare``).

    teacher: None when no method reads one. batches(steps, batch_size, start, role): iterator of (images float
    [B, 3, H, W] on the device, as the "teacher" or the "student" wants them, or with "both" the pair (student's,
    teacher's); target int64 [B, H, W]) for the steps from ``start`` on, the same whatever the number of processes; each
    process gets its share. directory: where to cache the result; only the main process writes. log: takes one line of
    text. data: what tells the training set from others; images: how many it has. student: as it is before training.
    """

    teacher: nn.Module | None
    device: torch.device
    directory: Path
    is_main: bool
    batches: Callable[[int, int, int, str], Iterator[tuple[Tensor | tuple[Tensor, Tensor], Tensor]]]
    log: Callable[[str], None]
    data: str = ""
    images: int = 0
    student: nn.Module | None = None


class Distiller(nn.Module):
    """Base class of every method. Its state_dict must be complete: queues, counters, masks, and (through
    ``get_extra_state``) the optimizer of a discriminator, so that a resumed run is the same run.

    Class attributes
        method   registry name (set by :func:`register`)
        title, paper, year   for ``--list-methods``
        terms    the :class:`Term` objects that ``forward`` may return
        student_taps, teacher_taps   fields of ``SegOutput`` that the method reads; a class without any of the teacher
                 needs no teacher
        uses_images  forward gets the student's images as the keyword argument ``images`` (float [B, 3, H, W])
        preset   published settings, applied by ``--method NAME``: {key: {option name: value}}. A key is "*" (always),
                 "*/BACKBONE" (of the student, without a width suffix), "DATASET" or "DATASET/BACKBONE"; of two keys
                 that set an option the later one in this order wins
        clip_norm  largest L2 norm of the gradient of the method's own parameters, None = not clipped
        cost     what it computes beyond the two networks, in a short phrase, for ``--list-methods``
        quick    options that make a trial of a few steps cheap (a short preparation), for the tests and the benchmark
        stage_options  options that only ``prepare`` and the reading of files depend on, not the steps after it
    """

    method: str = ""
    title: str = ""
    paper: str = ""
    year: int = 0
    terms: tuple[Term, ...] = ()
    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()
    uses_images: bool = False
    preset: Mapping[str, Mapping[str, object]] = {}
    clip_norm: float | None = None
    cost: str = ""
    quick: Mapping[str, object] = {}
    stage_options: tuple[str, ...] = ()

    @classmethod
    def add_arguments(cls, group: argparse._ArgumentGroup) -> None:
        """Add the method's own options (not the ``--lambda-*``, which come from ``terms``)."""

    @classmethod
    def build(cls, context: BuildContext) -> Distiller:
        """Make the method from channel counts, class count and options; never from a dummy forward."""
        raise NotImplementedError

    def forward(self, student, teacher, target: Tensor, step: int,
                generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return {term name: unweighted scalar}.

        student, teacher: ``SegOutput``; the teacher's tensors carry no graph (None when no method needs a teacher).
        target: int64 [B, H, W] at crop size. step: iterations done so far. generator: source of the method's random
        numbers, on the tensors' device.
        """
        raise NotImplementedError

    def diagnostics(self) -> dict[str, Tensor]:
        """Scalars of the last ``forward`` worth logging beside the losses (asked for on logged iterations only)."""
        return {}

    def unsynchronised(self) -> set[str]:
        """Names (as in ``state_dict``) of own parameters and buffers that the main optimizer and DDP leave alone:
        a discriminator with its own optimizer, queues that every process fills in the same way."""
        return set()

    def trained_parameters(self) -> list[nn.Parameter]:
        """Own parameters for the student's optimizer, at its learning rate and weight decay."""
        skip = self.unsynchronised()
        return [p for name, p in self.named_parameters() if p.requires_grad and name not in skip]

    def prepare(self, stage: Preparation) -> None:
        """A stage of its own before training (learning masks, prompts); called once, and not on a resumed run."""

    def after_step(self, step: int) -> None:
        """Called after the student's optimizer step, on every process: the place for a discriminator's own step.

        ``forward`` keeps (detached) what it needs. Gradients of :meth:`unsynchronised` parameters have to be averaged
        with ``utils.distributed.average_gradients``.
        """


_REGISTRY: dict[str, type[Distiller]] = {}


def register(name: str):
    """Class decorator: make a :class:`Distiller` known under ``--method name``."""

    def wrap(cls: type[Distiller]) -> type[Distiller]:
        if name in _REGISTRY and _REGISTRY[name].__qualname__ != cls.__qualname__:
            raise ValueError(f"method {name!r} is registered twice: {_REGISTRY[name]} and {cls}")
        taken = {t.name: m for m, c in _REGISTRY.items() if m != name for t in c.terms}
        for term in cls.terms:
            if term.name in taken:
                raise ValueError(f"term {term.name!r} of method {name!r} already belongs to {taken[term.name]!r}")
        cls.method = name
        _REGISTRY[name] = cls
        return cls

    return wrap


def methods() -> dict[str, type[Distiller]]:
    """Every registered method, by name. Imports each file of this folder once, so that its decorator runs."""
    package = importlib.import_module("losses")
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
        importlib.import_module(f"losses.{module}")
    return dict(sorted(_REGISTRY.items()))


def check_taps(distiller: Distiller, student: NetInfo, teacher: NetInfo | None) -> None:
    """Raise :class:`UserError` when there is no network, or it lacks a tensor that the method wants."""
    for role, net, taps in (("student", student, distiller.student_taps), ("teacher", teacher, distiller.teacher_taps)):
        if taps and net is None:
            raise UserError(f"method {distiller.method!r} needs a {role}: it reads {', '.join(taps)} of it, "
                            f"but there is none")
        missing = [t for t in taps if t not in net.channels]
        if missing:
            raise UserError(f"method {distiller.method!r} needs {', '.join(missing)} of the {role}, "
                            f"but {net.name} offers only {', '.join(net.channels)}")
