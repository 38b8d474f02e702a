"""From the uint8 images that the data pipeline delivers to the float images that a network wants."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError

Triple = tuple[float, float, float]


@lru_cache(maxsize=32)
def _per_channel(values: Triple, device: torch.device) -> Tensor:
    """[1, 3, 1, 1] float32 on ``device``; kept, so that a training step copies nothing to the device."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1)


@dataclass(frozen=True)
class Preprocess:
    """What a network expects of its input: channel order, then ``(pixel / scale - mean) / std``.

    channel_order: 'bgr' or 'rgb'. mean, std: one value per channel *in that order*. scale: divides the pixel values
    0..255 first. Raises ValueError for anything else."""

    channel_order: str
    mean: Triple
    std: Triple
    scale: float

    def __post_init__(self) -> None:
        if self.channel_order not in ("bgr", "rgb"):
            raise ValueError(f"channel_order must be 'bgr' or 'rgb', got {self.channel_order!r}")
        for name in ("mean", "std"):
            values = tuple(float(v) for v in getattr(self, name))
            if len(values) != 3 or not all(math.isfinite(v) for v in values):
                raise ValueError(f"{name} must be 3 finite numbers, got {getattr(self, name)!r}")
            object.__setattr__(self, name, values)
        object.__setattr__(self, "scale", float(self.scale))
        if not all(v > 0 and math.isfinite(v) for v in (*self.std, self.scale)):
            raise ValueError(f"std and scale must be positive, got {self.std} and {self.scale}")

    def __call__(self, images: Tensor, valid: Tensor | None = None) -> Tensor:
        """Normalize uint8 images [B, 3, H, W], BGR, to float32; UserError for a wrong shape or type.

        valid: of the real pixels, as in :func:`inside`, or None when all are real; the others become 0.0, so that
        padding is black *after* the mean was subtracted."""
        if images.dim() != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise UserError(f"preprocessing expects uint8 images [B, 3, H, W], got {images.dtype} {list(images.shape)}")
        x = (images.flip(1) if self.channel_order == "rgb" else images).to(torch.float32)
        if self.scale != 1.0:
            x = x / self.scale
        x = x - _per_channel(self.mean, x.device)
        if self.std != (1.0, 1.0, 1.0):
            x = x / _per_channel(self.std, x.device)
        return x if valid is None else x.masked_fill(~inside(valid, images.shape[-2:]).unsqueeze(1), 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; :meth:`from_dict` reads them back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def __str__(self) -> str:
        return next((name for name, known in _NAMED.items() if known == self), repr(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """The inverse of :meth:`to_dict`. Raises ValueError when a field is missing, unknown or out of range."""
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"not a preprocessing description: {error}") from error


def inside(valid: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """bool [B, H, W]: True in each image's half-open rectangle. valid: int [B, 4] (top, bottom, left, right)."""
    rows = torch.arange(size[0], device=valid.device)
    cols = torch.arange(size[1], device=valid.device)
    top, bottom, left, right = (v.unsqueeze(1) for v in valid.long().unbind(1))
    return ((rows >= top) & (rows < bottom)).unsqueeze(2) & ((cols >= left) & (cols < right)).unsqueeze(1)


#: all networks of this repository by default, and the released CIRKD and Af-DCD weights
CAFFE_BGR = Preprocess("bgr", (104.00698793, 116.66876762, 122.67891434), (1.0, 1.0, 1.0), 1.0)
#: torchvision's and most of timm's ImageNet weights
IMAGENET_RGB = Preprocess("rgb", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 255.0)
_NAMED = {"bgr": CAFFE_BGR, "rgb": IMAGENET_RGB}


def get_preprocess(choice: Preprocess | str) -> Preprocess:
    """'bgr' -> CAFFE_BGR, 'rgb' -> IMAGENET_RGB; a Preprocess as it is. UserError for another name."""
    if isinstance(choice, Preprocess):
        return choice
    if choice not in _NAMED:
        raise UserError(f"unknown preprocessing {choice!r}: expected one of {', '.join(_NAMED)}")
    return _NAMED[choice]
