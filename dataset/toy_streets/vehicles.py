"""Cars, vans and buses: two stacked boxes with windows, lamps and wheels, turned to any heading."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from dataset.toy_streets.labels import CAR, Color, mix, rgb, scale
from dataset.toy_streets.world import NEAR, Light, Stage, Thing, cast_shadow, signed_area, unit_circle

_PAINT = (
    rgb(176, 178, 180),
    rgb(92, 96, 100),
    rgb(32, 34, 38),
    rgb(232, 232, 230),
    rgb(160, 28, 32),
    rgb(36, 66, 130),
    rgb(120, 122, 126),
    rgb(60, 96, 78),
    rgb(196, 150, 40),
    rgb(110, 150, 180),
    rgb(70, 72, 78),
    rgb(128, 112, 92),
)
_PAINT_SHARE = (0.16, 0.12, 0.14, 0.14, 0.1, 0.09, 0.08, 0.04, 0.03, 0.03, 0.05, 0.02)
_GLASS = rgb(30, 38, 44)
_TYRE = rgb(26, 26, 28)


@dataclass(frozen=True)
class Shape:
    """Measures of a vehicle, metres. z runs forward from the middle; the cabin spans `cabin` below and `top` above."""

    length: float
    width: float
    belt: float
    bonnet: float
    roof: float
    cabin: tuple[float, float]
    top: tuple[float, float]
    inset: float
    wheel: float
    panes: int


_SHAPES = {
    "hatchback": Shape(3.9, 1.72, 0.92, 0.82, 1.47, (-1.85, 0.95), (-1.55, 0.3), 0.16, 0.31, 2),
    "sedan": Shape(4.6, 1.78, 0.92, 0.80, 1.43, (-1.75, 1.05), (-1.0, 0.35), 0.18, 0.32, 2),
    "estate": Shape(4.6, 1.8, 0.95, 0.84, 1.5, (-2.25, 1.05), (-2.0, 0.4), 0.16, 0.32, 3),
    "offroad": Shape(4.5, 1.9, 1.1, 1.0, 1.78, (-2.2, 1.0), (-2.05, 0.55), 0.12, 0.38, 3),
    "van": Shape(5.2, 2.0, 1.25, 1.1, 2.3, (-2.58, 2.0), (-2.55, 1.1), 0.08, 0.35, 1),
    "bus": Shape(10.5, 2.5, 1.35, 1.35, 3.0, (-5.25, 5.25), (-5.2, 5.1), 0.06, 0.48, 7),
}
_SHAPE_SHARE = (0.3, 0.25, 0.16, 0.14, 0.11, 0.04)

# Corner order of a box: bottom then top; then left-back, right-back, right-front, left-front ("back" = least z).
_FACES = {"top": (7, 6, 5, 4), "back": (4, 5, 1, 0), "front": (6, 7, 3, 2), "left": (7, 4, 0, 3), "right": (5, 6, 2, 1)}
_NORMALS = {
    "back": (0.0, 0.1, -1.0),
    "front": (0.0, 0.1, 1.0),
    "left": (-1.0, 0.1, 0.0),
    "right": (1.0, 0.1, 0.0),
    "top": (0.0, 1.0, 0.0),
}
_SPOKES = 12
_RINGS = ((1.22, rgb(16, 16, 17)), (1.0, _TYRE), (0.58, rgb(128, 130, 132)))

Patch = tuple[float, float, float, float, Color, bool]
"""left, top, right, bottom as shares of a face; the colour; whether it shines by itself."""


def _box(
    half: float,
    top_half: float,
    low: float,
    high_back: float,
    high_front: float,
    base: tuple[float, float],
    top: tuple[float, float],
) -> np.ndarray:
    return np.array(
        [
            [-half, low, base[0]],
            [half, low, base[0]],
            [half, low, base[1]],
            [-half, low, base[1]],
            [-top_half, high_back, top[0]],
            [top_half, high_back, top[0]],
            [top_half, high_front, top[1]],
            [-top_half, high_front, top[1]],
        ]
    )


@cache
def _points(kind: str) -> np.ndarray:
    """All points of a vehicle, local metres [N, 3]: body 8, cabin 8, underside 4, then the rings of the four wheels."""
    s = _SHAPES[kind]
    half, end = s.width / 2, s.length / 2
    body = _box(half, half * 0.97, 0.22, s.belt, s.bonnet, (-end, end), (-end * 0.985, end * 0.98))
    cabin = _box(half * 0.96, half - s.inset, min(s.belt, s.bonnet), s.roof, s.roof, s.cabin, s.top)
    under = body[:4] * (0.96, 0.5, 0.96)
    spokes = unit_circle(_SPOKES)
    ring = np.stack([np.zeros(_SPOKES), spokes[:, 1], spokes[:, 0]], axis=1)
    wheels = [
        np.array([side * half, s.wheel, at * s.length]) + ring * s.wheel * radius
        for side in (-1, 1)
        for at in (-0.31, 0.32)
        for radius, _ in _RINGS
    ]
    return np.concatenate([body, cabin, under, *wheels])


class _Model:
    """A vehicle at a place, its points on the canvas."""

    def __init__(self, stage: Stage, kind: str, x: float, z: float, heading: float) -> None:
        self.stage, self.shape, self.z = stage, _SHAPES[kind], z
        self.cos, self.sin = float(np.cos(heading)), float(np.sin(heading))
        local = _points(kind)
        world = np.empty_like(local)
        world[:, 0] = x + local[:, 0] * self.cos + local[:, 2] * self.sin
        world[:, 1] = local[:, 1]
        world[:, 2] = z - local[:, 0] * self.sin + local[:, 2] * self.cos
        self.pixels = stage.camera.project(world)
        self.boxes = self.pixels[:8], self.pixels[8:16]
        self.rings = self.pixels[20:].reshape(2, 2 * len(_RINGS), _SPOKES, 2)

    def lit(self, color: Color, name: str) -> Color:
        x, y, z = _NORMALS[name]
        return self.stage.light.lit(color, (x * self.cos + z * self.sin, y, -x * self.sin + z * self.cos), self.z)

    def wheels(self, name: str) -> None:
        """The two wheels of one side."""
        rings, colors = self.rings[int(name == "right")], [color for _, color in _RINGS] * 2
        if self.stage.camera.scale(self.z) < 7:
            rings, colors = rings[1::3], [_TYRE] * 2
        self.stage.canvas.polys(rings, [self.lit(c, name) for c in colors], CAR)

    def patches(self, face: np.ndarray, patches: list[Patch], name: str) -> None:
        """Parts of a face, `face` [4, 2] its corners on the canvas."""
        shares = np.array([((a, b), (c, b), (c, d), (a, d)) for a, b, c, d, _, _ in patches])
        u, v = shares[..., :1], shares[..., 1:]
        points = (face[0] * (1 - u) + face[1] * u) * (1 - v) + (face[3] * (1 - u) + face[2] * u) * v
        colors = [self.stage.light.far(p[4], self.z) if p[5] else self.lit(p[4], name) for p in patches]
        self.stage.canvas.polys(points, colors, CAR)

    def paint(self, color: Color, braking: bool) -> None:
        """Underside, body, wheels, cabin; hidden faces are left out."""
        canvas = self.stage.canvas
        canvas.poly(self.pixels[16:20], rgb(14, 14, 16), CAR)
        detailed = self.stage.camera.scale(self.z) > 6
        for box, is_cabin in zip(self.boxes, (False, True), strict=True):
            seen = {name: box[list(order)] for name, order in _FACES.items()}
            seen = {name: face for name, face in seen.items() if signed_area(face) > 0}
            if not is_cabin:
                for name in [n for n in ("left", "right") if n not in seen]:
                    self.wheels(name)
            for name, face in seen.items():
                canvas.poly(face, self.lit(color, name), CAR)
                patches = _details(self, name, is_cabin, color, braking) if detailed else []
                if patches:
                    self.patches(face, patches, name)
                if name in ("left", "right") and not is_cabin:
                    self.wheels(name)


def _details(model: _Model, name: str, is_cabin: bool, color: Color, braking: bool) -> list[Patch]:
    """Windows on the cabin; lamps, plates, bumpers and door lines on the body."""
    light, panes = model.stage.light, model.shape.panes
    if name == "top":
        return []
    dark = (scale(color, 0.5), False)
    if is_cabin:
        sky = light.sky_top if light.clouds < 0 else light.haze
        glass = mix(_GLASS, scale(sky, 0.8), 0.3 if name in ("front", "back") else 0.14)
        if name in ("front", "back"):
            return [(0.07, 0.1, 0.93, 0.86, glass, False), (0.12, 0.12, 0.45, 0.5, mix(glass, sky, 0.25), False)]
        if panes == 1:
            return [(*((0.02, 0.12, 0.26) if name == "left" else (0.74, 0.12, 0.98)), 0.6, glass, False)]
        step = 0.9 / panes
        return [(0.06 + k * step, 0.14, 0.02 + (k + 1) * step, 0.84, glass, False) for k in range(panes)]
    if name in ("left", "right"):
        return [
            (0.0, 0.8, 1.0, 1.0, *dark),
            (0.36, 0.05, 0.368, 0.8, *dark),
            (0.6, 0.05, 0.608, 0.8, *dark),
            (0.0, 0.05, 1.0, 0.12, mix(color, rgb(255, 255, 255), 0.2), False),
        ]
    if name == "back":
        shine = braking or light.lamps
        lamp = rgb(255, 50, 40) if shine else rgb(150, 24, 26)
        return [
            (0.02, 0.12, 0.18, 0.42, lamp, shine),
            (0.82, 0.12, 0.98, 0.42, lamp, shine),
            (0.33, 0.32, 0.67, 0.5, rgb(228, 216, 150), False),
            (0.0, 0.66, 1.0, 1.0, *dark),
        ]
    shine = light.lamps or light.wet
    lamp = rgb(255, 250, 225) if shine else rgb(222, 224, 222)
    return [
        (0.22, 0.22, 0.78, 0.5, rgb(28, 28, 30), False),
        (0.03, 0.15, 0.2, 0.4, lamp, shine),
        (0.8, 0.15, 0.97, 0.4, lamp, shine),
        (0.0, 0.64, 1.0, 1.0, *dark),
        (0.36, 0.56, 0.64, 0.72, rgb(226, 226, 220), False),
    ]


def vehicle(rng: np.random.Generator, light: Light, x: float, z: float, heading: float) -> Thing | None:
    """A random vehicle around (x, z); heading 0 drives away, pi towards the camera. None if it is too near."""
    kind = str(rng.choice(list(_SHAPES), p=_SHAPE_SHARE))
    shape = _SHAPES[kind]
    color = scale(_PAINT[int(rng.choice(len(_PAINT), p=_PAINT_SHARE))], rng.uniform(0.85, 1.1))
    if kind == "bus" and rng.random() < 0.7:
        color = (rgb(170, 30, 34), rgb(220, 200, 60), rgb(40, 90, 160))[int(rng.integers(3))]
    braking = bool(rng.random() < 0.25)
    c, s = abs(np.cos(heading)), abs(np.sin(heading))
    reach = (shape.length * c + shape.width * s) / 2  # along the view; across it the length bounds it
    if z - reach < NEAR + 0.4:
        return None

    def paint(stage: Stage) -> None:
        _Model(stage, kind, x, z, heading).paint(color, braking)

    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (shape.width / 2, shape.length / 2)
    turned = corners @ np.array([[np.cos(heading), -np.sin(heading)], [np.sin(heading), np.cos(heading)]]) + (x, z)
    return Thing(
        z, paint, cast_shadow(light, turned, shape.roof * 0.9), [turned + (turned - (x, z)) * 0.06], x, shape.length
    )
