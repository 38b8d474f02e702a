"""L1 distances and their gradient on CUDA, in Triton.

A program computes one tile of the result and walks along the axis that is summed over, with the sums in registers:
no [rows, rows, depth] anywhere, no atomics, and every sum runs over its terms in their order, so that equal distances
come out equal. ``tools/compile_kernels.py`` shows what becomes of the kernels without a GPU.
"""
from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


# Shapes are constants of a kernel: a run has one or two, and the interpreter wants them so in its loops. It also knows
# only the language's builtins: tl.full in place of tl.zeros.
@triton.jit
def distances_kernel(student, teacher, out, ROWS: tl.constexpr, DEPTH: tl.constexpr, DOWN: tl.constexpr,
                     ACROSS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, UNROLL: tl.constexpr):
    """out[p, i, j] = sum over d of |student[p, i, d] - teacher[p, d, j]|: the teacher's vectors are columns here.
    DOWN, ACROSS: tiles in a column and in a row of the result. UNROLL divides the number of terms of a sum."""
    program = tl.program_id(0)
    patch = (program // (DOWN * ACROSS)).to(tl.int64)
    i = program // ACROSS % DOWN * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
    j = program % ACROSS * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)[None, :]
    s = student + patch * ROWS * DEPTH + tl.minimum(i, ROWS - 1) * DEPTH
    t = teacher + patch * ROWS * DEPTH + j
    sums = tl.full((TILE_ROWS, TILE_COLUMNS), 0, student.dtype.element_ty)
    for start in range(0, DEPTH, UNROLL):
        for step in tl.static_range(UNROLL):
            d = start + step
            sums += tl.abs(tl.load(s + d) - tl.load(t + d * ROWS, j < ROWS, 0))
    tl.store(out + patch * ROWS * ROWS + i * ROWS + j, sums, (i < ROWS) & (j < ROWS))


@triton.jit
def signs_kernel(weights, student, teacher, out, ROWS: tl.constexpr, DEPTH: tl.constexpr, DOWN: tl.constexpr,
                 ACROSS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, UNROLL: tl.constexpr):
    """out[p, i, d] = sum over j of weights[p, i, j] * sign(student[p, i, d] - teacher[p, j, d]), sign(0) = 0."""
    program = tl.program_id(0)
    patch = (program // (DOWN * ACROSS)).to(tl.int64)
    i = program // ACROSS % DOWN * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
    d = program % ACROSS * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)[None, :]
    inside = (i < ROWS) & (d < DEPTH)
    s = tl.load(student + patch * ROWS * DEPTH + i * DEPTH + d, inside, 0)
    w = weights + patch * ROWS * ROWS + tl.minimum(i, ROWS - 1) * ROWS
    t = teacher + patch * ROWS * DEPTH + d
    sums = tl.full((TILE_ROWS, TILE_COLUMNS), 0, student.dtype.element_ty)
    for start in range(0, ROWS, UNROLL):
        for step in tl.static_range(UNROLL):
            j = start + step
            weight, column = tl.load(w + j), tl.load(t + j * DEPTH, d < DEPTH, 0)
            sums = tl.where(s != column, sums + tl.where(s > column, weight, -weight), sums)
    tl.store(out + patch * ROWS * DEPTH + i * DEPTH + d, sums, inside)


class Tiling(NamedTuple):
    """A kernel with the tiles that gave the fewest instructions and loads per term without spilling registers."""
    kernel: triton.JITFunction
    rows: int
    columns: int
    unroll: int
    warps: int

    def constants(self, dtype: torch.dtype, rows: int, depth: int, columns: int, terms: int) -> dict[str, int]:
        """The constants of the kernel for vectors [rows, depth] per patch; columns: of the result, terms: of a sum."""
        tile_rows = self.rows // 2 if dtype == torch.float64 else self.rows  # twice the registers per number
        return {"ROWS": rows, "DEPTH": depth, "DOWN": triton.cdiv(rows, tile_rows),
                "ACROSS": triton.cdiv(columns, self.columns), "TILE_ROWS": tile_rows, "TILE_COLUMNS": self.columns,
                "UNROLL": math.gcd(self.unroll, terms)}


DISTANCES = Tiling(distances_kernel, rows=16, columns=128, unroll=8, warps=1)
SIGNS = Tiling(signs_kernel, rows=32, columns=64, unroll=8, warps=4)


def launch(tiling: Tiling, arrays: tuple[Tensor, ...], patches: int, constants: dict[str, int]) -> None:
    """Run a kernel on contiguous arrays of one device."""
    device = arrays[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        tiling.kernel[(patches * constants["DOWN"] * constants["ACROSS"],)](*arrays, **constants,
                                                                           num_warps=tiling.warps)


def l1_distances(student: Tensor, teacher: Tensor) -> Tensor:
    """[P, Q, Q]: the L1 distance of student row i [P, Q, D] to teacher row j [P, Q, D] of the same patch."""
    patches, rows, depth = student.shape
    out = student.new_empty(patches, rows, rows)
    launch(DISTANCES, (student, teacher.mT.contiguous(), out), patches,
           DISTANCES.constants(student.dtype, rows, depth, rows, depth))
    return out


def weighted_signs(weights: Tensor, student: Tensor, teacher: Tensor, out: Tensor) -> None:
    """out[p, i] = sum over j of weights[p, i, j] * sign(student[p, i] - teacher[p, j]); weights [P, Q, Q]."""
    patches, rows, depth = student.shape
    launch(SIGNS, (weights, student, teacher, out), patches, SIGNS.constants(student.dtype, rows, depth, depth, rows))
