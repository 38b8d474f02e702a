"""Colours for label pictures."""
from __future__ import annotations

import numpy as np


def bit_palette(count: int, first: int = 0) -> np.ndarray:
    """The colour map of the Pascal VOC tools: the bits of an id, spread over the high bits of red, green and blue.

    Args:
        count: number of colours.
        first: id of the first colour (0 is black; start at 1 where every id is a class).

    Returns:
        uint8 [count, 3], RGB; ids 0..255 give 256 different colours.
    """
    ids = np.arange(first, first + count, dtype=np.int64)
    colours = np.zeros((count, 3), dtype=np.int64)
    for place in range(8):
        for channel in range(3):
            colours[:, channel] |= ((ids >> (3 * place + channel)) & 1) << (7 - place)
    return colours.astype(np.uint8)


def read_only(values: object, dtype: type) -> np.ndarray:
    """A private, unwritable copy of `values` as an array of `dtype` (specs are shared by everybody)."""
    array = np.array(values, dtype=dtype)
    array.setflags(write=False)
    return array
