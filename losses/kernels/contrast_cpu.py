"""L1 distances and their gradient on the CPU, from ``contrast_cpu.cpp``."""
from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from losses.kernels.build import library

SOURCE = Path(__file__).with_name("contrast_cpu.cpp")
NAMES = {torch.float32: "float32", torch.float64: "float64"}


def is_available() -> bool:
    """Whether the library is there, compiling it if need be."""
    return library(SOURCE) is not None


def call(name: str, arrays: tuple[Tensor, ...], shape: torch.Size) -> None:
    """Run a function of the library on contiguous CPU arrays of one dtype; shape: (patches, rows, depth)."""
    function = library(SOURCE)[f"{name}_{NAMES[arrays[0].dtype]}"]
    function.restype = None
    function(*(ctypes.c_void_p(x.data_ptr()) for x in arrays), *map(ctypes.c_int64, shape), torch.get_num_threads())


def l1_distances(student: Tensor, teacher: Tensor) -> Tensor:
    """[P, Q, Q]: the L1 distance of student row i [P, Q, D] to teacher row j [P, Q, D] of the same patch."""
    out = student.new_empty((*student.shape[:2], student.shape[1]))
    call("l1_distances", (student, teacher, out), student.shape)
    return out


def weighted_signs(weights: Tensor, student: Tensor, teacher: Tensor, out: Tensor) -> None:
    """out[p, i] = sum over j of weights[p, i, j] * sign(student[p, i] - teacher[p, j]); weights [P, Q, Q]."""
    call("weighted_signs", (weights, student, teacher, out), student.shape)
