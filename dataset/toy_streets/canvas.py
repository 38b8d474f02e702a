"""The canvas: colour and label in one four-channel picture, so that every stroke sets both at once."""

from __future__ import annotations

import cv2
import numpy as np

from dataset.toy_streets.labels import BICYCLIST, FENCE, NUM_CLASS, PEDESTRIAN, POLE, SIGN, Color

_SHIFT = 4
_ONE = 1 << _SHIFT
# Where a 2x2 block holds several classes the thin ones win a draw; the order is from "gives way" to "wins".
_THIN = (FENCE, PEDESTRIAN, BICYCLIST, SIGN, POLE)
_RANK = np.array([*(c for c in range(NUM_CLASS + 1) if c not in _THIN), *_THIN], dtype=np.uint8)
_TO_RANK = np.argsort(_RANK).astype(np.uint8)


def _fixed(points: np.ndarray) -> np.ndarray:
    return (points * _ONE).astype(np.int32)


def _ink(color: Color, label: int) -> tuple[int, int, int, int]:
    b, g, r = color
    return max(0, min(255, int(b))), max(0, min(255, int(g))), max(0, min(255, int(r))), label


class Canvas:
    """`px` is uint8 [H, W, 4]: blue, green, red, label. Coordinates are pixels (x, y), as floats."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.px = np.zeros((height, width, 4), dtype=np.uint8)

    def poly(self, points: np.ndarray, color: Color, label: int) -> None:
        """Fill the polygon `points` [N, 2]."""
        if len(points) >= 3:
            cv2.fillPoly(self.px, [_fixed(points)], _ink(color, label), cv2.LINE_8, _SHIFT)

    def lines(self, points: np.ndarray, thickness: float, color: Color, label: int, closed: bool = False) -> None:
        """Stroke the open or closed line through `points` [N, 2]; `thickness` in pixels, at least 1 is drawn."""
        cv2.polylines(
            self.px, [_fixed(points)], closed, _ink(color, label), max(1, round(thickness)), cv2.LINE_8, _SHIFT
        )

    def polys(self, shapes: np.ndarray, colors: list[Color], label: int) -> None:
        """Fill many polygons with the same number of corners, [P, N, 2], one after the other."""
        for corners, color in zip(_fixed(shapes), colors, strict=True):
            cv2.fillPoly(self.px, [corners], _ink(color, label), cv2.LINE_8, _SHIFT)

    def segments(self, pieces: np.ndarray, thickness: float, color: Color, label: int) -> None:
        """Stroke many separate lines, [P, N, 2], alike."""
        cv2.polylines(
            self.px, list(_fixed(pieces)), False, _ink(color, label), max(1, round(thickness)), cv2.LINE_8, _SHIFT
        )

    def ellipse(self, x: float, y: float, half_w: float, half_h: float, color: Color, label: int) -> None:
        """Fill an upright ellipse around (x, y)."""
        centre, axes = (int(x * _ONE), int(y * _ONE)), (max(1, int(half_w * _ONE)), max(1, int(half_h * _ONE)))
        cv2.ellipse(self.px, centre, axes, 0, 0, 360, _ink(color, label), -1, cv2.LINE_8, _SHIFT)

    def box(self, left: float, top: float, right: float, bottom: float) -> tuple[int, int, int, int] | None:
        """The part of a rectangle inside the canvas as (x0, y0, x1, y1), or None where nothing of it is."""
        x0, y0 = max(0, int(np.floor(left))), max(0, int(np.floor(top)))
        x1, y1 = min(self.width, int(np.ceil(right)) + 1), min(self.height, int(np.ceil(bottom)) + 1)
        return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None

    def stamp(self, corner: tuple[int, int], colors: np.ndarray, mask: np.ndarray, label: int) -> None:
        """Put `colors` uint8 [h, w, 3] with top-left `corner` (x, y) where `mask` bool [h, w]; wholly inside."""
        x, y = corner
        view = self.px[y : y + mask.shape[0], x : x + mask.shape[1]]
        np.copyto(view[..., :3], colors, where=mask[..., None])
        np.copyto(view[..., 3], np.uint8(label), where=mask)

    def blend(self, points: np.ndarray, color: Color, share: float, label: int | None = None) -> None:
        """Mix `color` into the polygon `points` [N, 2]; the label stays unless one is given."""
        box = self.box(*points.min(axis=0), *points.max(axis=0))
        if box is None:
            return
        x0, y0, x1, y1 = box
        mask = np.zeros((y1 - y0, x1 - x0), np.uint8)
        cv2.fillPoly(mask, [_fixed(points - (x0, y0))], 1, cv2.LINE_8, _SHIFT)
        view = self.px[y0:y1, x0:x1]
        mixed = cv2.addWeighted(view[..., :3], 1 - share, np.full_like(view[..., :3], _ink(color, 0)[:3]), share, 0)
        np.copyto(view[..., :3], mixed, where=mask[..., None] > 0)
        if label is not None:
            np.copyto(view[..., 3], np.uint8(label), where=mask > 0)

    def warp(self, quad: np.ndarray, texture: np.ndarray, label: int, alpha: np.ndarray | None = None) -> None:
        """Map `texture` uint8 [h, w, 3] onto `quad` [4, 2] (its top-left, top-right, bottom-right, bottom-left).

        `alpha` uint8 [h, w] lets the picture behind show; the label fills the whole quad all the same.
        """
        box = self.box(*quad.min(axis=0), *quad.max(axis=0))
        if box is None:
            return
        x0, y0, x1, y1 = box
        inside = quad - (x0, y0)
        size = (x1 - x0, y1 - y0)
        height, width = texture.shape[:2]
        corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
        matrix = cv2.getPerspectiveTransform(corners, inside.astype(np.float32))
        mask = np.zeros(size[::-1], np.uint8)
        cv2.fillPoly(mask, [_fixed(inside)], 1, cv2.LINE_8, _SHIFT)
        picture = cv2.warpPerspective(texture, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        if alpha is not None:
            cover = cv2.warpPerspective(alpha, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            share = cover[..., None].astype(np.float32) / 255.0
            picture = (picture * share + self.px[y0:y1, x0:x1, :3] * (1 - share)).astype(np.uint8)
        self.stamp((x0, y0), picture, mask > 0, label)

    def label_half(self) -> np.ndarray:
        """Labels at half size, uint8 [H/2, W/2]: the upper median of each 2x2 block in the order of thinness."""
        ranks = _TO_RANK[self.px[..., 3]]
        a, b, c, d = ranks[::2, ::2], ranks[::2, 1::2], ranks[1::2, ::2], ranks[1::2, 1::2]
        low_ab, high_ab, low_cd, high_cd = np.minimum(a, b), np.maximum(a, b), np.minimum(c, d), np.maximum(c, d)
        second = np.minimum(high_ab, high_cd)
        return _RANK[np.maximum(second, np.maximum(low_ab, low_cd))]
