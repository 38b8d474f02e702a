"""The learning rate over a run."""
from __future__ import annotations


def poly_lr(base: float, step: int, max_iterations: int, power: float, floor: float = 0.0) -> float:
    """Learning rate of step 0, 1, …: ``floor + (base - floor) * (1 - step / max_iterations) ** power``, hence ``base``
    first; the last one is above ``floor``."""
    return floor + (base - floor) * (1 - step / max_iterations) ** power


def warmup_factor(step: int, steps: int) -> float:
    """Times the learning rate of step 0, 1, …: grows linearly from ``1 / steps`` to 1 at step ``steps - 1``."""
    return min((step + 1) / steps, 1.0) if steps else 1.0
