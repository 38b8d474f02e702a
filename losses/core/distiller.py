"""The interface of a distillation method, and the registry that finds them.

A method is one file in ``losses/``: a pure loss function, and a :class:`Distiller` beside it, decorated with
:func:`register`, that owns the trainable extras (aligners, projectors, queues) and says what it needs of the networks.
"""
from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from losses.core.facts import Batch, NetInfo, Preparation, RunFacts
from losses.core.needs import Needs
from models.output import SegOutput
from utils.errors import UserError
from utils.options import OptionGroup

#: channels and stride of the published teachers' maps, those of ResNet-101: what a term may be a sum over
PUBLISHED_MAPS = {"c1": (256, 4), "c2": (512, 8), "c3": (1024, 8), "c4": (2048, 8)}


@dataclass(frozen=True)
class Term:
    """One scalar that a method adds to the loss. weight: the default of the setting ``lambda_NAME``. scales_task: it is
    no scalar; its weight, at most 1, says how far the method's :meth:`Distiller.task_scale` holds for the cross
    entropy. sum_over: the tap of the teacher, c1 to c4, over whose channels and positions it is a sum. of_unit_maps:
    the tap of the teacher over whose positions it is a mean, of maps at unit length, so that it shrinks with their
    number. needs_labels: it is of labeled images alone; ``forward`` of a method that has other terms too takes them
    from ``Batch.with_labels``."""
    name: str
    weight: float
    help: str
    scales_task: bool = False
    sum_over: str | None = None
    of_unit_maps: str | None = None
    needs_labels: bool = False

    def __post_init__(self) -> None:
        if self.sum_over is not None and self.sum_over not in PUBLISHED_MAPS:
            raise ValueError(f"term {self.name!r}: sum_over {self.sum_over!r}; expected one of "
                             f"{', '.join(PUBLISHED_MAPS)}, whose size in published runs is known")
        if self.of_unit_maps is not None and self.of_unit_maps not in SegOutput._fields:
            raise ValueError(f"term {self.name!r}: of_unit_maps {self.of_unit_maps!r}; expected one of "
                             f"{', '.join(SegOutput._fields)}")

    @property
    def depends_on_map(self) -> bool:
        """Whether its size depends on that of the map, so that a weight belongs to one size."""
        return bool(self.sum_over or self.of_unit_maps)

    @property
    def setting(self) -> str:
        """Name of its weight among the settings."""
        return f"lambda_{self.name}"


class Distiller(nn.Module):
    """Base class of every method. Its state_dict must be complete: queues, counters, masks, and (through
    ``get_extra_state``) the optimizer of a discriminator, so that a resumed run is the same run.

    Class attributes
        method   registry name (set by :func:`register`); title, paper, year, cost: for the list of methods; cost says
                 in a short phrase what it computes beyond the two networks
        Options  the method's own settings (not the weights of its terms), see ``utils/options.py``
        terms    the :class:`Term` objects that ``forward`` may return; an instance has fewer where the networks lack
                 what one reads
        needs    what it reads of the networks and expects of them; :meth:`requires` where this depends on the options
        preset   published settings, applied when the method is chosen: {key: {setting: value}}. A key is "*" (always),
                 "*/BACKBONE" (of the student, without a width suffix), "DATASET" or "DATASET/BACKBONE"; of two keys
                 that set the same, the later one in this order wins
        rows     like preset, with "DATASET/MODEL-BACKBONE" as the most specific key: what only the scripts of the
                 published rows set, such as a defect that the figure was made with, or when to validate
        published_crop  crop that the weights of ``preset`` belong to, for terms whose size depends on that of the map:
                 {data set or "*": (height, width)}; output stride 8, teacher ResNet-101 (``engine/weights.py``)
        dataset_options   own options that hold on a data set whatever was asked for, {data set: {option: value}}
        clip_norm  largest L2 norm of the gradient of the method's own parameters, None = not clipped
        trial    settings that make a trial of a few steps cheap (a short stage before training), for tests, benchmark
        whole_batch  it needs all images of a step in one call: a step cannot go through the batch part by part
        stage_options  settings that only ``prepare`` and the reading of files depend on, not the steps after it
    """
    method: str = ""
    title: str = ""
    paper: str = ""
    year: int = 0
    Options: type[OptionGroup] = OptionGroup
    terms: tuple[Term, ...] = ()
    needs: Needs = Needs()
    preset: Mapping[str, Mapping[str, object]] = {}
    rows: Mapping[str, Mapping[str, object]] = {}
    published_crop: Mapping[str, tuple[int, int]] = {"*": (512, 1024)}
    dataset_options: Mapping[str, Mapping[str, object]] = {}
    clip_norm: float | None = None
    cost: str = ""
    trial: Mapping[str, object] = {}
    stage_options: tuple[str, ...] = ()
    whole_batch: bool = False

    def __init__(self, options: OptionGroup | None = None, run: RunFacts | None = None,
                 student: NetInfo | None = None, teacher: NetInfo | None = None) -> None:
        super().__init__()

    @classmethod
    def requires(cls, options: OptionGroup, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> Needs:
        """What it needs with these options. The networks are given since they may lack a tap that is optional."""
        return cls.needs

    @classmethod
    def build(cls, options: OptionGroup, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> Distiller:
        """Make the method when its needs have been checked; never from a dummy forward."""
        return cls(options, run, student, teacher)

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return {term name: unweighted scalar}. generator: source of random numbers, on the tensors' device."""
        raise NotImplementedError

    def task_scale(self, step: int) -> float:
        """Factor on the cross entropy of the main logits, for a method with a term that ``scales_task``."""
        return 1.0

    def diagnostics(self) -> dict[str, Tensor]:
        """Scalars of the last ``forward`` worth logging beside the losses (asked for on logged iterations only)."""
        return {}

    def unsynchronized(self) -> set[str]:
        """Names (as in ``state_dict``) of own parameters and buffers that the main optimizer and DDP leave alone: a
        discriminator with its own optimizer, queues that every process fills in the same way."""
        return set()

    def trained_parameters(self) -> list[nn.Parameter]:
        """Own parameters for the student's optimizer, at its learning rate and weight decay."""
        skip = self.unsynchronized()
        return [p for name, p in self.named_parameters() if p.requires_grad and name not in skip]

    def prepare(self, stage: Preparation) -> None:
        """A stage of its own before training (learning masks, prompts); called once, and not on a resumed run."""

    def after_step(self, step: int) -> None:
        """A discriminator's own step, on every process, after the main one. ``forward`` keeps, detached, what it takes;
        ``utils.distributed.average_gradients`` has to average the gradients of :meth:`unsynchronized` parameters."""


_REGISTRY: dict[str, type[Distiller]] = {}


def register(name: str):
    """Class decorator: make a :class:`Distiller` known under a name. UserError when another class has that name, or a
    term of the same name."""
    def wrap(cls: type[Distiller]) -> type[Distiller]:
        if (other := where(_REGISTRY.get(name, cls))) != where(cls):
            raise UserError(f"method {name!r} is registered twice, as {other} and as {where(cls)}: expected another "
                            "name for one of them and for its terms")
        taken = {t.name: m for m, c in _REGISTRY.items() if m != name for t in c.terms}
        for term in cls.terms:
            if term.name in taken:
                raise UserError(f"term {term.name!r} of method {name!r}, {where(cls)}, already belongs to "
                                f"{taken[term.name]!r}: expected another name")
        cls.method = name
        _REGISTRY[name] = cls
        return cls
    return wrap


def where(cls: type) -> str:
    """FILE:CLASS, or MODULE:CLASS without a file: the same again when the file is loaded once more, under whatever
    name, as one that is run and then imported."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return f"{os.path.realpath(file) if file else cls.__module__}:{cls.__qualname__}"


@cache
def _files(*folders: str) -> list[str]:
    """Names of the modules in these folders; a command line asks some thirty times."""
    return sorted(module.name for module in pkgutil.iter_modules(folders) if not module.ispkg)


def methods() -> dict[str, type[Distiller]]:
    """Every registered method, by name. Imports each file of ``losses/`` once, so that its decorator runs."""
    package = importlib.import_module("..", __package__)
    for name in _files(*package.__path__):
        importlib.import_module(f"{package.__name__}.{name}")
    return dict(sorted(_REGISTRY.items()))
