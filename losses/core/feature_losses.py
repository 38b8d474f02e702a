"""Losses of two feature maps that several methods are made of, and the modules that bring the student to them."""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses.core.checks import at_least_float32, check_maps
from losses.kernels.projector import fold_alignment, fold_pays, masked_conv
from utils.errors import UserError

FEATURE_NORMS = ("none", "l2", "channel", "position")


def normalize_map(x: Tensor, norm: str) -> Tensor:
    """A map [B, C, h, w] on the scale that an error is measured in, of :data:`FEATURE_NORMS`.

    l2: each position's C-vector at unit length. channel, position: mean 0 and variance 1 over the positions of each
    channel, or over the channels of each position."""
    if norm == "none":
        return x
    if norm == "l2":
        return F.normalize(x, dim=1)
    variance, mean = torch.var_mean(x, dim={"channel": (2, 3), "position": 1}[norm], correction=0, keepdim=True)
    return (x - mean) * (variance + 1e-6).rsqrt()


def feature_mse_loss(student: Tensor, teacher: Tensor, norm: str = "none", method: str = "mse") -> Tensor:
    """Mean of (n(student) - n(teacher))^2, n = :func:`normalize_map`, of two maps [B, C, h, w], in float32 or better;
    UserError, which begins with ``method``, if their shapes differ. No gradient reaches the teacher."""
    check_maps(method, student, teacher, channels=True)
    student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
    return F.mse_loss(normalize_map(student, norm), normalize_map(teacher, norm))


class CriterionFitNet(nn.Module):
    """Mean squared error of the teacher's map and the student's after a 1x1 convolution without bias (Romero et al.,
    ICLR 2015), which is there also when the widths are equal, as in the CIRKD code. method: begins error messages."""

    def __init__(self, student_channels: int, teacher_channels: int, method: str = "fitnet") -> None:
        super().__init__()
        self.method = method
        self.conv = nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=False)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Scalar, as :func:`feature_mse_loss`. student [B, C_s, h, w], teacher [B, C_t, h, w]."""
        return feature_mse_loss(self.conv(student), teacher, method=self.method)


def unit_vectors(x: Tensor) -> Tensor:
    """Vectors along the last axis at unit length; zero where the length is below 1e-12, with a zero gradient there."""
    norm = x.norm(dim=-1, keepdim=True)
    zero = norm <= 1e-12
    return x * norm.masked_fill(zero, 1.0).reciprocal().masked_fill(zero, 0.0)


def attention_map(feature: Tensor) -> Tensor:
    """Unit vectors [B, h w]: mean over the channels of the squares of [B, C, h, w] (Zagoruyko and Komodakis, ICLR
    2017), in float32 or better, as squares of half-precision features overflow."""
    return unit_vectors(at_least_float32(feature).square().mean(dim=1).flatten(1))


def random_keep_mask(draw: Tensor, ratio: float) -> Tensor:
    """True where a position is kept: about 1 - ``ratio`` of them. draw: uniform numbers [B, 1, H, W]."""
    return draw <= 1.0 - ratio


def masked_feature_loss(projected: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of two maps [B, C, H, W], summed over C, H, W and averaged over the batch."""
    return (at_least_float32(projected) - at_least_float32(teacher)).square().sum() / len(projected)


def conv3x3(channels: int) -> nn.Conv2d:
    """3x3 convolution that keeps width and size."""
    return nn.Conv2d(channels, channels, kernel_size=3, padding=1)


class PlainProjector(nn.Sequential):
    """3x3 convolution, ReLU, 3x3 convolution: [B, C, H, W] -> the same shape (MGD's generator)."""

    def __init__(self, channels: int) -> None:
        super().__init__(conv3x3(channels), nn.ReLU(inplace=True), conv3x3(channels))

    @property
    def first(self) -> nn.Conv2d:
        """The convolution that reads the map."""
        return self[0]

    def rest(self, x: Tensor) -> Tensor:
        """What follows the first convolution."""
        return self[2](self[1](x))


def aligner(student_channels: int, teacher_channels: int) -> nn.Module:
    """1x1 convolution to the teacher's width; nothing where the widths are equal."""
    same = student_channels == teacher_channels
    return nn.Identity() if same else nn.Conv2d(student_channels, teacher_channels, kernel_size=1)


def restore(student: Tensor, keep: Tensor, align: nn.Module, projector: nn.Module, fast: bool) -> Tensor:
    """projector(keep * align(student)), [B, C_t, H, W], of a map [B, C_s, H, W]. keep: [B or 1, 1, H, W]; align: an
    :func:`aligner`; projector: has a ``first`` convolution and a ``rest``; fast: fold the alignment into the first
    where that pays."""
    first, positions = projector.first, student[:, 0].numel()
    if fast and isinstance(align, nn.Identity):
        return projector.rest(masked_conv(student, keep, first.weight, first.bias))
    if fast and fold_pays(align.in_channels, align.out_channels, positions):
        weight = fold_alignment(align.weight, align.bias, first.weight)
        return projector.rest(masked_conv(student, keep, weight, first.bias))
    aligned = align(student)
    return projector(aligned * keep.to(aligned.dtype))


def check_widths(method: str, student: Tensor, teacher: Tensor, widths: tuple[int, int]) -> None:
    """Raise UserError unless maps [B, C, H, W] agree in size and have the widths of (student, teacher)."""
    if (student.shape[1], teacher.shape[1]) != widths:
        raise UserError(f"{method}: student map {tuple(student.shape)} and teacher map {tuple(teacher.shape)}: "
                        f"expected {widths[0]} and {widths[1]} channels")
    check_maps(method, student, teacher)


def dice_overlap(masks: Tensor, eps: float = 1e-12) -> Tensor:
    """Mean Dice coefficient 2 <a, b> / (|a|^2 + |b|^2) over the pairs of masks [B, T, P] of an image; 0 without any."""
    count = masks.shape[1]
    gram = masks @ masks.transpose(1, 2)
    squares = gram.diagonal(dim1=1, dim2=2) + eps
    dice = 2 * gram / (squares[:, :, None] + squares[:, None, :])
    other = 1 - torch.eye(count, dtype=dice.dtype, device=dice.device)
    return (dice * other).sum() / (len(masks) * max(count * (count - 1), 1))
