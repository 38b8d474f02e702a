"""Relations of vectors, for CIRKD and CIRKDv2: the divergence between two networks' similarities to a set of vectors,
without ever holding all the similarities.

Gradients of a scalar are linear in the incoming one, so they can be made in the forward pass, block of rows by block of
rows, while its similarities are at hand: nothing is computed twice, and what is kept has the size of the inputs.
Nothing here waits for the device. ``losses/core/relation_sums.py`` has a faster form of the two losses that methods
use.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from losses.core.checks import at_least_float32, check_maps, full_precision
from losses.core.groups import split_groups
from losses.core.relation_sums import key_relation_loss, pair_relation_loss, sums_suffice
from utils.errors import UserError

BLOCK = 2 ** 23  # similarities computed at a time, by either network; three blocks of that size exist
UNUSABLE = -1e30  # finite, so that a row without any usable column gives 0 rather than NaN


def blocks(groups: int, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Pieces (of the groups, of their rows) of at most :data:`BLOCK` similarities, or one row, that cover all of them:
    small groups go together, and one that is too large is cut into rows."""
    most = max(BLOCK // max(columns, 1), 1)
    some, length = max(most // max(rows, 1), 1), max(min(most, rows), 1)
    for group in range(0, groups, some):
        for row in range(0, rows, length):
            yield slice(group, group + some), slice(row, row + length)


def compare(student: Tensor, teacher: Tensor, student_keys: Tensor, teacher_keys: Tensor, usable: Tensor | None,
            space: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(KL(p || q) summed over the sets [g, r], q - p [g, r, J * M]) of a block, in the memory of ``space``.

    student [g, r, C], teacher [g, r, D]: rows, over the temperature. student_keys [g, J * M, C], teacher_keys
    [g, J * M, D]. q and p are the student's and the teacher's softmax over M keys. space: three times [g, r, J, M]."""
    first, second, third = space
    for rows, keys, out in ((student, student_keys, first), (teacher, teacher_keys, second)):
        torch.bmm(rows, keys.mT, out=out.flatten(2))
        if usable is not None:
            out.masked_fill_(~usable, UNUSABLE)
    log_q = torch.log_softmax(first, -1, out=third)
    log_p = torch.log_softmax(second, -1, out=first)
    p = torch.exp(log_p, out=second)
    divergence = log_p.sub_(log_q).mul_(p).sum((-2, -1))
    return divergence, log_q.exp_().sub_(p).flatten(2)


class RelationDivergence(torch.autograd.Function):
    """:func:`relation_divergence`; the gradients of ``student`` and ``student_keys`` are made where they are needed."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, student_keys: Tensor, teacher_keys: Tensor, weight: Tensor,
                tau: float, usable: Tensor | None) -> Tensor:
        sets = student_keys.shape[1:3]
        s_keys, t_keys = student_keys.flatten(1, 2), teacher_keys.flatten(1, 2)
        rows_gradient = student.new_empty(student.shape) if ctx.needs_input_grad[0] else None
        keys_gradient = s_keys.new_zeros(s_keys.shape) if ctx.needs_input_grad[2] else None
        divergence = torch.empty_like(weight)
        space: list[Tensor] = []
        with full_precision(student):
            for g, r in blocks(*student.shape[:2], sets.numel()):
                s, factor = student[g, r], weight[g, r, None] / tau
                space = space or [s.new_empty(*s.shape[:2], *sets) for _ in range(3)]  # no later block is larger
                divergence[g, r], difference = compare(s / tau, teacher[g, r] / tau, s_keys[g], t_keys[g], usable,
                                                       [x[:len(s), :s.shape[1]] for x in space])
                if rows_gradient is not None:
                    rows_gradient[g, r] = torch.bmm(difference, s_keys[g]) * factor
                if keys_gradient is not None:
                    keys_gradient[g].baddbmm_(difference.mT, s * factor)
        ctx.save_for_backward(rows_gradient, None if keys_gradient is None else keys_gradient.unflatten(1, sets))
        return (divergence * weight).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, keys = (None if x is None else x * gradient for x in ctx.saved_tensors)
        return rows, None, keys, None, None, None, None


def relation_divergence(student: Tensor, teacher: Tensor, student_keys: Tensor, teacher_keys: Tensor, weight: Tensor,
                        tau: float, usable: Tensor | None = None) -> Tensor:
    """Sum over g, r, j of ``weight[g, r]`` * KL(teacher || student) of the softmax over the M keys of set j.

    student [G, R, C], teacher [G, R, D]: rows, of unit length. student_keys [G, J, M, C], teacher_keys [G, J, M, D]:
    G times J sets of vectors that each row of the same g is compared with. weight: [G, R]. usable: bool [M], columns
    that take part (None = all). tau: temperature of the similarities. All in the student's dtype. Only ``student`` and
    ``student_keys`` get gradients, and those cannot be differentiated again."""
    if not torch.is_grad_enabled():  # inside the function this can no longer be told
        student, student_keys = student.detach(), student_keys.detach()
    return RelationDivergence.apply(student, teacher, student_keys, teacher_keys, weight, tau, usable)


def pixel_rows(feature: Tensor) -> Tensor:
    """A map [B, C, h, w] as vectors [B, h * w, C] of unit length, in float32 or better."""
    return F.normalize(at_least_float32(feature), dim=1).flatten(2).transpose(1, 2).contiguous()


def grouped_relation_loss(student: Tensor, teacher: Tensor, group_size: int, tau: float, fast: bool = True) -> Tensor:
    """Mean over images i, their R rows and the images j of i's group of KL(teacher || student).

    student [B, R, C], teacher [B, R, D]: rows of unit length; one of image i gives a distribution over the R rows of
    image j. Groups: see ``losses/core/groups.py``; every image has the same weight. The teacher gets no gradient.
    fast: make each similarity once (``losses/core/relation_sums.py``), equal up to rounding."""
    if fast and sums_suffice(tau):
        return pair_relation_loss(student, teacher, group_size, tau)
    batch, rows, _ = student.shape
    total = student.new_zeros(())
    for keys in zip(split_groups(student, group_size), split_groups(teacher, group_size), strict=True):
        groups, count = keys[0].shape[:2]
        weight = student.new_full((groups, count * rows), 1 / (batch * count * rows))
        total = total + relation_divergence(*(k.flatten(1, 2) for k in keys), *keys, weight, tau)
    return total


def queue_relation_loss(student: Tensor, teacher: Tensor, keys: Tensor, weight: Tensor, tau: float,
                        usable: Tensor | None = None, fast: bool = True) -> Tensor:
    """Sum over r of ``weight[r]`` * KL(teacher || student) of the softmax over M keys.

    student, teacher [R, C]: rows, of unit length, as are the keys [M, C], which get no gradient. weight: [R]. usable:
    bool [M] or None = all. fast: in fewer passes (``losses/core/relation_sums.py``), equal up to rounding."""
    if fast and sums_suffice(tau):
        return key_relation_loss(student, teacher, keys, weight, tau, usable)
    sets = keys[None, None]
    return relation_divergence(student[None], teacher[None], sets, sets, weight[None], tau, usable)


def minibatch_pixel_loss(student: Tensor, teacher: Tensor, group_size: int = 2, tau: float = 0.1, pool: int = 1,
                         fast: bool = True) -> Tensor:
    """Mini-batch pixel-to-pixel relations of student [B, C, h, w] and teacher [B, D, h, w], in float32 or better.

    For each ordered pair (i, j) of images of a group, the mean over the pixels of i of the KL divergence between the
    softmaxes of their cosines to the pixels of j over ``tau``; then the mean over the pairs (no tau^2). pool: average
    pooling first, with smaller windows at the edge. fast: see :func:`grouped_relation_loss`. Raises UserError on maps
    that do not fit each other or the pooling."""
    check_maps("cirkd", student, teacher)
    height, width = student.shape[-2:]
    if min(height, width) < pool:
        raise UserError(f"cirkd: a {height}x{width} map is too small to be pooled by {pool}", settings=["cirkd_pool"])
    maps = [at_least_float32(x) for x in (student, teacher.detach())]
    if pool > 1:
        maps = [F.avg_pool2d(x, pool, ceil_mode=True) for x in maps]
    return grouped_relation_loss(*map(pixel_rows, maps), group_size, tau, fast)
