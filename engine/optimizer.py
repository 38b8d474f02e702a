"""The optimizer of a run, and taking up its state."""
from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine.settings import Settings
from losses.core.objective import Objective
from utils.errors import UserError


def build_optimizer(settings: Settings, objective: Objective) -> torch.optim.Optimizer:
    """SGD over student and distillers with one weight decay and, but for ``--head-lr-factor``, one learning rate, as in
    the reference; or AdamW, whose weight decay is not for norms and biases."""
    o = settings.optimization
    groups = student_groups(objective.student, o.head_lr_factor)
    own = [p for d in objective.distillers.values() for p in d.trained_parameters()]
    if own:
        groups.append({"params": own, "lr_factor": 1.0})
    parameters = [p for group in groups for p in group["params"]]
    fused = settings.speed.fast and all(p.device.type in ("cpu", "cuda") for p in parameters)
    if settings.recipe.optimizer == "adamw":
        return torch.optim.AdamW(decayed_apart(groups), lr=o.lr, weight_decay=o.weight_decay, fused=fused or None)
    optimizer = torch.optim.SGD(groups, lr=o.lr, momentum=o.momentum, weight_decay=o.weight_decay, nesterov=o.nesterov,
                                fused=fused or None)
    allocate_momentum(optimizer)
    return optimizer


def allocate_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Momentum of 0 for the parameters of a fused SGD that have none: torch allocates it in the first step, and leaves
    it as it is if that one is skipped (fp16)."""
    for group in optimizer.param_groups:
        if group["fused"] and group.get("momentum"):
            for parameter in group["params"]:
                if optimizer.state[parameter].get("momentum_buffer") is None:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def student_groups(student: nn.Module, head_lr_factor: float) -> list[dict[str, Any]]:
    """The student as one group of parameters, or backbone and the rest where their learning rates differ. lr_factor:
    times the learning rate of the step."""
    if head_lr_factor == 1:
        return [{"params": list(student.parameters()), "lr_factor": 1.0}]
    if not hasattr(student, "pretrained"):
        raise UserError(f"--head-lr-factor {head_lr_factor:g}: {student.name} does not say which part is its backbone")
    backbone = list(student.pretrained.parameters())
    known = set(map(id, backbone))
    heads = [p for p in student.parameters() if id(p) not in known]
    return [{"params": backbone, "lr_factor": 1.0}, {"params": heads, "lr_factor": head_lr_factor}]


def decayed_apart(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each group as two: weights of convolutions and linear layers, then norms and biases (which have one dimension)
    without weight decay."""
    return [{**group, "params": [p for p in group["params"] if (p.ndim > 1) is decayed],
             **({} if decayed else {"weight_decay": 0.0})} for group in groups for decayed in (True, False)]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the coming step, times each group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take up what a saved optimizer held of each parameter. How the update is computed stays as this run's settings
    have built it; the learning rate is set in every step. ValueError for the state of another optimizer."""
    if any(("betas" in group) != isinstance(optimizer, torch.optim.AdamW) for group in state["param_groups"]):
        raise ValueError(f"its optimizer is not this run's, {type(optimizer).__name__}: --optimizer")
    then, now = len(state["param_groups"]), len(optimizer.param_groups)
    if then != now:
        raise ValueError(f"its optimizer divides the parameters into {then} groups, this run's into {now}: "
                         "--head-lr-factor")
    built = [{name: value for name, value in group.items() if name not in ("params", "lr")}
             for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, values in zip(optimizer.param_groups, built, strict=True):
        group.update(values)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                # the fused update walks through the memory of both: it needs the momentum in the weight's layout
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    allocate_momentum(optimizer)
