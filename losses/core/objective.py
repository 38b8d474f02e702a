"""Combining methods: which ones a run uses, and the whole training objective as one module."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from losses.core.distiller import Distiller, methods
from losses.core.facts import Batch, NetInfo, RunFacts
from losses.core.needs import check_needs
from losses.core.task import SegCrossEntropyLoss, task_loss
from models.output import SegOutput
from utils.options import OptionGroup


def active_methods(terms: Mapping[str, float]) -> dict[str, type[Distiller]]:
    """The methods of which any term is among those given, by name."""
    return {name: cls for name, cls in methods().items() if any(t.name in terms for t in cls.terms)}


def build_distillers(options: Mapping[str, OptionGroup], run: RunFacts, student: NetInfo,
                     teacher: NetInfo | None) -> nn.ModuleDict:
    """The methods with an active term, by name; UserError, before any is built, when a requirement is not met."""
    active = active_methods(run.active)
    for name, cls in active.items():
        check_needs(name, cls.requires(options[name], run, student, teacher), student, teacher, run.crop_size)
    return nn.ModuleDict({name: cls.build(options[name], run, student, teacher) for name, cls in active.items()})


def taps_of_teacher(options: Mapping[str, OptionGroup], run: RunFacts, student: NetInfo, teacher: NetInfo) -> set[str]:
    """The fields of the teacher's ``SegOutput`` that any method of the run reads."""
    return {tap for name, cls in active_methods(run.active).items()
            for tap in cls.requires(options[name], run, student, teacher).teacher}


class Objective(nn.Module):
    """Student and distillers together: the one module that DDP wraps and that the optimizer trains.

    student: returns ``SegOutput``. distillers: by method. weights: {term that counts: lambda}. aux_weight: of the cross
    entropy of the auxiliary logits (0.4 in the published runs). group_size: images over whose labeled pixels the cross
    entropies are averaged, 0 = all. criterion: these cross entropies, default :class:`SegCrossEntropyLoss`. plain_maps:
    methods get the maps of both networks in the order of their dimensions, however the networks lay them out."""
    plain_maps = False

    def __init__(self, student: nn.Module, distillers: Mapping[str, Distiller], weights: Mapping[str, float],
                 aux_weight: float = 0.4, ignore_label: int = -1, group_size: int = 0,
                 criterion: nn.Module | None = None) -> None:
        super().__init__()
        self.student = student
        self.distillers = nn.ModuleDict(distillers)
        self.criterion = criterion or SegCrossEntropyLoss(ignore_label, group_size)
        self.weights = {"task": 1.0, "aux": aux_weight, **weights}

    def forward(self, images: Tensor, teacher: SegOutput | None, target: Tensor, step: int,
                generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """{term: unweighted scalar}: task, aux (if the student has that head), methods'. See :class:`Batch`."""
        student = self.run_student(images)
        if self.plain_maps:
            student, teacher = (maps and SegOutput(*(None if x is None else x.contiguous() for x in maps))
                                for maps in (student, teacher))
        batch = Batch(student, teacher, target, images, step)
        terms = task_loss(batch.student, target, self.criterion)
        for distiller in self.distillers.values():
            terms.update({name: value for name, value in distiller(batch, generator).items() if self.weights.get(name)})
        return terms

    def run_student(self, images: Tensor) -> SegOutput:
        """The student's forward pass. It may be replaced by a compiled one."""
        return self.student(images)

    def unsynchronized(self) -> list[str]:
        """Names of the parameters and buffers that DDP leaves alone."""
        return [f"distillers.{m}.{n}" for m, d in self.distillers.items() for n in sorted(d.unsynchronized())]

    def after_step(self, step: int) -> None:
        """The distillers' own updates after the student's optimizer step."""
        for distiller in self.distillers.values():
            distiller.after_step(step)

    def task_scale(self, step: int) -> float:
        """Factor on the cross entropy of the main logits in this step: 1 unless a method scales it."""
        scale = 1.0
        for distiller in self.distillers.values():
            share = sum(self.weights.get(t.name, 0.0) for t in distiller.terms if t.scales_task)
            scale *= 1.0 + share * (distiller.task_scale(step) - 1.0)
        return scale

    def weighted(self, terms: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """{term: lambda * term} for the terms of one forward pass."""
        weights = {**self.weights, "task": self.weights["task"] * self.task_scale(step)}
        return {name: value * weights[name] for name, value in terms.items()}

    def diagnostics(self) -> dict[str, Tensor]:
        """The distillers' diagnostics of the last forward pass, as ``method/name``."""
        return {f"{m}/{k}": v for m, d in self.distillers.items() for k, v in d.diagnostics().items()}
