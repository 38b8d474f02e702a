"""The learning rate over a run."""
from __future__ import annotations


def poly_lr(base: float, step: int, max_iterations: int, power: float) -> float:
    """Learning rate of step 0, 1, …: ``base * (1 - step / max_iterations) ** power``; the last one is above 0."""
    return base * (1 - step / max_iterations) ** power
