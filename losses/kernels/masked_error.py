"""Squared error and max pooling of a restored map in one operator, which keeps no other map of that size.

The plain form keeps the difference beside the map, and its backward pass holds the gradients of both uses and a square
and its factor at a time. Here the one gradient of the map is all that is added.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

#: what is as large as the map is made for the channels of one of so many parts after the other
PARTS = 32


def _parts(*maps: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(x.chunk(PARTS, dim=1) for x in maps), strict=True))


def _difference(projected: Tensor, teacher: Tensor) -> Tensor:
    """A new tensor in float32 or better."""
    dtype = torch.promote_types(torch.promote_types(projected.dtype, teacher.dtype), torch.float32)
    return projected.to(dtype) - teacher.to(dtype)


def _max_pool_gradient(x: Tensor, pool: int, of_pooled: Tensor) -> Tensor:
    # the places are found again: in int64 they are larger than the pooled map
    window, places = [pool, pool], F.max_pool2d(x, pool, return_indices=True)[1]
    return torch.ops.aten.max_pool2d_with_indices_backward(of_pooled, x, window, window, [0, 0], [1, 1], False, places)


class _ErrorAndPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, projected: Tensor, teacher: Tensor, pool: int) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(projected, teacher)
        ctx.pool = pool
        sums = [_difference(own, other).square_().sum() for own, other in _parts(projected, teacher)]
        return torch.stack(sums).sum() / len(projected), F.max_pool2d(projected, pool) if pool else None

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, of_error: Tensor | None, of_pooled: Tensor | None) -> tuple[Tensor, None, None]:
        projected, teacher = ctx.saved_tensors
        gradient = torch.zeros_like(projected)
        if of_pooled is not None:
            for part, own, of_own in _parts(gradient, projected, of_pooled):
                part.copy_(_max_pool_gradient(own, ctx.pool, of_own))
        if of_error is not None:
            scale = of_error * (2 / len(projected))
            for part, own, other in _parts(gradient, projected, teacher):
                part.add_(_difference(own, other).mul_(scale))
        return gradient, None, None


def error_and_pool(projected: Tensor, teacher: Tensor, pool: int = 0) -> tuple[Tensor, Tensor | None]:
    """(squared error summed over C, H, W and averaged over the batch, in float32 or better; the map max pooled by
    ``pool``, None where that is 0) of two maps [B, C, H, W]. Gradients reach ``projected`` only."""
    return _ErrorAndPool.apply(projected, teacher, pool)
