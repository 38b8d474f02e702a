"""Combining methods: which ones a run uses, and the whole training objective as one module."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from losses.core.common import CommonClasses, reads_scores
from losses.core.distiller import Distiller, methods
from losses.core.facts import Batch, NetInfo, RunFacts
from losses.core.needs import Needs, check_needs, taps_to_resize
from losses.core.task import SegCrossEntropyLoss, task_loss
from models.heads import resize
from models.output import SegOutput
from utils.errors import UserError
from utils.options import OptionGroup


class View(NamedTuple):
    """What a method sees of a run. student: with maps of the size and classes that it gets. resized: the student's maps
    that are brought to the teacher's size. narrowed: whether it sees the common classes alone."""
    needs: Needs
    run: RunFacts
    student: NetInfo
    resized: tuple[str, ...]
    narrowed: bool


def active_methods(terms: Mapping[str, float]) -> dict[str, type[Distiller]]:
    """The methods of which any term is among those given, by name."""
    return {name: cls for name, cls in methods().items() if any(t.name in terms for t in cls.terms)}


def build_distillers(options: Mapping[str, OptionGroup], run: RunFacts, student: NetInfo,
                     teacher: NetInfo | None) -> nn.ModuleDict:
    """The methods with an active term, by name; UserError, before any is built, when a requirement is not met."""
    active, seen = active_methods(run.active), views(options, run, student, teacher)
    for name, view in seen.items():
        if view.narrowed and len(run.common) < 2:
            raise UserError(f"method {name!r} compares scores of classes, but teacher and data set have only one in "
                            "common: expected two or more", settings=["teacher_classes"])
        check_needs(name, view.needs, view.student, teacher, run.crop_size,
                    [term.setting for term in active[name].terms if term.name in run.active])
    return nn.ModuleDict({name: cls.build(options[name], seen[name].run, seen[name].student, teacher)
                          for name, cls in active.items()})


def views(options: Mapping[str, OptionGroup], run: RunFacts, student: NetInfo,
          teacher: NetInfo | None) -> dict[str, View]:
    """{method with an active term: what it sees}."""
    return {name: _view(cls.requires(options[name], run, student, teacher), run, student, teacher)
            for name, cls in active_methods(run.active).items()}


def _view(needs: Needs, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> View:
    resized = taps_to_resize(needs, student, teacher)
    narrowed = run.common is not None and reads_scores(needs)
    if resized:
        student = student.resized(teacher, resized)
    if narrowed:
        run, student = replace(run, num_class=len(run.common)), student.of_classes(len(run.common))
    return View(needs, run, student, resized, narrowed)


def taps_of_teacher(options: Mapping[str, OptionGroup], run: RunFacts, student: NetInfo, teacher: NetInfo) -> set[str]:
    """The fields of the teacher's ``SegOutput`` that any method of the run reads."""
    return {tap for name, cls in active_methods(run.active).items()
            for tap in cls.requires(options[name], run, student, teacher).teacher}


def resize_maps(student: SegOutput, teacher: SegOutput | None, taps: Iterable[str]) -> SegOutput:
    """The student's output with the maps at ``taps`` in the size of the teacher's; those that have it stay."""
    sizes = {tap: getattr(teacher, tap).shape[2:] for tap in taps}
    return student._replace(**{tap: resize(getattr(student, tap), size) for tap, size in sizes.items()
                               if getattr(student, tap).shape[2:] != size})


class Objective(nn.Module):
    """Student and distillers together: the one module that DDP wraps and that the optimizer trains.

    student: returns ``SegOutput``. distillers: by method. weights: {term that counts: lambda}. aux_weight: of the cross
    entropy of the auxiliary logits (0.4 in the published runs). group_size: images over whose labeled pixels the cross
    entropies are averaged, 0 = all. criterion: these cross entropies, default :class:`SegCrossEntropyLoss`. plain_maps:
    methods get the maps of both networks in the order of their dimensions, however the networks lay them out. resized:
    {method: the student's maps that it gets at the teacher's size}. common: what makes the scores and labels of the
    classes that the teacher scores, None when it scores all; narrowed: methods that get those alone.
    images_without_labels: so many of a batch, the last ones; terms that need labels are of the others."""
    plain_maps = False

    def __init__(self, student: nn.Module, distillers: Mapping[str, Distiller], weights: Mapping[str, float],
                 aux_weight: float = 0.4, ignore_label: int = -1, group_size: int = 0,
                 criterion: nn.Module | None = None, resized: Mapping[str, tuple[str, ...]] | None = None,
                 common: CommonClasses | None = None, narrowed: Iterable[str] = (),
                 images_without_labels: int = 0) -> None:
        super().__init__()
        self.student = student
        self.distillers = nn.ModuleDict(distillers)
        self.criterion = criterion or SegCrossEntropyLoss(ignore_label, group_size)
        self.weights = {"task": 1.0, "aux": aux_weight, **weights}
        self.resized, self.images_without_labels = dict(resized or {}), images_without_labels
        self.common, self.narrowed = common, frozenset(narrowed)

    def forward(self, images: Tensor, teacher: SegOutput | None, target: Tensor, step: int,
                generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """{term: unweighted scalar}: task, aux (if the student has that head), methods'. See :class:`Batch`."""
        student = self.run_student(images)
        if self.plain_maps:
            student, teacher = (maps and SegOutput(*(None if x is None else x.contiguous() for x in maps))
                                for maps in (student, teacher))
        with_labels = len(images) - self.images_without_labels if self.images_without_labels else None
        batch = Batch(student, teacher, target, images, step, with_labels)
        labeled = batch.with_labels()
        terms = task_loss(labeled.student, labeled.target, self.criterion)
        for name, distiller in self.distillers.items():
            seen = batch if self.reads_unlabeled(distiller) else labeled
            if name in self.narrowed:
                seen = seen._replace(student=self.common.scores(seen.student), target=self.common.labels(seen.target))
            seen = seen._replace(student=resize_maps(seen.student, seen.teacher, self.resized.get(name, ())))
            terms.update(self.terms_that_count(name, distiller, distiller(seen, generator)))
        return terms

    def terms_that_count(self, name: str, distiller: Distiller, returned: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a method has returned, without the terms whose weight is 0. UserError when a term is missing or unknown,
        or is no scalar: a term that is misspelt would else not be trained, and nobody told."""
        expected = {t.name for t in distiller.terms if self.weights.get(t.name) and not t.scales_task}
        counted = {term: value for term, value in returned.items() if self.weights.get(term)}
        known = {t.name for t in distiller.terms}
        if unknown := returned.keys() - known:
            raise UserError(f"method {name!r} returned {', '.join(sorted(unknown))}, which is none of its terms: "
                            f"expected {', '.join(sorted(known))}")
        if missing := expected - counted.keys():
            raise UserError(f"method {name!r} did not return {', '.join(sorted(missing))}: expected every term with a "
                            f"weight; it returned {', '.join(returned) or 'nothing'}")
        for term, value in counted.items():
            if value.dim():
                raise UserError(f"method {name!r} returned {term} of shape {list(value.shape)}: expected a scalar")
        return counted

    def reads_unlabeled(self, distiller: Distiller) -> bool:
        """Whether a method has a term that counts and does without labels."""
        return any(self.weights.get(t.name) and not t.needs_labels for t in distiller.terms)

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
