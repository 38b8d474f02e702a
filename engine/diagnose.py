"""Is every term of the objective alive: its value, and its gradient on the student beside that of the cross entropy.

Measured on the batch and with the random numbers of the coming step, so that the values are those which that step then
computes. Nothing of the run changes: it ends with the same weights, bit for bit, as one that was not measured.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.journal import Journal
from engine.run import Run, network_inputs
from losses.core.objective import Objective
from utils.distributed import is_distributed, reduce_mean
from utils.module_state import modules_kept
from utils.randomness import random_numbers_kept

#: {term: {"raw", "weighted", "gradient", "cosine"}}, see :func:`compare_gradients`
Diagnosis = dict[str, dict[str, float | None]]
SLICE = 2 ** 22  # numbers of a gradient that are held in float64 at a time


def diagnose_step(run: Run, batch: dict, journal: Journal) -> None:
    """Write down the diagnosis of the coming step, every ``--diagnose-every`` steps and for the last one. All processes
    take part."""
    every, step = run.settings.running.diagnose_every, run.step + 1
    if not every or step % every and step != run.settings.optimization.max_iterations:
        return
    with journal.clock.paused():
        terms = diagnose(run, batch)
        if journal.logger is not None:
            journal.logger.record("diagnose", step, terms=terms)


def diagnose(run: Run, batch: dict) -> Diagnosis:
    """:func:`compare_gradients` of a batch of the loader in the present state of the run, in training mode.

    With several processes, of the whole batch; with ``--grad-accumulation``, of its first part. Compiled networks are
    run as they were before: what the compiler makes allows only one backward pass."""
    step_fn, objective = run.step_fn, run.objective
    inputs = [None if x is None else x.chunk(step_fn.parts)[0] for x in network_inputs(run, batch)]
    device = run.distributed.device
    with random_numbers_kept(device), modules_kept(objective):
        vars(objective).pop("run_student", None)  # the compiled one, which hides the method
        generator = step_fn.seed_streams(run.step, device)
        # without DDP: gradients are taken, not added up, and DDP's exchange would wait for them
        terms = step_fn.compute_terms(objective, *inputs, run.step, generator)
        scale = step_fn.scaler.get_scale() if step_fn.scaler.is_enabled() else 1.0
        return compare_gradients(objective, terms, run.step, scale)


def compare_gradients(objective: Objective, terms: Mapping[str, Tensor], step: int, scale: float = 1.0) -> Diagnosis:
    """Of every term of one forward pass: ``raw`` and ``weighted``, its value; ``gradient``, the norm of its weighted
    gradient on the student's parameters over that of the cross entropy ``task``; ``cosine`` between the two.

    ``aux`` is a term like the others. A term whose gradient does not reach the student has 0 and 0. None stands for
    what is not finite, and for the comparison with a cross entropy that has no gradient. scale: of the losses in the
    backward pass, as the step scales them in float16."""
    weighted = objective.weighted(terms, step)
    parameters = [p for p in objective.student.parameters() if p.requires_grad]
    values = reduce_mean(torch.stack([*terms.values(), *weighted.values()]).detach().double()).chunk(2)
    raw, counted = (dict(zip(terms, map(_number, part), strict=True)) for part in values)
    task = student_gradient("task", weighted, parameters, scale)
    size = inner(task, task).sqrt()
    size = size.where(size.isfinite(), math.nan)  # so that nothing is called small beside it
    result: Diagnosis = {}
    for name in terms:
        own = task if name == "task" else student_gradient(name, weighted, parameters, scale)
        norm = inner(own, own).sqrt()
        # a term without a gradient has no direction: its inner product is 0
        cosine = inner(own, task) / torch.where(norm > 0, norm * size, size)
        result[name] = {"raw": raw[name], "weighted": counted[name], "gradient": _number(norm / size),
                        "cosine": _number(cosine)}
    return result


def student_gradient(name: str, weighted: Mapping[str, Tensor], parameters: list[nn.Parameter],
                     scale: float = 1.0) -> Tensor:
    """Gradient of one weighted term, averaged over the processes: one vector, zeros where it does not reach.

    With several processes the backward pass goes through all terms, the others with a factor of 0: batch norm exchanges
    sums in it, and every process has to come to the same exchanges, whatever its images give to a term."""
    used = [one for one in (weighted if is_distributed() else [name]) if weighted[one].requires_grad]
    parts: tuple[Tensor | None, ...] = (None,) * len(parameters)
    if used:
        factors = [torch.full_like(weighted[one], scale if one == name else 0.0) for one in used]
        parts = torch.autograd.grad([weighted[one] for one in used], parameters, factors, retain_graph=True,
                                    allow_unused=True)
    whole = [torch.zeros_like(p) if part is None else part for p, part in zip(parameters, parts, strict=True)]
    return reduce_mean(torch.cat([part.flatten() for part in whole])) / scale


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of two vectors, summed in float64."""
    parts = zip(a.split(SLICE), b.split(SLICE), strict=True)
    return torch.stack([torch.dot(x.double(), y.double()) for x, y in parts]).sum()


def _number(value: Tensor) -> float | None:
    number: Any = value.item()
    return number if math.isfinite(number) else None
