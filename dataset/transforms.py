"""Training augmentation as pure functions of its parameters, on uint8 pictures: scale, crop, mirror, pad.

The border travels as a rectangle of real pixels, because "0 after the mean is subtracted" cannot be written in uint8.
"""
from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

SCALES = tuple(0.5 + step / 10.0 for step in range(16))  # 0.5, 0.6, ..., 2.0


class Augmentation(NamedTuple):
    """Parameters of one training sample; ``offset`` is (top, left) in the scaled and padded picture."""

    scale: float = 1.0
    offset: tuple[int, int] = (0, 0)
    mirrored: bool = False


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """(height, width) after scaling; halves go to the even neighbor, as in OpenCV."""
    return round(size[0] * scale), round(size[1] * scale)


def draw_augmentation(rng: np.random.Generator, size: tuple[int, int], crop: tuple[int, int], *, scale: bool = True,
                      mirror: bool = True) -> Augmentation:
    """Draw the parameters of a sample, each uniformly. size, crop: (height, width) of stored picture and sample."""
    factor = SCALES[int(rng.integers(len(SCALES)))] if scale else 1.0
    height, width = scaled_size(size, factor)
    top = int(rng.integers(max(height - crop[0], 0) + 1))
    left = int(rng.integers(max(width - crop[1], 0) + 1))
    return Augmentation(factor, (top, left), bool(mirror and rng.integers(2) == 0))


def scale_pair(image: np.ndarray, label: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Resize a picture (bilinear) and its label (nearest) by the same factor."""
    if scale == 1.0:
        return image, label
    return (cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR),
            cv2.resize(label, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST))


def crop(array: np.ndarray, offset: tuple[int, int], size: tuple[int, int], mirrored: bool = False) -> np.ndarray:
    """The part of ``array`` [H, W(, C)] in the window of ``size`` at ``offset``, mirrored when asked for."""
    part = array[offset[0]:offset[0] + size[0], offset[1]:offset[1] + size[1]]
    return cv2.flip(part, 1) if mirrored else part


def scaled_crop(image: np.ndarray, label: np.ndarray, augmentation: Augmentation,
                size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Scale a picture and its label, crop and mirror them; without padding. size: (height, width) of the crop."""
    scale, offset, mirrored = augmentation
    image, label = scale_pair(image, label, scale)
    return crop(image, offset, size, mirrored), crop(label, offset, size, mirrored)


def pad(array: np.ndarray, size: tuple[int, int], fill: int, mirrored: bool = False) -> np.ndarray:
    """``array`` [H, W(, C)] top left (mirrored: top right) in a contiguous picture of ``size`` filled with ``fill``."""
    if array.shape[:2] == tuple(size):
        return np.ascontiguousarray(array)
    out = np.full((*size, *array.shape[2:]), fill, dtype=array.dtype)
    top, bottom, left, right = valid_rectangle(array.shape[:2], size, mirrored)
    out[top:bottom, left:right] = array
    return out


def valid_rectangle(part: tuple[int, int], size: tuple[int, int], mirrored: bool = False) -> tuple[int, int, int, int]:
    """(top, bottom, left, right), half open: where :func:`pad` puts a part of ``part`` = (height, width) pixels."""
    left = size[1] - part[1] if mirrored else 0
    return 0, part[0], left, left + part[1]
