"""Labels at the size of a network's maps."""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def labels_at(target: Tensor, size: tuple[int, int]) -> Tensor:
    """int64 labels [B, H, W] at another size (h, w): of the nearest pixel, as an image resize in mode nearest."""
    # float32 holds every label exactly; integers cannot be resized on every device
    return F.interpolate(target[:, None].float(), size=tuple(size), mode="nearest")[:, 0].long()


def position_labels(target: Tensor, size: tuple[int, int], num_class: int, ignore_label: int = -1) -> Tensor:
    """Labels [B, H, W] for the positions of a map of ``size``: int64 [B, h * w], -1 where no class is labeled."""
    labels = labels_at(target, size).flatten(1)
    is_class = (labels >= 0) & (labels < num_class) & (labels != ignore_label)
    return labels.masked_fill(~is_class, -1)


def class_members(labels: Tensor, num_class: int) -> Tensor:
    """Bool [B, K, P]: position p of labels [B, P] is of class k."""
    return labels[:, None] == torch.arange(num_class, device=labels.device)[:, None]
