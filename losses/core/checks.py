"""Checks of tensors that methods share, and the precision that losses are computed in."""
from __future__ import annotations

import torch
from torch import Tensor

from utils.errors import UserError


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32, or as it is when it is float32 or float64 already (losses ignore half precision)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(x: Tensor) -> torch.autocast:
    """Context on the device of ``x`` in which matrix products keep the dtype of their operands."""
    return torch.autocast(x.device.type, enabled=False)


def check_maps(method: str, student: Tensor, teacher: Tensor, *, channels: bool = False) -> None:
    """Raise UserError unless two maps [B, C, h, w] agree in B, h and w, and with ``channels`` in C as well."""
    agree = len(student) == len(teacher) and student.shape[-2:] == teacher.shape[-2:]
    if not agree or channels and student.shape[1] != teacher.shape[1]:
        raise UserError(f"{method}: student map {tuple(student.shape)} and teacher map {tuple(teacher.shape)}: "
                        f"expected the same batch, height and width{' and channels' if channels else ''}")


def check_logits(method: str, student: Tensor, teacher: Tensor) -> None:
    """Raise UserError unless both logit maps [B, K, h, w] have the same shape."""
    if student.shape != teacher.shape:
        raise UserError(f"{method}: the logits of student {tuple(student.shape)} and teacher {tuple(teacher.shape)} "
                        "must have the same shape (classes and output stride)")
