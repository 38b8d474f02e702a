"""Combining methods: which ones a run uses, and the whole training objective as one module."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from losses.distiller import BuildContext, Distiller, check_taps, methods
from losses.task import SegCrossEntropyLoss, task_loss


def term_weights(options) -> dict[str, float]:
    """{term name: lambda} of every registered term, from the parsed ``--lambda-*`` options."""
    return {t.name: float(getattr(options, t.dest, 0.0)) for cls in methods().values() for t in cls.terms}


def active_terms(options) -> frozenset[str]:
    """Names of the terms with a non-zero weight."""
    return frozenset(name for name, weight in term_weights(options).items() if weight)


def build_distillers(context: BuildContext) -> nn.ModuleDict:
    """The methods with at least one active term, by name, checked against the taps of both networks."""
    active = nn.ModuleDict()
    for name, cls in methods().items():
        if any(t.name in context.active for t in cls.terms):
            distiller = cls.build(context)
            check_taps(distiller, context.student, context.teacher)
            active[name] = distiller
    return active


class Objective(nn.Module):
    """Student and distillers together: the one module that DDP wraps and that the optimizer trains.

    student: network returning ``SegOutput``. distillers: name -> :class:`Distiller`. weights: term name -> lambda.
    aux_weight: weight of the cross entropy of the auxiliary logits (0.4 in the published runs). group_size: images over
    whose labelled pixels the cross entropies are averaged, 0 = all (:func:`losses.task.image_weights`).
    """

    def __init__(self, student: nn.Module, distillers: Mapping[str, Distiller], weights: Mapping[str, float],
                 aux_weight: float = 0.4, ignore_label: int = -1, group_size: int = 0) -> None:
        super().__init__()
        self.student = student
        self.distillers = nn.ModuleDict(distillers)
        self.criterion = SegCrossEntropyLoss(ignore_label, group_size)
        self.weights = {"task": 1.0, "aux": aux_weight, **weights}

    def forward(self, images: Tensor, teacher, target: Tensor, step: int,
                generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return {term: unweighted scalar}: task, aux (when the student has an auxiliary head), distillation terms.

        images: float [B, 3, H, W]; teacher: ``SegOutput`` without graph or None; target: int64 [B, H, W].
        """
        output = self.student(images)
        terms = task_loss(output, target, self.criterion)
        for distiller in self.distillers.values():
            more = {"images": images} if distiller.uses_images else {}
            found = distiller(output, teacher, target, step, generator, **more)
            terms.update({name: value for name, value in found.items() if self.weights[name]})
        return terms

    def unsynchronised(self) -> list[str]:
        """Names of the parameters and buffers that DDP leaves alone."""
        return [f"distillers.{m}.{n}" for m, d in self.distillers.items() for n in sorted(d.unsynchronised())]

    def after_step(self, step: int) -> None:
        """The distillers' own updates after the student's optimizer step."""
        for distiller in self.distillers.values():
            distiller.after_step(step)

    def weighted(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{term: lambda * term} for the terms of one forward pass."""
        return {name: value * self.weights[name] for name, value in terms.items()}

    def diagnostics(self) -> dict[str, Tensor]:
        """The distillers' diagnostics of the last forward pass, as ``method/name``."""
        return {f"{m}/{k}": v for m, d in self.distillers.items() for k, v in d.diagnostics().items()}
