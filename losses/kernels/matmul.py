"""Matrix products on the CPU through oneDNN, which is faster there than the BLAS of PyTorch on some processors."""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST = 20480  #: numbers of a single input up to which PyTorch does not hand a convolution to oneDNN


def suits_onednn(x: Tensor, y: Tensor) -> bool:
    """Whether :func:`products` of these goes through oneDNN: large enough, float32 on a CPU, x contiguous."""
    return (x.device.type == "cpu" and x.dtype == y.dtype == torch.float32 and x.numel() > SMALLEST and y.numel() > 0
            and x.is_contiguous() and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)


def products(x: Tensor, y: Tensor) -> Tensor:
    """x [R, C] times the transpose of y [T, C]: [R, T], contiguous. Meant for R well above T, and for use without a
    graph. Where :func:`suits_onednn` holds it is a 1x1 convolution, whose result is that of ``x @ y.mT`` up to
    rounding."""
    if not suits_onednn(x, y):
        return x @ y.mT
    image = x.view(1, len(x), 1, -1).permute(0, 3, 1, 2)  # [1, C, R, 1], channels last
    # the dilation changes nothing in a 1x1 kernel, but without one a single thread would be given the BLAS
    return F.conv2d(image, y[:, :, None, None], dilation=2).permute(0, 2, 3, 1).view(len(x), -1)
