"""Trees, bare trees and bushes: crowns are clouds of noise with light and dark sides."""

from __future__ import annotations

import numpy as np

from dataset.toy_streets.labels import TREE, Color, rgb, scale
from dataset.toy_streets.world import Light, Stage, Thing, cast_shadow, circle, noise_patch, post_shadow, shadow_tip

_LEAVES = (
    rgb(64, 92, 36),
    rgb(80, 104, 48),
    rgb(52, 78, 40),
    rgb(98, 112, 52),
    rgb(70, 98, 60),
    rgb(112, 118, 60),
    rgb(150, 110, 48),
    rgb(138, 84, 40),
    rgb(120, 76, 70),
)
_LEAVES_SHARE = (0.2, 0.18, 0.18, 0.12, 0.12, 0.08, 0.06, 0.03, 0.03)
_BARK = rgb(74, 60, 48)


def crown(
    stage: Stage, centre: tuple[float, float, float], half_w: float, half_h: float, color: Color, density: float = 0.0
) -> None:
    """A ragged ellipse of leaves around the world point `centre`, half sizes in metres; sky shows through its rim."""
    camera, light = stage.camera, stage.light
    x, y, z = centre
    px = camera.scale(z)
    u, v = stage.camera.pixel(x, y, z)
    w, h = half_w * px, half_h * px
    box = stage.canvas.box(u - 1.25 * w, v - 1.25 * h, u + 1.25 * w, v + 1.25 * h)
    if box is None or w < 1:
        return
    x0, y0, x1, y1 = box
    dx = ((np.arange(x0, x1, dtype=np.float32) - u) / w)[None, :]
    dy = ((np.arange(y0, y1, dtype=np.float32) - v) / h)[:, None]
    clump = noise_patch(stage.rng, y1 - y0, x1 - x0, max(0.6, 0.11 * px), 1.25)
    leaf = noise_patch(stage.rng, y1 - y0, x1 - x0, max(0.5, 0.05 * px), 0.35)
    radius = dx * dx + dy * dy
    mask = radius + 0.3 * clump + 0.12 * leaf < 1.0 + density
    side = light.sun[0] * dx - 0.7 * dy
    tone = 0.9 + 0.26 * clump + 0.2 * leaf + (0.34 if light.shadow > 0.3 else 0.18) * side - 0.12 * radius
    base = np.array(light.lit(color, (0.0, 0.5, -0.3), 0.0), np.float32)
    air = 1.0 - 2.718281828 ** (-light.thickness * z)
    picture = np.clip(tone, 0.25, 1.9)[..., None] * base * (1 - air) + np.array(light.haze, np.float32) * air
    stage.canvas.stamp((x0, y0), picture.clip(0, 255).astype(np.uint8), mask, TREE)


def tree(rng: np.random.Generator, light: Light, x: float, z: float, size: float = 1.0) -> Thing:
    """A broad tree, a slim one, a conifer or a bare one at (x, z); `size` 1 is about seven metres."""
    kind = str(rng.choice(("broad", "slim", "conifer", "bare"), p=(0.62, 0.16, 0.08, 0.14)))
    height = size * rng.uniform(5.5, 9.0)
    color = scale(_LEAVES[int(rng.choice(len(_LEAVES), p=_LEAVES_SHARE))], rng.uniform(0.8, 1.2))
    trunk = rng.uniform(0.09, 0.2) * size**0.5

    def paint(stage: Stage) -> None:
        stem = height * (0.9 if kind == "bare" else 0.6)
        half = np.array([[x - trunk, 0, z], [x + trunk, 0, z], [x + trunk * 0.6, stem, z], [x - trunk * 0.6, stem, z]])
        stage.face(half, _BARK, TREE, (0.3, 0.0, -0.9))
        if kind == "bare":
            _branches(stage, x, z, height * 0.32, trunk)
        elif kind == "conifer":
            for k in range(4):
                crown(
                    stage,
                    (x, height * (0.22 + 0.2 * k), z),
                    height * (0.24 - 0.05 * k),
                    height * 0.18,
                    scale(color, 0.75),
                )
        else:
            wide = height * (0.34 if kind == "broad" else 0.18)
            crown(stage, (x, height * 0.66, z), wide, height * 0.34, scale(color, 0.9), 0.1)
            for _ in range(4 if stage.camera.scale(z) > 25 else 3 if stage.camera.scale(z) > 12 else 0):
                dx, dy = stage.rng.uniform(-0.5, 0.5) * wide, stage.rng.uniform(0.52, 0.86) * height
                crown(stage, (x + dx, dy, z), wide * 0.62, height * 0.19, scale(color, stage.rng.uniform(0.9, 1.15)))

    shadows = post_shadow(light, x, z, 2 * trunk, height * 0.6)
    if shadows:
        shadows.append(circle(*shadow_tip(light, x, z, height * 0.7), height * (0.12 if kind == "bare" else 0.3), 14))
    return Thing(z, paint, shadows, [circle(x, z, trunk * 2.2)], x, height * 0.45)


def _branches(stage: Stage, x: float, z: float, length: float, width: float) -> None:
    """Twigs of a bare tree that split level by level, as fine as the distance lets one see."""
    rng, px = stage.rng, stage.camera.scale(z)
    color = stage.light.lit(scale(_BARK, 0.85), (0.3, 0.0, -0.9), z)
    start, turn = np.array([stage.camera.pixel(x, length * 1.1, z)]), np.array([-np.pi / 2])
    for level in range(5 if px > 18 else 4 if px > 8 else 3):
        forks = 3 if level < 3 else 2
        turn = np.repeat(turn, forks) + rng.uniform(-0.65, 0.65, len(turn) * forks)
        start = np.repeat(start, forks, axis=0)
        end = start + length * px * np.stack([np.cos(turn), np.sin(turn)], axis=1)
        stage.canvas.segments(np.stack([start, end], axis=1), 1.5 * width * px, color, TREE)
        start, length, width = end, length * 0.72, width * 0.6


def bush(rng: np.random.Generator, light: Light, x: float, z: float) -> Thing:
    """A rounded bush or planted pot at (x, z)."""
    half_w, half_h = rng.uniform(0.4, 1.4), rng.uniform(0.35, 0.9)
    color = scale(_LEAVES[int(rng.integers(6))], rng.uniform(0.75, 1.15))

    def paint(stage: Stage) -> None:
        crown(stage, (x, half_h * 0.85, z), half_w, half_h, color, 0.15)

    return Thing(z, paint, cast_shadow(light, circle(x, z, half_w * 0.8), half_h), [circle(x, z, half_w)], x, half_w)
