"""Resize only the window of a picture that a crop needs, with the bytes that resizing the whole picture gives.

A part of a picture, resized by itself, repeats the pixels of the whole when it begins where the pattern of the weights
repeats: every 10 source pixels, as all scales are tenths. There is one exception. OpenCV rounds the weights to 1/2048
from a position in float32, so that far from the origin some come out differently than near it. Where they would
(6 of the 16 scales, on large pictures), the part begins at the origin of that axis. The same holds for nearest
neighbors, one scale and positions in float64.
"""
from __future__ import annotations

import warnings
from fractions import Fraction
from functools import cache
from typing import NamedTuple

import cv2
import numpy as np

from dataset.transforms import SCALES, Augmentation, crop, scale_pair, scaled_crop, scaled_size


class Span(NamedTuple):
    """The source pixels start..stop along an axis; resized by themselves they give pixels from ``origin`` on."""

    start: int
    stop: int
    origin: int


def opencv_taps(kind: int, scale: float, stop: int) -> np.ndarray:
    """What OpenCV makes the resized pixels 0..stop of along an axis, away from the border: float64 [N, stop].

    Row 0 is the (first) source pixel. For cv2.INTER_LINEAR the weights of this and the next pixel follow, in 1/2048.
    """
    if kind == cv2.INTER_NEAREST:
        return np.floor(np.arange(stop) * (1.0 / scale))[None]
    position = ((np.arange(stop) + 0.5) * (1.0 / scale) - 0.5).astype(np.float32)
    first = np.floor(position)
    second_weight = position - first
    return np.stack([first, *(np.rint(weight * np.float32(2048)) for weight in (1 - second_weight, second_weight))])


@cache
def _known_taps(kind: int, scale: float, blocks: int) -> np.ndarray:
    return opencv_taps(kind, scale, 4096 * blocks)


@cache
def _period(scale: float) -> tuple[int, int]:
    """(resized, source) pixels after which the taps repeat, but for rounding; both even: with an even number of pixels
    less, half a pixel of size is rounded in the same direction."""
    ratio = Fraction(scale).limit_denominator(10)
    return 2 * ratio.numerator, 2 * ratio.denominator


def source_span(kind: int, length: int, scale: float, part: slice) -> Span:
    """What has to be resized to get some pixels exactly along an axis of ``length`` source pixels."""
    taps = _known_taps(kind, scale, 1 + part.stop // 4096)
    whole, (resized, source) = taps[:, part], _period(scale)
    periods = max(part.start - 1, 0) // resized
    span = Span(periods * source, min(int(whole[0, -1]) + 3, length), periods * resized)
    own = taps[:, part.start - span.origin:part.stop - span.origin]
    same = np.array_equal(own[0] + span.start, whole[0]) and np.array_equal(own[1:], whole[1:])
    return span if same else Span(0, span.stop, 0)


def resized_part(array: np.ndarray, scale: float, rows: slice, columns: slice, kind: int) -> np.ndarray:
    """``cv2.resize(array, None, fx=scale, fy=scale, interpolation=kind)[rows, columns]``, bit by bit.

    array: uint8 [H, W(, C)]. kind: cv2.INTER_LINEAR or cv2.INTER_NEAREST.
    """
    y, x = source_span(kind, array.shape[0], scale, rows), source_span(kind, array.shape[1], scale, columns)
    part = cv2.resize(array[y.start:y.stop, x.start:x.stop], None, fx=scale, fy=scale, interpolation=kind)
    return part[rows.start - y.origin:rows.stop - y.origin, columns.start - x.origin:columns.stop - x.origin]


def resized_pair(image: np.ndarray, label: np.ndarray, scale: float, rows: slice,
                 columns: slice) -> tuple[np.ndarray, np.ndarray]:
    """A part of what :func:`scale_pair` returns, in less time."""
    return (resized_part(image, scale, rows, columns, cv2.INTER_LINEAR),
            resized_part(label, scale, rows, columns, cv2.INTER_NEAREST))


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
                part = resized_pair(image, label, scale, *window)
                if not all(np.array_equal(a, b[tuple(window)]) for a, b in zip(part, whole, strict=True)):
                    warnings.warn(f"OpenCV {cv2.__version__} resizes a part of a picture differently than the whole: "
                                  "every training image is resized as a whole, which takes longer", stacklevel=2)
                    return False
    return True


def windowed_crop(image: np.ndarray, label: np.ndarray, augmentation: Augmentation,
                  size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """:func:`scaled_crop`, in less time."""
    scale, offset, mirrored = augmentation
    tiny = max(min(pair) for pair in zip(size, image.shape, strict=False)) < 16  # OpenCV copies when no side changes
    if scale == 1.0 or tiny:
        return scaled_crop(image, label, augmentation, size)
    window = [slice(first, min(first + side, whole)) for first, side, whole
              in zip(offset, size, scaled_size(image.shape[:2], scale), strict=True)]
    image, label = resized_pair(image, label, scale, *window)
    return crop(image, (0, 0), size, mirrored), crop(label, (0, 0), size, mirrored)
