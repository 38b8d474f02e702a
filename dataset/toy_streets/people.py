"""People on foot and on bicycles: jointed figures that turn, walk and pedal."""

from __future__ import annotations

import numpy as np

from dataset.toy_streets.labels import BICYCLIST, PEDESTRIAN, Color, mix, rgb, scale
from dataset.toy_streets.world import Light, Stage, Thing, cast_shadow, circle, post_shadow

_SKIN = (rgb(226, 180, 150), rgb(196, 146, 116), rgb(142, 98, 74), rgb(92, 62, 48), rgb(236, 196, 172))
_HAIR = (rgb(40, 30, 26), rgb(86, 58, 38), rgb(170, 136, 84), rgb(150, 148, 144), rgb(22, 20, 22))
_CLOTH = (
    rgb(28, 30, 36),
    rgb(48, 56, 84),
    rgb(150, 30, 36),
    rgb(206, 204, 198),
    rgb(70, 84, 66),
    rgb(92, 94, 98),
    rgb(210, 160, 50),
    rgb(60, 110, 170),
    rgb(130, 96, 70),
    rgb(190, 90, 120),
    rgb(60, 130, 120),
    rgb(236, 110, 40),
)
_TROUSERS = (rgb(34, 40, 58), rgb(26, 26, 30), rgb(92, 88, 78), rgb(64, 76, 104), rgb(120, 104, 84), rgb(70, 72, 74))
_TO_CAMERA = (0.0, 0.25, -0.9)


class _Figure:
    """Draws in metres in an upright plane at (x, z); `across` squeezes the walking direction when seen from behind."""

    def __init__(self, stage: Stage, x: float, z: float, size: float, across: float, label: int) -> None:
        self.stage, self.z, self.size, self.across, self.label = stage, z, size, across, label
        self.u, self.v = stage.camera.pixel(x, 0.0, z)
        self.px = stage.camera.scale(z) * size
        self.roll = stage.camera.roll

    def at(self, points: list[tuple[float, float]] | np.ndarray, along: bool = True) -> np.ndarray:
        """Pixels [N, 2] of points given in metres from the feet; `along` the walking direction or across it."""
        right, up = self.px * (self.across if along else 1.0), self.px
        return np.array([(self.u + x * right + self.roll * y * up, self.v - y * up) for x, y in points])

    def ink(self, color: Color) -> Color:
        return self.stage.light.lit(color, _TO_CAMERA, self.z)

    def limb(self, points: list[tuple[float, float]], width: float, color: Color, along: bool = True) -> None:
        self.stage.canvas.lines(self.at(points, along), max(1.0, width * self.px), self.ink(color), self.label)

    def shape(self, points: list[tuple[float, float]], color: Color, along: bool = True) -> None:
        self.stage.canvas.poly(self.at(points, along), self.ink(color), self.label)

    def ball(self, x: float, y: float, half_w: float, half_h: float, color: Color, along: bool = True) -> None:
        u, v = self.at([(x, y)], along)[0]
        self.stage.canvas.ellipse(u, v, half_w * self.px, half_h * self.px, self.ink(color), self.label)


def pedestrian(rng: np.random.Generator, light: Light, x: float, z: float) -> Thing:
    """A walking or standing person, child or adult, in random clothes."""
    size = rng.uniform(0.9, 1.1) if rng.random() < 0.85 else rng.uniform(0.6, 0.8)
    pick = {
        name: table[int(rng.integers(len(table)))]
        for name, table in (("skin", _SKIN), ("hair", _HAIR), ("top", _CLOTH), ("legs", _TROUSERS), ("bag", _CLOTH))
    }
    stride = rng.uniform(0.12, 0.42) if rng.random() < 0.75 else 0.05
    phase, side_view = rng.uniform(0, 2 * np.pi), rng.uniform(0, 1) * float(rng.choice((-1, 1)))
    dress, bag, coat = rng.random() < 0.2, rng.random() < 0.4, rng.random() < 0.3
    umbrella = light.wet and rng.random() < 0.4

    hem = 0.5 if dress else 0.7 if coat else 0.86

    def paint(stage: Stage) -> None:
        f = _Figure(stage, x, z, size, 1.0 if side_view >= 0 else -1.0, PEDESTRIAN)
        turn = abs(side_view)
        swing, wide = stride * np.sin(phase) * (0.35 + 0.65 * turn), 0.21 - 0.07 * turn
        _legs(f, pick["legs"], swing, turn)
        _upper_body(f, pick, swing, wide, hem, bag)
        f.limb([(0, 1.5), (0, 1.58)], 0.1, pick["skin"])
        f.ball(0.01, 1.66, 0.095, 0.125, pick["skin"])
        f.ball(-0.02 * (1 + turn), 1.7, 0.105, 0.105, pick["hair"])
        f.ball(0.05 * turn, 1.65, 0.07 * turn + 0.01, 0.08, pick["skin"])
        if umbrella:
            f.limb([(0.1, 1.1), (0.1, 2.1)], 0.03, rgb(40, 40, 40))
            f.shape([(-0.5, 1.9), (-0.3, 2.1), (0.1, 2.2), (0.5, 2.1), (0.7, 1.9)], pick["bag"])

    return Thing(z, paint, post_shadow(light, x, z, 2 * 0.2, 1.7 * size), [circle(x, z, 0.32, 8)], x, 0.9)


def _legs(f: _Figure, color: Color, swing: float, turn: float) -> None:
    apart = 0.09 * (1 - 0.6 * turn)
    for sign, dark in ((-1, 0.82), (1, 1.0)):
        knee = (sign * (apart + swing * 0.75) + 0.03, 0.48)
        foot = (sign * (apart + swing * 1.25), 0.05)
        f.limb([(sign * apart, 0.9), knee, foot], 0.15, scale(color, dark))
        f.limb([foot, (foot[0] + 0.13 * (0.3 + turn), 0.03)], 0.09, rgb(30, 28, 28))


def _upper_body(f: _Figure, pick: dict[str, Color], swing: float, wide: float, hem: float, bag: bool) -> None:
    """Far arm, trunk down to the `hem`, bag, near arm."""
    cloth, flare = pick["top"], 0.09 if hem < 0.86 else 0.0
    f.limb([(wide * 0.9, 1.38), (wide + swing * 0.6, 1.1), (wide + swing, 0.86)], 0.1, scale(cloth, 0.8))
    low, shoulder = wide * 0.9 + flare, [(-wide, 1.42), (-0.06, 1.5), (0.06, 1.5), (wide, 1.42)]
    f.shape([*shoulder, (wide * 0.85, 1.1), (low, hem), (-low, hem), (-wide * 0.85, 1.1)], cloth)
    f.shape([(-wide, 1.42), (-wide * 0.3, 1.48), (-wide * 0.4, hem), (-low, hem)], scale(cloth, 0.8))
    if bag:
        f.shape([(-wide - 0.12, 1.35), (0.06 - wide, 1.38), (0.06 - wide, 0.95), (-wide - 0.14, 0.98)], pick["bag"])
    hand = 0.08 - wide - swing * 0.9
    f.limb([(-wide * 0.9, 1.38), (-wide - swing * 0.6, 1.1), (hand, 0.88)], 0.1, cloth)
    f.ball(hand, 0.84, 0.05, 0.06, pick["skin"])


def bicyclist(rng: np.random.Generator, light: Light, x: float, z: float, side_view: float) -> Thing:
    """A rider on a bicycle; `side_view` from 0 (seen from behind) to +-1 (from the side, its sign the direction)."""
    pick = {
        name: table[int(rng.integers(len(table)))]
        for name, table in (("skin", _SKIN), ("hair", _HAIR), ("top", _CLOTH), ("legs", _TROUSERS), ("frame", _CLOTH))
    }
    phase, helmet, basket = rng.uniform(0, 2 * np.pi), rng.random() < 0.5, rng.random() < 0.3
    across = max(abs(side_view), 0.16) * (1.0 if side_view >= 0 else -1.0)

    def paint(stage: Stage) -> None:
        f = _Figure(stage, x, z, 1.05, across, BICYCLIST)
        _bicycle(f, pick["frame"], abs(across), basket)
        _rider(f, pick, phase, helmet)

    half = 0.8 * abs(across) + 0.15
    base = np.array([[x - half, z - 0.2], [x + half, z - 0.2], [x + half, z + 0.2], [x - half, z + 0.2]])
    return Thing(z, paint, cast_shadow(light, base, 1.5), [base], x, 1.1)


def _bicycle(f: _Figure, color: Color, across: float, basket: bool) -> None:
    turn = np.linspace(0, 2 * np.pi, 18, endpoint=False)
    ring = np.stack([np.cos(turn), np.sin(turn)], axis=1) * 0.34
    for cx in (-0.52, 0.54):
        wheel = f.at(ring + (cx, 0.35))
        f.stage.canvas.blend(wheel, f.ink(rgb(90, 92, 92)), 0.4, f.label)
        f.stage.canvas.lines(wheel, max(1.0, 0.055 * f.px), f.ink(rgb(24, 24, 26)), f.label, closed=True)
    crank, seat, head, rear, front = (-0.04, 0.32), (-0.2, 0.86), (0.38, 0.88), (-0.52, 0.35), (0.54, 0.35)
    for a, b in (
        (rear, seat),
        (rear, crank),
        (crank, seat),
        (crank, head),
        (seat, head),
        (head, front),
        (head, (0.34, 1.06)),
    ):
        f.limb([a, b], 0.05, color)
    f.limb([(-0.28, 0.92), (-0.1, 0.92)], 0.08, rgb(28, 28, 28))
    f.limb([(-0.26 * (1 - across), 1.06), (0.26 * (1 - across), 1.06)], 0.05, rgb(40, 40, 42), along=False)
    if basket:
        f.shape([(0.4, 1.04), (0.72, 1.04), (0.66, 0.78), (0.44, 0.78)], rgb(130, 100, 66))


def _rider(f: _Figure, pick: dict[str, Color], phase: float, helmet: bool) -> None:
    broad = 0.2 * (1 - abs(f.across) * 0.45) / max(abs(f.across), 1e-3)
    for shift, dark in ((np.pi, 0.75), (0.0, 1.0)):
        foot = (-0.04 + 0.17 * np.cos(phase + shift), 0.3 + 0.17 * np.sin(phase + shift))
        knee = (0.5 * (foot[0] - 0.16) + 0.26, 0.5 * (foot[1] + 0.94) + 0.06)
        off = (0.5 if shift else -0.5) * broad * (1 - abs(f.across))
        f.limb(
            [(-0.16 + off, 0.95), (knee[0] + off, knee[1]), (foot[0] + off, foot[1])], 0.15, scale(pick["legs"], dark)
        )
        f.limb([(foot[0] + off, foot[1]), (foot[0] + 0.14 + off, foot[1] - 0.01)], 0.08, rgb(30, 30, 32))
    f.shape(
        [
            (-0.18 - broad * 0.7, 0.92),
            (-0.12 + broad * 0.7, 0.9),
            (0.2 + broad * 0.9, 1.38),
            (0.18, 1.5),
            (0.04 - broad, 1.4),
        ],
        pick["top"],
    )
    f.limb([(0.16, 1.4), (0.3, 1.18), (0.36, 1.06)], 0.1, mix(pick["top"], rgb(20, 20, 20), 0.2))
    u = 0.2
    f.limb([(u, 1.46), (u + 0.03, 1.56)], 0.1, pick["skin"])
    f.ball(u + 0.04, 1.64, 0.1, 0.125, pick["skin"])
    f.ball(u + 0.02, 1.7, 0.115, 0.09, pick["top"] if helmet else pick["hair"])
