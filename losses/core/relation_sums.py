"""The relations of ``losses/core/relations.py`` with fewer products and passes, for vectors of unit length.

Their similarities over the temperature are at most 1 / tau, so their exponentials can be summed as they are, without
the largest of a row, in any order. With the sums A = sum exp(a), B = sum exp(b) and T = sum exp(b) (b - a) of a row,
where a and b are the student's and the teacher's similarities, its divergence is T / B + log A - log B.
The similarities of two images then serve the rows of both, and those of an image to itself are symmetric: half of the
products make all the sums, and half of those for the gradient all of it. Nothing here waits for the device.
"""
from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations_with_replacement
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from losses.core.checks import full_precision
from losses.kernels.matmul import products

LARGEST = 40.0  # 1 / tau up to which the sums of exponentials are far from the ends of float32
TINY = 1e-30  # below any such sum; so that a row without any usable column gives 0 rather than NaN
TILE = 2 ** 23  # similarities computed at a time, by either network; on a CPU what its cache holds:
TILE_CPU, WIDTH_CPU = 2 ** 21, 256  # so many, in so many columns, as more make the products no faster
KEPT = 2 ** 24  # exponentials of a pair of images that are kept; those beyond are computed a second time


def sums_suffice(tau: float) -> bool:
    """Whether the exponentials of similarities over ``tau`` can be summed without a shift."""
    return 1 / tau <= LARGEST


def tile_width(rows: int, device: torch.device) -> int:
    """Columns of a tile of so many rows."""
    if device.type == "cpu":
        return min(max(TILE_CPU // max(rows, 1), 1), WIDTH_CPU)
    return max(TILE // max(rows, 1), 1)


def exponentiate(a: Tensor, b: Tensor) -> Tensor:
    """exp(b) (b - a); a and b become their exponentials."""
    weighted = b - a
    a.exp_()
    return weighted.mul_(b.exp_())


def divergences(sums: Tensor) -> Tensor:
    """KL(teacher || student) [n] of n rows from their sums A, B and T, [3, n]."""
    a, b = sums[:2].clamp(min=TINY)
    return sums[2] / b + a.log() - b.log()


class Tile(NamedTuple):
    """The similarities of the rows from ``first`` on to some columns. In the first ``square`` rows, which are the same
    vectors as the columns, every similarity is there twice: it counts for its row only."""
    columns: slice
    first: int
    square: int


class Pair(NamedTuple):
    """Images i and j of a group, each by (student's, teacher's) vectors [P, C], [P, D] over the root of the
    temperature. same: i is j, and the similarities above the diagonal are those below it."""
    i: tuple[Tensor, Tensor]
    j: tuple[Tensor, Tensor]
    same: bool

    def tiles(self) -> Iterator[Tile]:
        """Pieces that cover all similarities that are needed."""
        rows = len(self.j[0])
        width = tile_width(rows, self.j[0].device)
        for start in range(0, rows, width):
            end = min(start + width, rows)
            yield Tile(slice(start, end), start, end - start) if self.same else Tile(slice(start, end), 0, 0)

    def similarities(self, tile: Tile, network: int) -> Tensor:
        """Those of a tile by the student (0) or the teacher (1)."""
        return products(self.i[network][tile.first:], self.j[network][tile.columns])

    def room(self) -> list[int]:
        """How many exponentials to keep of the student and the teacher: first of the one with the longer vectors."""
        rows = len(self.j[0])
        needed = sum((rows - t.first) * (t.columns.stop - t.columns.start) for t in self.tiles())
        return [KEPT - needed, KEPT] if self.j[1].shape[1] >= self.j[0].shape[1] else [KEPT, KEPT - needed]


def pair_sums(pair: Pair, keep: bool) -> tuple[list[Tensor], dict[tuple[int, int], Tensor]]:
    """(sums [3, P] of the rows of i, and of those of j if it is another; kept exponentials by network and column)."""
    sums = [pair.i[0].new_zeros(3, len(pair.i[0])) for _ in range(1 if pair.same else 2)]
    kept, room = {}, pair.room() if keep else [0, 0]
    for tile in pair.tiles():
        similarities = [pair.similarities(tile, network) for network in (0, 1)]
        weighted = exponentiate(*similarities)
        for k, x in enumerate((*similarities, weighted)):
            sums[0][k, tile.first:] += x.sum(1)
            sums[-1][k, tile.columns] += x[tile.square:].sum(0)
        for network, x in enumerate(similarities):
            room[network] -= x.numel()
            if room[network] >= 0:
                kept[network, tile.columns.start] = x
    return sums, kept


def add_gradients(pair: Pair, sums: list[Tensor], kept: dict[tuple[int, int], Tensor], factor: float,
                  of_i: Tensor, of_j: Tensor) -> None:
    """Add the gradients of ``factor`` times all divergences of the pair to those of the student's vectors [P, C]."""
    scale_i, scale_j = (factor / side[:2] for side in (sums[0], sums[-1]))
    for tile in pair.tiles():
        a, b = (kept.pop((n, tile.columns.start), None) for n in (0, 1))
        a, b = (pair.similarities(tile, n).exp_() if x is None else x for n, x in enumerate((a, b)))
        a.mul_(scale_i[0, tile.first:, None] + scale_j[0, tile.columns])
        a.addcmul_(b, scale_i[1, tile.first:, None] + scale_j[1, tile.columns], value=-1)
        of_i[tile.first:].addmm_(a, pair.j[0][tile.columns])
        of_j[tile.columns].addmm_(a[tile.square:].mT, pair.i[0][tile.first + tile.square:])


class PairRelations(torch.autograd.Function):
    """:func:`pair_relation_loss`; the gradient is made in the forward pass, as in ``losses/core/relations.py``."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, group_size: int, tau: float) -> Tensor:
        batch, rows, _ = student.shape
        size = min(group_size or batch, batch)
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        root, total = tau ** 0.5, student.new_zeros(())
        with full_precision(student):
            vectors = list(zip(student / root, teacher / root, strict=True))
            for start in range(0, batch, size):
                group = range(start, min(start + size, batch))
                factor = 1 / (batch * len(group) * rows)
                for i, j in combinations_with_replacement(group, 2):
                    pair = Pair(vectors[i], vectors[j], i == j)
                    sums, kept = pair_sums(pair, gradient is not None)
                    total += factor * sum(divergences(side).sum() for side in sums)
                    if gradient is not None:
                        add_gradients(pair, sums, kept, factor / root, gradient[i], gradient[j])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * gradient, None, None, None


def pair_relation_loss(student: Tensor, teacher: Tensor, group_size: int, tau: float) -> Tensor:
    """``grouped_relation_loss`` of rows [B, R, C] and [B, R, D] of unit length where :func:`sums_suffice`."""
    return PairRelations.apply(student if torch.is_grad_enabled() else student.detach(), teacher, group_size, tau)


class KeyRelations(torch.autograd.Function):
    """:func:`key_relation_loss`; the gradient is made in the forward pass."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, keys: Tensor, weight: Tensor, tau: float,
                usable: Tensor | None) -> Tensor:
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        total, width = student.new_zeros(()), tile_width(len(keys), keys.device)
        with full_precision(student):
            for start in range(0, len(student), width):
                rows = slice(start, start + width)
                a, b = (products(keys, x[rows] / tau) for x in (student, teacher))  # [M, rows]
                weighted = exponentiate(a, b)
                if usable is not None:
                    for x in (a, b, weighted):
                        x.mul_(usable[:, None])
                sums = torch.stack([x.sum(0) for x in (a, b, weighted)])
                total += (divergences(sums) * weight[rows]).sum()
                if gradient is not None:
                    scale = weight[rows] / (tau * sums[:2].clamp(min=TINY))
                    difference = a.mul_(scale[0]).addcmul_(b, scale[1], value=-1)
                    torch.mm(difference.mT, keys, out=gradient[rows])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * gradient, None, None, None, None, None


def key_relation_loss(student: Tensor, teacher: Tensor, keys: Tensor, weight: Tensor, tau: float,
                      usable: Tensor | None = None) -> Tensor:
    """``queue_relation_loss``, of the same arguments, where :func:`sums_suffice`."""
    return KeyRelations.apply(student if torch.is_grad_enabled() else student.detach(), teacher, keys, weight, tau,
                              usable)
