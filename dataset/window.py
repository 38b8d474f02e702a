"""Resize only the window of a picture that a crop needs, with the bytes that resizing the whole picture gives.

A part of a picture, resized by itself, repeats the pixels of the whole when it begins where the pattern of the weights
repeats: every 10 source pixels, as all scales are tenths. There is one exception. OpenCV rounds the weights to 1/2048
from a position in float32, so that far from the origin some come out differently than near it. Where they would
(6 of the 16 scales, on large pictures), the part begins at the origin of that axis.
"""
from __future__ import annotations

import warnings
from fractions import Fraction
from functools import cache
from typing import NamedTuple

import cv2
import numpy as np

from dataset.transforms import SCALES, Augmentation, crop, scale_pair, scaled_crop, scaled_size

WEIGHT_UNIT = np.float32(2048)


class Span(NamedTuple):
    """The source pixels start..stop along an axis; resized by themselves they give pixels from ``origin`` on."""

    start: int
    stop: int
    origin: int


def bilinear_taps(scale: float, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """(first of the two source pixels int64 [N], weights of both in 1/2048 float32 [2, N]) of the resized pixels
    start..stop along an axis, as OpenCV computes them away from the border."""
    position = ((np.arange(start, stop) + 0.5) * (1.0 / scale) - 0.5).astype(np.float32)
    first = np.floor(position)
    second_weight = position - first
    return first.astype(np.int64), np.rint(np.stack([1 - second_weight, second_weight]) * WEIGHT_UNIT)


def nearest_taps(length: int, scale: float, start: int, stop: int) -> np.ndarray:
    """int64 [N]: the source pixel of each of the resized pixels start..stop, as OpenCV's INTER_NEAREST chooses it."""
    return np.minimum(np.floor(np.arange(start, stop) * (1.0 / scale)).astype(np.int64), length - 1)


def source_span(length: int, scale: float, start: int, stop: int) -> Span:
    """What has to be resized to get the pixels start..stop exactly along an axis of ``length`` source pixels."""
    first, weights = bilinear_taps(scale, start, stop)
    end = min(int(first[-1]) + 3, length)
    ratio = Fraction(scale).limit_denominator(10)
    # two periods: an even number of pixels less keeps the direction in which half a pixel of size is rounded
    periods = 2 * (max(start - 1, 0) // (2 * ratio.numerator))
    span = Span(periods * ratio.denominator, end, periods * ratio.numerator)
    own_first, own_weights = bilinear_taps(scale, start - span.origin, stop - span.origin)
    same = np.array_equal(own_first + span.start, first) and np.array_equal(own_weights, weights)
    return span if same else Span(0, end, 0)


@cache
def windows_are_exact() -> bool:
    """Whether the OpenCV of this process resizes as this file supposes, tried on noise; warns when it does not."""
    rng = np.random.default_rng(0)
    for size in ((6, 2100), (1100, 6)):
        image, label = rng.integers(0, 256, (*size, 3), dtype=np.uint8), rng.integers(0, 256, size, dtype=np.uint8)
        for scale in SCALES:
            whole = scale_pair(image, label, scale)
            for place in (0.4, 0.7, 1.0):
                stops = [max(round(side * place), 1) for side in whole[1].shape]
                window = [slice(max(stop - 200, 0), stop) for stop in stops]
                part = resized_image(image, scale, *window), resized_label(label, scale, *window)
                if not all(np.array_equal(a, b[tuple(window)]) for a, b in zip(part, whole, strict=True)):
                    warnings.warn(f"OpenCV {cv2.__version__} resizes a part of a picture differently than the whole: "
                                  "every training image is resized as a whole, which takes longer", stacklevel=2)
                    return False
    return True


def resized_image(image: np.ndarray, scale: float, rows: slice, columns: slice) -> np.ndarray:
    """``cv2.resize(image, None, fx=scale, fy=scale)[rows, columns]`` of a picture uint8 [H, W, 3], bit by bit."""
    y, x = (source_span(length, scale, part.start, part.stop)
            for length, part in zip(image.shape, (rows, columns), strict=False))
    part = cv2.resize(image[y.start:y.stop, x.start:x.stop], None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    return part[rows.start - y.origin:rows.stop - y.origin, columns.start - x.origin:columns.stop - x.origin]


def resized_label(label: np.ndarray, scale: float, rows: slice, columns: slice) -> np.ndarray:
    """The same part of a label uint8 [H, W] resized by nearest neighbors, bit by bit."""
    y, x = (nearest_taps(length, scale, part.start, part.stop)
            for length, part in zip(label.shape, (rows, columns), strict=True))
    return label[:, x[0]:x[-1] + 1].take(y, axis=0).take(x - x[0], axis=1)


def windowed_crop(image: np.ndarray, label: np.ndarray, augmentation: Augmentation,
                  size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """:func:`scaled_crop`, in less time."""
    scale, offset, mirrored = augmentation
    if scale == 1.0:
        return scaled_crop(image, label, augmentation, size)
    window = [slice(first, min(first + side, whole)) for first, side, whole
              in zip(offset, size, scaled_size(image.shape[:2], scale), strict=True)]
    part, labels = resized_image(image, scale, *window), resized_label(label, scale, *window)
    return crop(part, (0, 0), size, mirrored), crop(labels, (0, 0), size, mirrored)
