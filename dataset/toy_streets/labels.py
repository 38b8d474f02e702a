"""Label ids of a toy street, in CamVid's order, and the colour type that the painter uses."""

from __future__ import annotations

SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(11)
NUM_CLASS = 11
VOID = NUM_CLASS

Color = tuple[float, float, float]
"""Blue, green, red in 0..255; values outside are clipped when they reach the canvas."""


def rgb(red: float, green: float, blue: float) -> Color:
    """A colour from its usual red, green, blue order."""
    return (blue, green, red)


def mix(first: Color, second: Color, share: float) -> Color:
    """`first` moved towards `second` by `share` (0..1)."""
    keep = 1.0 - share
    return (
        first[0] * keep + second[0] * share,
        first[1] * keep + second[1] * share,
        first[2] * keep + second[2] * share,
    )


def scale(color: Color, factor: float) -> Color:
    """`color` made darker (factor < 1) or lighter (factor > 1)."""
    return (color[0] * factor, color[1] * factor, color[2] * factor)
