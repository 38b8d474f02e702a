"""The optimizer of a run, and taking up its state."""
from __future__ import annotations

from typing import Any

import torch

from engine.settings import Settings
from losses.core.objective import Objective


def build_optimizer(settings: Settings, objective: Objective) -> torch.optim.SGD:
    """SGD over student and distillers with one learning rate and one weight decay, as in the reference."""
    groups = [{"params": list(objective.student.parameters())}]
    own = [p for d in objective.distillers.values() for p in d.trained_parameters()]
    if own:
        groups.append({"params": own})
    o, parameters = settings.optimization, [p for group in groups for p in group["params"]]
    fused = settings.speed.fast and all(p.device.type in ("cpu", "cuda") for p in parameters)
    optimizer = torch.optim.SGD(groups, lr=o.lr, momentum=o.momentum, weight_decay=o.weight_decay, fused=fused or None)
    if fused and o.momentum:
        # torch allocates them in the first step, and leaves them as they are if that one is skipped (fp16)
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take up a saved state, but for what says how the update is computed: that stays as the optimizer was built."""
    kernels = [{name: group[name] for name in ("fused", "foreach")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, kernel in zip(optimizer.param_groups, kernels, strict=True):
        group.update(kernel)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                # the fused update walks through the memory of both: it needs the momentum in the weight's layout
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
