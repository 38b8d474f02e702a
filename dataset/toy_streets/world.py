"""What every painter needs: the camera on a bent road, the light of the day, endless noise, and the stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import cv2
import numpy as np

from dataset.toy_streets.canvas import Canvas
from dataset.toy_streets.labels import Color, mix

NEAR = 1.2
"""Metres in front of the camera where shapes are cut off."""
_TILE = 512


@dataclass(frozen=True)
class Camera:
    """A pinhole camera. World metres: x to the right of the road's centre line, y up, z forward along the road."""

    width: int
    height: int
    focal: float
    horizon: float
    eye: float
    lateral: float
    yaw: float
    bend: float
    roll: float

    def shift(self, z: np.ndarray | float) -> np.ndarray | float:
        """Sideways metres by which the road at distance z lies off the camera's axis."""
        return self.yaw * z + self.bend * z * z - self.lateral

    def project(self, points: np.ndarray) -> np.ndarray:
        """World points [N, 3] (z >= NEAR) to pixels [N, 2]."""
        z = points[:, 2]
        per_metre = self.focal / z
        u = (points[:, 0] + self.shift(z)) * per_metre
        v = (self.eye - points[:, 1]) * per_metre
        pixels = np.empty((len(points), 2))
        pixels[:, 0] = u - self.roll * v + self.width / 2
        pixels[:, 1] = v + self.roll * u + self.horizon
        return pixels

    def pixel(self, x: float, y: float, z: float) -> tuple[float, float]:
        """The pixel of one world point."""
        u = (x + self.shift(z)) * self.focal / z
        v = (self.eye - y) * self.focal / z
        return self.width / 2 + u - self.roll * v, self.horizon + v + self.roll * u

    def sees(self, x: float, z: float, reach: float) -> bool:
        """Whether something of half width `reach` metres at (x, z) can be inside the picture."""
        return abs(x + self.shift(z)) - reach < 0.55 * self.width * z / self.focal

    def ground(self, first_row: int) -> tuple[np.ndarray, np.ndarray]:
        """Road coordinates (x, z) of every second pixel from the (even) `first_row` down; z < 0 above ground.

        Returns two float32 arrays [(H - first_row) / 2, W / 2].
        """
        rows = np.arange(first_row, self.height, 2, dtype=np.float32)[:, None] + 1.0
        cols = np.arange(0, self.width, 2, dtype=np.float32)[None, :] + 1.0 - self.width / 2
        drop = rows - self.horizon - self.roll * cols
        across = cols + self.roll * (rows - self.horizon)
        z = np.where(drop > 0.02, self.focal * self.eye / np.maximum(drop, 0.02), -1.0).astype(np.float32)
        return across * z / self.focal - self.shift(z), z

    def scale(self, z: float) -> float:
        """Pixels per metre at distance z."""
        return self.focal / max(z, NEAR)


@dataclass(frozen=True)
class Light:
    """The light of a scene. `sun` points to the sun; `ambient`, `direct` are BGR factors; haze grows with distance."""

    name: str
    sun: tuple[float, float, float]
    ambient: Color
    direct: Color
    shadow: float
    haze: Color
    thickness: float
    sky_top: Color
    clouds: float
    lamps: bool = False
    wet: bool = False

    def far(self, color: Color, z: float) -> Color:
        """`color` seen through z metres of air."""
        return mix(color, self.haze, 1.0 - 2.718281828 ** (-self.thickness * z))

    def gain(self, normal: tuple[float, float, float]) -> Color:
        """BGR factors of a surface with the unit `normal`."""
        facing = max(0.0, normal[0] * self.sun[0] + normal[1] * self.sun[1] + normal[2] * self.sun[2])
        return (
            self.ambient[0] + self.direct[0] * facing,
            self.ambient[1] + self.direct[1] * facing,
            self.ambient[2] + self.direct[2] * facing,
        )

    def lit(self, color: Color, normal: tuple[float, float, float], z: float) -> Color:
        """`color` of a surface under this light at distance z."""
        b, g, r = self.gain(normal)
        return self.far((color[0] * b, color[1] * g, color[2] * r), z)


@cache
def noise_tile(roughness: float) -> np.ndarray:
    """Endless (periodic) noise float32 [512, 512], zero mean, unit deviation; higher roughness = larger clumps."""
    rng = np.random.default_rng(20240)
    fy, fx = np.fft.fftfreq(_TILE)[:, None], np.fft.rfftfreq(_TILE)[None, :]
    radius = np.sqrt(fx * fx + fy * fy)
    radius[0, 0] = 1.0
    field_ = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((_TILE, _TILE))) * radius**-roughness, (_TILE, _TILE))
    field_ -= field_.mean()
    return (field_ / field_.std()).astype(np.float32)


def _wrapped(coordinate: np.ndarray) -> np.ndarray:
    coordinate = coordinate.astype(np.float32)
    return coordinate - np.float32(_TILE) * np.floor(coordinate * np.float32(1 / _TILE))


def sample_noise(x: np.ndarray, y: np.ndarray, roughness: float = 1.2) -> np.ndarray:
    """Noise at float32 tile coordinates (x, y) of any range; the same shape as they have, one or two dimensions."""
    shape, count = x.shape, x.size
    if count == 0:
        return np.zeros(shape, np.float32)
    if len(shape) == 1:  # OpenCV takes neither lists nor very long rows
        padded = np.zeros((2, -(-count // 1024) * 1024), np.float32)
        padded[0, :count], padded[1, :count] = x, y
        x, y = padded.reshape(2, -1, 1024)
    picked = cv2.remap(noise_tile(roughness), _wrapped(x), _wrapped(y), cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    return picked if len(shape) == 2 else picked.reshape(-1)[:count]


def noise_patch(rng: np.random.Generator, height: int, width: int, zoom: float, roughness: float = 1.2) -> np.ndarray:
    """A random piece of noise float32 [height, width]; one noise cell covers `zoom` pixels."""
    rows, cols = min(_TILE, int(height / zoom) + 2), min(_TILE, int(width / zoom) + 2)
    y, x = int(rng.integers(_TILE - rows + 1)), int(rng.integers(_TILE - cols + 1))
    return cv2.resize(
        noise_tile(roughness)[y : y + rows, x : x + cols], (width, height), interpolation=cv2.INTER_LINEAR
    )


@dataclass
class Stage:
    """The canvas with everything that is needed to paint on it."""

    rng: np.random.Generator
    camera: Camera
    light: Light
    canvas: Canvas

    def face(self, points: np.ndarray, color: Color, label: int, normal: tuple[float, float, float]) -> None:
        """Fill the flat world polygon `points` [N, 3], lit, hazed and cut at the near plane."""
        points = clip_near(points)
        if len(points) >= 3:
            z = float(points[:, 2].mean())
            self.canvas.poly(self.camera.project(points), self.light.lit(color, normal, z), label)


@dataclass
class Thing:
    """Something to paint: things go onto the canvas from the largest `z` to the smallest, after all the shadows.

    `shadows` are polygons [N, 2] of (x, z) on the ground that the sun darkens, `contacts` those that are always dark.
    What has a `reach` is left out where nothing within that many metres of `x` is in view.
    """

    z: float
    paint: Callable[[Stage], None]
    shadows: list[np.ndarray] = field(default_factory=list)
    contacts: list[np.ndarray] = field(default_factory=list)
    x: float = 0.0
    reach: float = float("inf")


def clip_near(points: np.ndarray, near: float = NEAR) -> np.ndarray:
    """The part of a polygon [N, 3] that lies beyond the near plane (maybe empty)."""
    depth = points[:, 2]
    if depth.min() >= near:
        return points
    kept = []
    for i in range(len(points)):
        a, b = points[i - 1], points[i]
        if (a[2] >= near) != (b[2] >= near):
            kept.append(a + (b - a) * ((near - a[2]) / (b[2] - a[2])))
        if b[2] >= near:
            kept.append(b)
    return np.array(kept).reshape(-1, 3)


def shadow_tip(light: Light, x: float, z: float, height: float) -> tuple[float, float]:
    """Where on the ground the shadow of a point `height` metres above (x, z) falls."""
    sx, sy, sz = light.sun
    length = min(height / max(sy, 0.15), 4.0 * height)
    return x - sx * length, z - sz * length


def cast_shadow(light: Light, base: np.ndarray, height: float) -> list[np.ndarray]:
    """Outline [N, 2] on the ground of the shadow of an upright prism over `base` [M, 2] (x, z); none without sun."""
    if light.shadow <= 0:
        return []
    moved = base + shadow_tip(light, 0.0, 0.0, height)
    return [cv2.convexHull(np.concatenate([base, moved]).astype(np.float32))[:, 0]]


def post_shadow(light: Light, x: float, z: float, width: float, height: float) -> list[np.ndarray]:
    """The shadow of something thin and upright as one quadrangle [4, 2]; none without sun."""
    if light.shadow <= 0:
        return []
    tx, tz = shadow_tip(light, x, z, height)
    norm = max(1e-6, float(np.hypot(tx - x, tz - z)))
    ox, oz = (tz - z) / norm * width / 2, (x - tx) / norm * width / 2
    return [np.array([[x - ox, z - oz], [x + ox, z + oz], [tx + ox, tz + oz], [tx - ox, tz - oz]])]


def circle(x: float, z: float, radius: float, count: int = 10) -> np.ndarray:
    """A circle on the ground as a polygon [count, 2] of (x, z)."""
    return unit_circle(count) * radius + (x, z)


@cache
def unit_circle(count: int) -> np.ndarray:
    """Points [count, 2] on the circle of radius 1."""
    turn = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.stack([np.cos(turn), np.sin(turn)], axis=1)


def signed_area(outline: np.ndarray) -> float:
    """Area of a pixel polygon [N, 2] with its sign: positive = clockwise on the screen = a face seen from outside."""
    p = outline.tolist()
    return sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(p[-1:] + p[:-1], p, strict=True)) / 2
