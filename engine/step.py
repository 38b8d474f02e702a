"""One training iteration."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from losses.core.objective import Objective
from utils.distributed import is_distributed
from utils.errors import UserError
from utils.randomness import seed_everything, step_generator
from utils.schedule import poly_lr


@dataclass
class StepResult:
    """What one iteration computed; tensors stay on the device until somebody logs them."""

    terms: dict[str, Tensor]
    weighted: dict[str, Tensor]
    total: Tensor
    lr: float
    grad_norms: dict[str, Tensor]


class TrainStep:
    """Teacher and student forward, weighted sum, learning rate, backward, clip of the distillers, SGD step.

    model: the :class:`Objective`, or DDP around it. Randomness (dropout, masks) is a function of (seed, step, rank).
    """

    def __init__(self, model: nn.Module, teacher: nn.Module | None, optimizer: torch.optim.Optimizer, *, lr: float,
                 max_iterations: int, power: float = 0.9, seed: int = 0, rank: int = 0) -> None:
        self.model, self.teacher, self.optimizer = model, teacher, optimizer
        self.objective: Objective = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.lr, self.max_iterations, self.power = lr, max_iterations, power
        self.seed, self.rank = seed, rank
        self._finite: Tensor | None = None

    def __call__(self, images: Tensor, teacher_images: Tensor | None, target: Tensor, step: int) -> StepResult:
        """Train on one batch. images, teacher_images: float [B, 3, H, W]; target: int64 [B, H, W]; step from 0."""
        seed_everything(self.seed, "step", step, self.rank)
        generator = step_generator(target.device, self.seed, "distiller", step, self.rank)
        teacher_output = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher_output = self.teacher(teacher_images)
        terms = self.model(images, teacher_output, target, step, generator)
        weighted = self.objective.weighted(terms, step)
        total = sum(weighted.values())
        lr = poly_lr(self.lr, step, self.max_iterations, self.power)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norms = self._clip()
        self.optimizer.step()
        self.objective.after_step(step)
        self._remember_finite(total.detach())
        detached = [{k: v.detach() for k, v in d.items()} for d in (terms, weighted)]
        return StepResult(*detached, total.detach(), lr, norms)

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
