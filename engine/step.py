"""One training iteration."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.optimizer import set_learning_rate
from losses.core.objective import Objective
from utils.distributed import is_distributed
from utils.errors import UserError
from utils.flops import FlopCounter
from utils.randomness import seed_everything, step_generator
from utils.schedule import poly_lr, warmup_factor


@dataclass
class StepResult:
    """What one iteration computed; tensors stay on the device until somebody logs them."""

    terms: dict[str, Tensor]
    weighted: dict[str, Tensor]
    total: Tensor
    lr: float
    grad_norms: dict[str, Tensor]


class TrainStep:
    """Teacher and student forward, weighted sum, backward, for each part of the batch; then learning rate, clip of the
    distillers, SGD step.

    model: the :class:`Objective`, or DDP around it. Randomness (dropout, masks) is a function of (seed, step, rank).
    amp: half precision of the forward pass, None for none; float16 scales the loss, and a step whose gradients overflow
    leaves the weights as they are. parts: a batch is worked through in so many equal parts. warmup: first steps in
    which the learning rate grows to that of the decay. flops: operations per image of the first step, None before it
    and where they cannot be counted (``counts_flops`` False).
    """

    def __init__(self, model: nn.Module, teacher: nn.Module | None, optimizer: torch.optim.Optimizer, *, lr: float,
                 max_iterations: int, power: float = 0.9, min_lr: float = 0.0, seed: int = 0, rank: int = 0,
                 amp: torch.dtype | None = None, parts: int = 1, warmup: int = 0) -> None:
        self.model, self.teacher, self.optimizer = model, teacher, optimizer
        self.objective: Objective = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.lr, self.max_iterations, self.power, self.min_lr = lr, max_iterations, power, min_lr
        self.seed, self.rank, self.amp, self.parts, self.warmup = seed, rank, amp, parts, warmup
        device = next(self.objective.parameters()).device.type
        self.scaler = torch.amp.GradScaler(device, enabled=amp is torch.float16)
        self.flops: float | None = None
        self.counts_flops = True
        self._finite: Tensor | None = None

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
        done = []
        for part, gradients in self._parts(images, teacher_images, target):
            with gradients:
                done.append(self._backward(*part, step, generator))
        self.scaler.unscale_(self.optimizer)
        norms = self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.objective.after_step(step)
        terms, weighted = ({k: sum(d[k] for d in dicts) for k in dicts[0]} for dicts in zip(*done, strict=True))
        total = sum(weighted.values())
        self._remember_finite(total)
        return StepResult(terms, weighted, total, lr, norms)

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

    def _remember_finite(self, total: Tensor) -> None:
        finite = torch.isfinite(total)
        self._finite = finite if self._finite is None else self._finite & finite

    def check_finite(self, step: int) -> None:
        """Raise when a loss was NaN or infinite since the last check, or a weight is now.

        Costs a synchronization: not for every step.
        """
        if self._finite is None:
            return
        weights = torch.stack([p.detach().sum() for p in self.objective.student.parameters()])
        flag = (self._finite & weights.isfinite().all()).to(torch.int32)
        self._finite = None
        if is_distributed():
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
        if not flag.item():
            raise UserError(f"the loss or a weight became NaN or infinite at or shortly before iteration {step}: "
                            "nothing was saved since; try a lower --lr or --lambda-*, the last training state is good")
