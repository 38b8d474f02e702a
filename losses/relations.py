"""The divergence between two networks' similarities to a set of vectors, for CIRKD and CIRKDv2, without ever holding
all the similarities.

Gradients of a scalar are linear in the incoming one, so they can be made in the forward pass, block of rows by block
of rows, while the similarities of the block are at hand: nothing is computed twice, and what is kept has the size of
the inputs. Nothing here waits for the device.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: similarities computed at a time, by either network; three blocks of that size exist
BLOCK = 2 ** 23
#: finite, so that a row without any usable column gives 0 rather than NaN
UNUSABLE = -1e30


def full_precision(x: Tensor) -> torch.autocast:
    """Context on the device of ``x`` in which matrix products keep the dtype of their operands."""
    return torch.autocast(x.device.type, enabled=False)


def blocks(groups: int, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Pieces (of the groups, of their rows) of at most :data:`BLOCK` similarities, or one row, that cover all of them.

    Small groups go together, and a group that is too large is cut into rows.
    """
    most = max(BLOCK // max(columns, 1), 1)
    some, length = max(most // max(rows, 1), 1), max(min(most, rows), 1)
    for group in range(0, groups, some):
        for row in range(0, rows, length):
            yield slice(group, group + some), slice(row, row + length)


def compare(student: Tensor, teacher: Tensor, student_keys: Tensor, teacher_keys: Tensor, usable: Tensor | None,
            space: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(KL(p || q) summed over the sets [g, r], q - p [g, r, J * M]) of a block, in the memory of ``space``.

    student [g, r, C], teacher [g, r, D]: rows, over the temperature. student_keys [g, J * M, C], teacher_keys
    [g, J * M, D]. q and p are the student's and the teacher's softmax over M keys. space: three times [g, r, J, M].
    """
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
        ours, theirs = student_keys.flatten(1, 2), teacher_keys.flatten(1, 2)
        rows_gradient = student.new_empty(student.shape) if ctx.needs_input_grad[0] else None
        keys_gradient = ours.new_zeros(ours.shape) if ctx.needs_input_grad[2] else None
        divergence = torch.empty_like(weight)
        space: list[Tensor] = []
        with full_precision(student):
            for g, r in blocks(*student.shape[:2], sets.numel()):
                s, factor = student[g, r], weight[g, r, None] / tau
                space = space or [s.new_empty(*s.shape[:2], *sets) for _ in range(3)]  # no later block is larger
                divergence[g, r], difference = compare(s / tau, teacher[g, r] / tau, ours[g], theirs[g], usable,
                                                       [x[:len(s), :s.shape[1]] for x in space])
                if rows_gradient is not None:
                    rows_gradient[g, r] = torch.bmm(difference, ours[g]) * factor
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
    G times J sets of vectors that each row of the same g is compared with. weight: [G, R]. usable: bool [M], which
    columns take part (None = all). tau: temperature of the similarities. All in the student's dtype. Only ``student``
    and ``student_keys`` get gradients, and those cannot be differentiated again.
    """
    if not torch.is_grad_enabled():  # inside the function this can no longer be told
        student, student_keys = student.detach(), student_keys.detach()
    return RelationDivergence.apply(student, teacher, student_keys, teacher_keys, weight, tau, usable)
