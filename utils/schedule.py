"""The learning rate over a run."""
from __future__ import annotations


def poly_lr(base: float, step: int, max_iterations: int, power: float, floor: float = 0.0) -> float:
    """Learning rate of step 0, 1, …: ``floor + (base - floor) * (1 - step / max_iterations) ** power``, hence ``base``
    first; the last one is above ``floor``."""
    return floor + (base - floor) * (1 - step / max_iterations) ** power
