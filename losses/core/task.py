"""The supervised part of the objective: cross entropy at label size."""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses.core.checks import at_least_float32
from losses.core.groups import image_weights, split_groups
from models.output import SegOutput


class SegCrossEntropyLoss(nn.Module):
    """Mean cross entropy over the pixels whose label is not ``ignore_index``, in groups of images (0 = all). The
    published runs took the mean over the two images of a GPU, then over the GPUs."""

    def __init__(self, ignore_index: int = -1, group_size: int = 0) -> None:
        super().__init__()
        self.ignore_index, self.group_size = ignore_index, group_size

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Scalar in nats. logits: [B, K, h, w], resized bilinearly to the labels; target: integers [B, H, W].

        A batch without a single labeled pixel gives 0 with a zero gradient (a mean over nothing would be NaN)."""
        logits = F.interpolate(at_least_float32(logits), size=target.shape[-2:], mode="bilinear", align_corners=True)
        per_pixel = F.cross_entropy(logits, target.long(), ignore_index=self.ignore_index, reduction="none")
        labeled = (target != self.ignore_index).sum((1, 2))
        return (per_pixel.sum((1, 2)) * image_weights(labeled, self.group_size, per_pixel.dtype)).sum()


class WeightedCrossEntropyLoss(SegCrossEntropyLoss):
    """:class:`SegCrossEntropyLoss` with a weight per pixel: the mean becomes a weighted one.

    class_weights: of a pixel's label, at least 0 each, one of them above; None = 1. hard: (threshold, kept) of
    :func:`hard_pixels`, the only ones that count; None = all."""

    def __init__(self, ignore_index: int = -1, group_size: int = 0, class_weights: Sequence[float] | None = None,
                 hard: tuple[float, float] | None = None) -> None:
        super().__init__(ignore_index, group_size)
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.get_default_dtype())
        self.register_buffer("class_weights", weights, persistent=False)
        self.hard, self.least = hard, min((w for w in class_weights or () if w), default=1.0)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """As of :class:`SegCrossEntropyLoss`."""
        logits = F.interpolate(at_least_float32(logits), size=target.shape[-2:], mode="bilinear", align_corners=True)
        per_pixel = F.cross_entropy(logits, target.long(), ignore_index=self.ignore_index, reduction="none")
        counts = target != self.ignore_index
        weight = counts.to(per_pixel.dtype)
        if self.hard is not None:
            weight = weight * hard_pixels(per_pixel.detach(), counts, *self.hard, self.group_size)
        if self.class_weights is not None:
            weight = weight * self.class_weights.to(weight.dtype)[torch.where(counts, target, 0).long()]
        sums = image_weights(weight.sum((1, 2)), self.group_size, per_pixel.dtype, self.least)
        return ((per_pixel * weight).sum((1, 2)) * sums).sum()


def hard_pixels(loss: Tensor, labeled: Tensor, threshold: float, kept: float, group_size: int = 0) -> Tensor:
    """Online hard example mining (Shrivastava et al., 2016), as usual for segmentation: True [B, H, W] for the labeled
    pixels whose class has a probability below ``threshold``, and at least for the share ``kept`` of the labeled pixels
    of a group of images (0 = all of them) that has the lowest. loss: cross entropies [B, H, W]; labeled: bool."""
    parts = []
    for losses, known in zip(split_groups(loss, group_size), split_groups(labeled, group_size), strict=True):
        losses, known, shape = losses.flatten(1), known.flatten(1), losses.flatten(0, 1).shape
        ordered = losses.masked_fill(~known, -1.0).sort(dim=1, descending=True).values
        last = (known.sum(1, keepdim=True) * kept).ceil().long().clamp(min=1) - 1
        hard = (losses > -math.log(threshold)) | (losses >= ordered.gather(1, last))
        parts.append((hard & known).view(shape))
    return torch.cat(parts)


def task_loss(output: SegOutput, target: Tensor, criterion: nn.Module) -> dict[str, Tensor]:
    """Unweighted ``{"task": scalar}`` of the main logits, and ``"aux"`` when the network has an auxiliary head."""
    terms = {"task": criterion(output.logits, target)}
    if output.aux is not None:
        terms["aux"] = criterion(output.aux, target)
    return terms
