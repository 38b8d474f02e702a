"""The supervised part of the objective: cross entropy at label size."""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.output import SegOutput


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32, or as it is when it is float32 or float64 already (losses ignore half precision)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class SegCrossEntropyLoss(nn.Module):
    """Mean cross entropy over the pixels whose label is not ``ignore_index``."""

    def __init__(self, ignore_index: int = -1) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Scalar in nats. logits: [B, K, h, w], resized bilinearly to the labels; target: integers [B, H, W].

        A batch without a single labelled pixel gives 0 with a zero gradient (a mean over nothing would be NaN).
        """
        logits = F.interpolate(at_least_float32(logits), size=target.shape[-2:], mode="bilinear", align_corners=True)
        total = F.cross_entropy(logits, target.long(), ignore_index=self.ignore_index, reduction="sum")
        labelled = (target != self.ignore_index).sum()
        return total / labelled.clamp(min=1)


def task_loss(output: SegOutput, target: Tensor, criterion: nn.Module) -> dict[str, Tensor]:
    """Unweighted ``{"task": scalar}`` of the main logits, and ``"aux"`` when the network has an auxiliary head."""
    terms = {"task": criterion(output.logits, target)}
    if output.aux is not None:
        terms["aux"] = criterion(output.aux, target)
    return terms
