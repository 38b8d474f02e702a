"""Groups of neighboring images: averages that in the published runs were over the two images of a GPU.

``group_size`` images in a row form a group (0 = all of them), so that one process computes what several do. Images that
remain form a smaller one. Groups weigh by their number of images.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def split_groups(x: Tensor, group_size: int) -> list[Tensor]:
    """[B, ...] as [groups, images, ...] of the whole groups and, if any images remain, [1, images, ...] of those."""
    size = min(group_size or len(x), len(x))
    whole = len(x) - len(x) % size
    return [x[:whole].unflatten(0, (-1, size)), *([x[None, whole:]] if whole < len(x) else [])]


def mean_over_groups(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor,
                     group_size: int) -> Tensor:
    """Mean over the groups of tensors [B, ...] of a loss of two [groups, images, ...] that averages over them."""
    parts = zip(split_groups(student, group_size), split_groups(teacher, group_size), strict=True)
    return sum(loss(s, t) * (s.shape[0] * s.shape[1] / len(student)) for s, t in parts)


def image_weights(labeled: Tensor, group_size: int, dtype: torch.dtype, least: float = 1.0) -> Tensor:
    """Weights [B] that turn the sums of B images over their labeled pixels into the mean over each group's pixels and
    that into the mean over the groups. labeled: pixels of each image, [B], or the sums of their weights, which are 0 or
    at least ``least``. A group without any counts as 0."""
    batch = len(labeled)
    group = torch.arange(batch, device=labeled.device) // min(group_size or batch, batch)
    same = (group[:, None] == group).to(dtype)
    counts = (same * labeled.to(dtype)).sum(1)  # no matrix product: autocast would count in half precision
    return same.sum(1) / (batch * counts.clamp(min=least))
