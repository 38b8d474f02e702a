"""Colors for label pictures."""
from __future__ import annotations

import numpy as np


def bit_palette(count: int, first: int = 0) -> np.ndarray:
    """The color map of the Pascal VOC tools: the bits of an id, spread over the high bits of red, green and blue.

    first: id of the first color (0 is black). Returns uint8 [count, 3], RGB; ids 0..255 give 256 different colors.
    """
    ids = np.arange(first, first + count, dtype=np.int64)
    colors = np.zeros((count, 3), dtype=np.int64)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= ((ids >> (3 * bit + channel)) & 1) << (7 - bit)
    return colors.astype(np.uint8)


def read_only(values: object, dtype: type) -> np.ndarray:
    """A private, unwritable copy of ``values`` as an array of ``dtype`` (specs are shared by everybody)."""
    array = np.array(values, dtype=dtype)
    array.setflags(write=False)
    return array
