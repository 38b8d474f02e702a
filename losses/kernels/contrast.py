"""The contrast of Af-DCD as one operator: L1 distances of every pair of rows in a patch, masked log-softmax, gradient.

It goes through the patches in blocks, so that neither [P, Q, Q, D] nor all of [P, Q, Q] is ever in memory. The gradient
of a scalar is linear in the incoming one: it is made in the forward pass, while a block's distances are at hand, and
only scaled in the backward pass. Nothing else is kept for it. The sums over rows have three forms (:data:`FORMS`).
"""
from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from losses.kernels import contrast_cpu
from utils.errors import UserError
from utils.tensor_files import first_line

log = logging.getLogger("afdcd")

#: numbers in a block's [patches, Q, Q]: on a CPU, whose caches they fit, and elsewhere
BLOCK = 2 ** 20, 2 ** 23
#: numbers in the differences [rows, Q, D] that the vectorized form holds at a time
SCRATCH = 2 ** 23


class Form(NamedTuple):
    """What differs between the forms; contiguous [P, Q, D] rows go in.

    l1_distances(student, teacher) -> [P, Q, Q]. weighted_signs(weights [P, Q, Q], student, teacher, out [P, Q, D]):
    out[p, i] = sum over j of weights[p, i, j] * sign(student[p, i] - teacher[p, j]), where sign(0) = 0."""
    l1_distances: Callable[[Tensor, Tensor], Tensor]
    weighted_signs: Callable[[Tensor, Tensor, Tensor, Tensor], None]


def cdist(student: Tensor, teacher: Tensor) -> Tensor:
    """:attr:`Form.l1_distances` by PyTorch."""
    return torch.cdist(student, teacher, p=1.0)


def signs_by_rows(weights: Tensor, student: Tensor, teacher: Tensor, out: Tensor) -> None:
    """:attr:`Form.weighted_signs` by PyTorch, in blocks of rows whose differences are few enough for any device."""
    rows, depth = student.shape[1:]
    length = min(max(SCRATCH // (rows * depth), 1), rows)
    space = student.new_empty(length, rows, depth)
    for w, s, t, o in zip(weights, student, teacher, out, strict=True):
        for i in range(0, rows, length):
            signs = torch.sub(s[i:i + length, None], t, out=space[:rows - i]).sign_()
            torch.bmm(w[i:i + length, None], signs, out=o[i:i + length, None])


def signs_by_cdist(weights: Tensor, student: Tensor, teacher: Tensor, out: Tensor) -> None:
    """The same by the backward pass of ``cdist``, which on the CPU, and only there, holds no differences."""
    out.copy_(torch.ops.aten._cdist_backward(weights, student, teacher, 1.0, weights))  # the last is not read at p = 1


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def vectorized(device: str) -> Form:
    return Form(cdist, signs_by_cdist if device == "cpu" else signs_by_rows)


def compiled(device: str) -> Form:
    if not (device == "cpu" and contrast_cpu.is_available()):
        raise UserError(f"contrast: the compiled form needs CPU tensors and a C++ compiler, got {device} tensors")
    return Form(contrast_cpu.l1_distances, contrast_cpu.weighted_signs)


def triton(device: str) -> Form:
    if not (device == "cuda" and has_triton()):
        raise UserError(f"contrast: the triton form needs CUDA tensors and the package triton, got {device} tensors")
    from losses.kernels import contrast_triton  # only where triton is there

    return Form(contrast_triton.l1_distances, contrast_triton.weighted_signs)


#: each raises UserError where the device or the machine cannot run it; "vectorized" works everywhere
FORMS: dict[str, Callable[[str], Form]] = {"vectorized": vectorized, "compiled": compiled, "triton": triton}


def triton_problem() -> str:
    """Why Triton's kernels cannot be used on the current GPU, "" where they can."""
    if not has_triton():
        return "the package triton is not installed"
    rows = torch.ones(1, 1, 1, device="cuda")
    try:
        triton("cuda").l1_distances(rows, rows)
    except Exception as error:  # no C compiler, no headers of Python, an old GPU: every fault is one of its own kind
        return f"triton does not work here ({first_line(error)})"
    return ""


@functools.cache
def best_form(device: str) -> str:
    """The name of the fastest form on a type of device; one line of the log says which."""
    name, why = "vectorized", ""
    if device == "cpu" and contrast_cpu.is_available():
        name = "compiled"
    elif device == "cuda":
        problem = triton_problem()
        name, why = ("vectorized", f": slower; {problem}") if problem else ("triton", "")
    log.info("contrast on %s: %s form%s", device, name, why)
    return name


def choose_form(implementation: str, device: str) -> Form:
    """The form of that name, "auto" = the fastest; raises UserError where it cannot be had."""
    if implementation not in ("auto", *FORMS):
        raise UserError(f"contrast: unknown form {implementation!r}; expected one of auto, {', '.join(FORMS)}")
    return FORMS[best_form(device) if implementation == "auto" else implementation](device)


def patches_at_once(rows: Tensor, chunk: int = 0) -> int:
    """How many patches of [P, Q, D] rows make a block; at most ``chunk`` where that is not 0."""
    block = max(BLOCK[rows.device.type != "cpu"] // rows.shape[1] ** 2, 1)
    return min(block, chunk) if chunk else block


def run_blocks(form: Form, student: Tensor, teacher: Tensor, excluded: Tensor, tau: float, chunk: int,
               with_gradient: bool) -> tuple[Tensor, Tensor]:
    """(losses [P, Q], their gradient [P, Q, D]; empty without) of contiguous rows; see :func:`contrast`."""
    losses = student.new_empty(student.shape[:2])
    gradient = torch.empty_like(student) if with_gradient else student.new_empty(0)
    unused = student.new_zeros(excluded.shape).masked_fill_(excluded, float("-inf"))
    block = patches_at_once(student, chunk)
    for first in range(0, len(student), block):
        piece = slice(first, first + block)
        distances = form.l1_distances(student[piece], teacher[piece])
        logits = torch.sub(unused, distances, alpha=1 / tau, out=distances)
        losses[piece] = -logits.log_softmax(-1).diagonal(dim1=-2, dim2=-1)
        if with_gradient:
            weights = logits.softmax(-1)  # exp(log_softmax) takes 10 times as long on a CPU where it underflows
            weights.diagonal(dim1=-2, dim2=-1).sub_(1)
            form.weighted_signs(weights, student[piece], teacher[piece], gradient[piece])
    return losses, gradient.div_(-tau)


def forward(student: Tensor, teacher: Tensor, excluded: Tensor, tau: float, implementation: str, chunk: int,
            with_gradient: bool) -> tuple[Tensor, Tensor]:
    form = choose_form(implementation, student.device.type)
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        return run_blocks(form, student.contiguous(), teacher.contiguous(), excluded, tau, chunk, with_gradient)


def forward_shapes(student: Tensor, teacher: Tensor, excluded: Tensor, tau: float, implementation: str, chunk: int,
                   with_gradient: bool) -> tuple[Tensor, Tensor]:
    gradient = student.new_empty(student.shape) if with_gradient else student.new_empty(0)
    return student.new_empty(student.shape[:2]), gradient


def keep_gradient(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def backward(ctx, incoming: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return gradient * incoming.unsqueeze(-1), None, None, None, None, None, None


def distances(student: Tensor, teacher: Tensor, implementation: str) -> Tensor:
    return choose_form(implementation, student.device.type).l1_distances(student.contiguous(), teacher.contiguous())


def distances_shape(student: Tensor, teacher: Tensor, implementation: str) -> Tensor:
    return student.new_empty(*student.shape[:2], student.shape[1])


# Operators of their own: compiler, autocast and simulated devices see one node each. `torch.library.custom_op` would do
# the same, but loads the whole compiler at its first call, which takes seconds.
LIBRARY = torch.library.Library("afdcd", "DEF")
LIBRARY.define("contrast(Tensor student, Tensor teacher, Tensor excluded, float tau, str implementation, int chunk, "
               "bool with_gradient) -> (Tensor, Tensor)")
LIBRARY.define("l1_distances(Tensor student, Tensor teacher, str implementation) -> Tensor")
for name, function, shapes in (("contrast", forward, forward_shapes), ("l1_distances", distances, distances_shape)):
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"afdcd::{name}", shapes, lib=LIBRARY)
torch.library.register_autograd("afdcd::contrast", backward, setup_context=keep_gradient, lib=LIBRARY)


def contrast(student: Tensor, teacher: Tensor, excluded: Tensor, tau: float, implementation: str = "auto",
             chunk: int = 0) -> Tensor:
    """Sum over all rows of -log softmax of the positive among positive and negatives, at temperature ``tau``.

    student, teacher: rows [P, Q, D] of P patches, computed in float32 or better. The logits of student row i are its
    negative L1 distances to the teacher rows j of its patch over ``tau``; j = i is the positive. excluded: bool [Q, Q],
    pairs (i, j) that take no part, never i = j. implementation: one of :data:`FORMS`, or "auto" for the device's
    fastest. chunk: largest number of patches computed at a time, 0 = as suits the device; the result is the same. Only
    the student gets a gradient, which cannot be differentiated again; it takes the memory of the student's rows."""
    if student.shape != teacher.shape:
        raise UserError(f"contrast: student rows {tuple(student.shape)} and teacher rows {tuple(teacher.shape)}: "
                        "expected the same shape")
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    with_gradient = torch.is_grad_enabled() and student.requires_grad
    losses, _ = torch.ops.afdcd.contrast(student.to(dtype), teacher.detach().to(dtype), excluded, tau, implementation,
                                         chunk, with_gradient)
    return losses.sum()


def l1_distances(student: Tensor, teacher: Tensor, implementation: str = "auto") -> Tensor:
    """L1 distances [P, Q, Q] of student row i to teacher row j in each patch of float32 or float64 rows [P, Q, D].
    Without gradients. implementation: as for :func:`contrast`."""
    return torch.ops.afdcd.l1_distances(student.detach(), teacher.detach(), implementation)
