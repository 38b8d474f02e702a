"""One training iteration."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.optimizer import set_learning_rate
from losses.core.objective import Objective
from utils.distributed import gathered, rank_and_world, same_everywhere
from utils.flops import FlopCounter
from utils.module_state import HeldState
from utils.randomness import seed_everything, step_generator
from utils.schedule import poly_lr, warmup_factor

SUM, GRADIENT, WEIGHTS = "the sum of the loss terms", "the gradient", "a weight"


@dataclass(frozen=True, order=True)
class Fault:
    """The first step in which something was not finite. step: iterations done before it; rank: of the first process
    that saw it; what: terms of the loss there, or SUM, GRADIENT, WEIGHTS; exact: whether not only the weights are as
    they were before that step, but everything."""

    step: int
    rank: int
    what: tuple[str, ...]
    exact: bool = False

    def __str__(self) -> str:
        kinds = {SUM, GRADIENT, WEIGHTS}
        terms = [name for name in self.what if name not in kinds]
        names = terms and [f"the loss term{'s' * (len(terms) > 1)} {', '.join(terms)}"]
        return f"step {self.step + 1}: {(names or self.what)[0]} became NaN or infinite"


@dataclass
class StepResult:
    """What one iteration computed; tensors stay on the device until somebody logs them. fault: why it was skipped."""

    terms: dict[str, Tensor]
    weighted: dict[str, Tensor]
    total: Tensor
    lr: float
    grad_norms: dict[str, Tensor]
    fault: Fault | None = None


class TrainStep:
    """Teacher and student forward, weighted sum, backward, for each part of the batch; then learning rate, clip of the
    distillers, SGD step.

    model: the :class:`Objective`, or DDP around it. Randomness (dropout, masks) is a function of (seed, step, rank).
    amp: half precision of the forward pass, None for none; float16 scales the loss, and a step whose gradients overflow
    leaves the weights as they are. parts: a batch is worked through in so many equal parts. warmup: first steps in
    which the learning rate grows to that of the decay. flops: operations per image of the first step, None before it
    and where they cannot be counted (``counts_flops`` False).

    After a step whose loss or gradient is not finite the weights stay as they are, until :meth:`find_fault` asks: no
    device is waited for (so an optimizer on a GPU that is not fused does take the step). may_skip: such a step leaves
    no trace at all, in any process, and is counted in ``skipped``; this waits for the device in every step, and holds
    buffers (queues) twice.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module | None, optimizer: torch.optim.Optimizer, *, lr: float,
                 max_iterations: int, power: float = 0.9, min_lr: float = 0.0, seed: int = 0, rank: int = 0,
                 amp: torch.dtype | None = None, parts: int = 1, warmup: int = 0, may_skip: bool = False) -> None:
        self.model, self.teacher, self.optimizer = model, teacher, optimizer
        self.objective: Objective = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.lr, self.max_iterations, self.power, self.min_lr = lr, max_iterations, power, min_lr
        self.seed, self.rank, self.amp, self.parts, self.warmup = seed, rank, amp, parts, warmup
        device = next(self.objective.parameters()).device.type
        self.scaler = torch.amp.GradScaler(device, enabled=amp is torch.float16)
        self.flops: float | None = None
        self.counts_flops = True
        self.may_skip, self.skipped = may_skip, 0
        self._seen: list[tuple[int, Tensor]] = []  # (step, what of it was finite), since somebody asked
        self._names: list[str] = []
        self._broken: Tensor | None = None

    def __call__(self, images: Tensor, teacher_images: Tensor | None, target: Tensor, step: int) -> StepResult:
        """Train on one batch. images, teacher_images: float [B, 3, H, W]; target: int64 [B, H, W]; step from 0."""
        if self.flops is not None or not self.counts_flops:
            return self._train(images, teacher_images, target, step)
        with FlopCounter() as counter:
            result = self._train(images, teacher_images, target, step)
        self.flops = counter.total / len(images)
        return result

    def _train(self, images: Tensor, teacher_images: Tensor | None, target: Tensor, step: int) -> StepResult:
        generator = self.seed_streams(step, target.device)
        lr = poly_lr(self.lr, step, self.max_iterations, self.power, self.min_lr) * warmup_factor(step, self.warmup)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        held = HeldState(self.objective) if self.may_skip else None
        done = []
        for part, gradients in self._parts(images, teacher_images, target):
            with gradients:
                done.append(self._backward(*part, step, generator))
        terms, weighted = ({k: sum(d[k] for d in dicts) for k in dicts[0]} for dicts in zip(*done, strict=True))
        result = StepResult(terms, weighted, sum(weighted.values()), lr, {})
        self.scaler.unscale_(self.optimizer)
        finite = self._finite(result)
        if held is not None and (fault := self._fault_everywhere([(step, finite)], exact=True)):
            held.restore()
            self.scaler.update()
            self.skipped += 1
            result.fault = fault
            return result
        self._seen.append((step, finite))
        result.grad_norms = self._clip()
        self._update(finite)
        self.scaler.update()
        self.objective.after_step(step)
        return result

    def seed_streams(self, step: int, device: torch.device) -> torch.Generator:
        """Start the random numbers of a step: dropout draws from torch's own stream, distillers from the generator."""
        seed_everything(self.seed, "step", step, self.rank)
        return step_generator(device, self.seed, "distiller", step, self.rank)

    def _parts(self, *tensors: Tensor | None) -> Iterator[tuple[list[Tensor | None], AbstractContextManager]]:
        """Each part of the batch, and the context for it: processes exchange gradients in the last one only."""
        split = [[None] * self.parts if x is None else x.chunk(self.parts) for x in tensors]
        for i, part in enumerate(zip(*split, strict=True)):
            waits = i < self.parts - 1 and self.model is not self.objective
            yield part, self.model.no_sync() if waits else nullcontext()

    def _backward(self, images: Tensor, teacher_images: Tensor | None, target: Tensor, step: int,
                  generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Add the gradient of one part. Returns its share of the terms and of the weighted terms."""
        terms = self.compute_terms(self.model, images, teacher_images, target, step, generator)
        terms = {name: value / self.parts for name, value in terms.items()}
        weighted = self.objective.weighted(terms, step)
        self.scaler.scale(sum(weighted.values())).backward()
        return {k: v.detach() for k, v in terms.items()}, {k: v.detach() for k, v in weighted.items()}

    def compute_terms(self, model: nn.Module, images: Tensor, teacher_images: Tensor | None, target: Tensor, step: int,
                      generator: torch.Generator) -> dict[str, Tensor]:
        """{term: unweighted scalar} of one forward pass of both networks. model: the objective, or DDP around it."""
        with torch.autocast(images.device.type, self.amp, enabled=self.amp is not None):
            teacher_output = None
            if self.teacher is not None:
                with torch.no_grad():
                    teacher_output = self.teacher(teacher_images)
            return model(images, teacher_output, target, step, generator)

    def _clip(self) -> dict[str, Tensor]:
        """Clip the gradient of every distiller that asks for it; {method: norm before clipping}."""
        return {name: nn.utils.clip_grad_norm_(d.trained_parameters(), d.clip_norm)
                for name, d in self.objective.distillers.items() if d.clip_norm}

    def _finite(self, result: StepResult) -> Tensor:
        """Whether each of ``_names`` was finite in this step, bool on the device: terms, their sum, the gradient."""
        self._names = [*result.terms, SUM]
        values = [*result.terms.values(), result.total]
        if not self.scaler.is_enabled():  # which leaves out a step whose gradients overflow, by design
            self._names.append(GRADIENT)
            gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
            values.append(torch.stack(torch._foreach_norm(gradients)).sum())
        return torch.stack([value.detach().to(values[-1].dtype) for value in values]).isfinite()

    def _update(self, finite: Tensor) -> None:
        """The optimizer's step, unless something was not finite since somebody asked."""
        broken = self._broken = ~finite.all() if len(self._seen) == 1 else self._broken | ~finite.all()
        if self.scaler.is_enabled():  # it decides itself
            self.scaler.step(self.optimizer)
        elif getattr(self.optimizer, "_step_supports_amp_scaling", False):  # the fused one reads it on the device
            self.optimizer.found_inf = broken.float()
            self.optimizer.step()
            del self.optimizer.found_inf
        elif broken.device.type != "cpu" or not broken:
            self.optimizer.step()

    def find_fault(self) -> Fault | None:
        """The first step since the last call in which something was not finite, or a weight that is not now. All
        processes have to call it, and get the same answer.

        Costs a synchronization: not for every step.
        """
        if not (seen := self._seen):
            return None
        self._seen = []
        weights = torch.stack([p.detach().sum() for p in self.objective.student.parameters()]).isfinite().all()
        return self._fault_everywhere(seen, weights)

    def _fault_everywhere(self, seen: list[tuple[int, Tensor]], weights: Tensor | None = None,
                          exact: bool = False) -> Fault | None:
        """The first fault of all processes. seen: steps with what was finite in them; weights: whether those are."""
        finite = torch.stack([values for _, values in seen]).all() & (True if weights is None else weights)
        device = finite.device
        if same_everywhere(int(finite.item()), device) and finite:
            return None
        rank, world = rank_and_world()
        mine = next((Fault(step, rank, tuple(n for n, good in zip(self._names, values.tolist(), strict=True)
                                             if not good), exact) for step, values in seen if not values.all()), None)
        if mine is None and weights is not None and not weights:
            mine = Fault(seen[-1][0], rank, (WEIGHTS,))
        found = [mine] if world == 1 else gathered(mine)
        return min(fault for fault in found if fault is not None)
