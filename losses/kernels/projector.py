"""The 3x3 convolutions of a projector with less work and memory, above all the first with the alignment folded into it.

With the map s [B, C_s, H, W], its mask K, the alignment A s + b to C_t channels and the convolution W:

    W * (K (A s + b)) = (W A) * (K s) + (W b) * K

so W A, and W b for a channel that holds the mask itself, are one convolution of C_s + 1 channels instead of C_t. Its
weight is made anew in each step, and gradients reach A, b and W through it. Zeros around the map are zeros of the mask
as well, so the border is exact.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F


def folded_channels(student_channels: int) -> int:
    """Input channels of the folded convolution: the student's, the mask, and as many of weight 0 as make a multiple of
    8, which the matrix units of GPUs ask for."""
    return (student_channels // 8 + 1) * 8


def fold_pays(student_channels: int, teacher_channels: int, positions: int) -> bool:
    """Whether the fold saves multiplications for a map of B * H * W ``positions``. Per pass, in units of C_t:

    apart: positions * (C_s + 9 C_t); folded: 9 C_f * positions, and 9 C_f * C_t for the weight itself."""
    folded = 9 * folded_channels(student_channels) * (positions + teacher_channels)
    return folded < positions * (student_channels + 9 * teacher_channels)


def fold_alignment(align: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    """Weight [O, C_f, 3, 3] of the folded convolution, C_f = :func:`folded_channels`, in half precision under autocast.
    align [C_t, C_s, 1, 1], bias [C_t], weight [O, C_t, 3, 3]."""
    columns = torch.cat([align.flatten(1), bias[:, None]], dim=1)
    columns = F.pad(columns, (0, folded_channels(align.shape[1]) - columns.shape[1]))
    # as a convolution of O images of 3x3: no copy of the weight, and its memory format is kept
    return F.conv2d(weight, columns.t()[:, :, None, None])


def masked_input(student: Tensor, keep: Tensor, weight: Tensor) -> Tensor:
    """Input of a convolution with ``weight`` [O, C, 3, 3], and in its memory format: the student's map [B, C_s, H, W]
    times ``keep`` [B or 1, 1, H, W], non-zero where a position is kept, and that mask itself in the C - C_s others."""
    x = F.pad(student, (0, 0, 0, 0, 0, weight.shape[1] - student.shape[1]), value=1.0) * keep.to(student.dtype)
    return x.contiguous(memory_format=torch.contiguous_format if weight.is_contiguous() else torch.channels_last)


def _conv_gradients(of_out: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> list[Tensor]:
    """Gradients of the input, the weight and the bias of a 3x3 convolution that keeps the size; None = not needed."""
    return torch.ops.aten.convolution_backward(of_out, x, weight, [len(weight)], [1, 1], [1, 1], [1, 1], False, [0, 0],
                                               1, needs)


class _MaskedConv(torch.autograd.Function):
    """Makes its masked input a second time in the backward pass, which costs next to nothing, and does not keep it."""

    @staticmethod
    def forward(ctx: FunctionCtx, student: Tensor, keep: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(student, keep, weight)
        return F.conv2d(masked_input(student, keep, weight), weight, bias, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, of_out: Tensor) -> tuple[Tensor | None, ...]:
        student, keep, weight = ctx.saved_tensors
        student_needs, _, *others = ctx.needs_input_grad
        x = masked_input(student, keep, weight)
        of_x, of_weight, of_bias = _conv_gradients(of_out, x, weight, [student_needs, *others])
        of_student = of_x[:, :student.shape[1]] * keep.to(of_x.dtype) if student_needs else None
        return of_student, None, of_weight, of_bias


class _ReLUConv(torch.autograd.Function):
    """Rectifies its input in place, and in the backward pass the gradient of that as well."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        x.relu_()
        ctx.mark_dirty(x)
        ctx.save_for_backward(x, weight)
        return x, F.conv2d(x, weight, bias, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, _: None, of_out: Tensor) -> tuple[Tensor | None, ...]:
        rectified, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = _conv_gradients(of_out, rectified, weight, list(ctx.needs_input_grad))
        if of_x is not None:
            torch.ops.aten.threshold_backward.grad_input(of_x, rectified, 0, grad_input=of_x)
        return of_x, of_weight, of_bias


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype that autocast gives to a convolution."""
    kind = tensors[0].device.type
    return [x.to(torch.get_autocast_dtype(kind)) for x in tensors] if torch.is_autocast_enabled(kind) else [*tensors]


def masked_conv(student: Tensor, keep: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """3x3 convolution [B, O, H, W] of :func:`masked_input`. weight: [O, C_s, 3, 3] for the map alone, or that of
    :func:`fold_alignment`; bias [O]."""
    student, weight, bias = _autocast(student, weight, bias)
    return _MaskedConv.apply(student, keep, weight, bias)


def relu_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """3x3 convolution [B, O, H, W] of the map [B, C, H, W] after a ReLU, which overwrites the map. weight [O, C, 3, 3],
    bias [O]."""
    return _ReLUConv.apply(*_autocast(x, weight, bias))[1]
