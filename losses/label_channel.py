"""The label as a fourth input channel, the idea of LAD: a code of each pixel's class, and noise."""
from __future__ import annotations

import torch
from torch import Tensor

from models.preprocess import Preprocess

#: size of a code of 1, in units of a pixel value 0..255
PIXEL_SCALE = 100.0


def fixed_codes(num_class: int) -> Tensor:
    """[K + 1] evenly spaced codes, the last one for "ignored": (k - (K + 1) / 2) / 10, for 21 classes as released.

    Where they would leave [-2, 2] they stand closer, as the codes that the teacher learns with do.
    """
    count = num_class + 1
    return (torch.arange(count) - count / 2) * min(0.1, 4 / count)


def random_codes(batch: int, num_class: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """[B, K + 1] standard normal numbers: codes that every image has for itself."""
    return torch.randn(batch, num_class + 1, generator=generator, device=device)


def channel_scale(preprocess: Preprocess) -> float:
    """``PIXEL_SCALE`` in units of the preprocessed images: 100 for BGR minus mean, about 1.7 for RGB mean/std."""
    return PIXEL_SCALE / (preprocess.scale * sum(preprocess.std) / len(preprocess.std))


def with_labels(images: Tensor, target: Tensor, codes: Tensor, noise: float, scale: float | Tensor,
                ignore_label: int = -1, generator: torch.Generator | None = None) -> Tensor:
    """Images and, as fourth channel, ``scale * (code of the pixel's class + noise * n)``: float [B, 4, H, W].

    images: float [B, 3, H, W]. target: int64 [B, H, W], classes 0..K-1 or ``ignore_label``. codes: [K + 1] or, one row
    per image, [B, K + 1]; the last one is for ignored pixels. n: a standard normal number per pixel, in float32.
    """
    ignored = codes.shape[-1] - 1
    index = torch.where(target == ignore_label, ignored, target).flatten(1)
    painted = codes.expand(len(target), -1).gather(1, index).view(target.shape)
    normal = torch.randn(target.shape, generator=generator, device=target.device)
    return torch.cat([images, (scale * (painted + noise * normal)).unsqueeze(1).to(images.dtype)], dim=1)
