"""A network from elsewhere, ``module:tests.partly_used:PartlyUsed``, with a layer that its forward pass leaves out."""
from __future__ import annotations

import torch
from torch import nn


class PartlyUsed(nn.Module):
    """Two convolutions and a classifier at half the size; what a backbone keeps of its own classifier is not used."""

    def __init__(self, num_class: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 1, 1))
        self.classifier, self.left_over = nn.Conv2d(16, num_class, 1), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.body(x))
