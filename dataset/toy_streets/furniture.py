"""Street furniture: lamp posts, masts, traffic signs and lights, railings and fences, bins."""

from __future__ import annotations

import numpy as np

from dataset.toy_streets.buildings import shade_texture, wall_quad
from dataset.toy_streets.labels import FENCE, POLE, SIGN, VOID, Color, rgb, scale
from dataset.toy_streets.world import NEAR, Light, Stage, Thing, cast_shadow, circle, post_shadow

_METAL = (rgb(92, 96, 98), rgb(140, 144, 146), rgb(48, 54, 52), rgb(40, 62, 52), rgb(176, 178, 176))
_WOOD = rgb(104, 80, 58)
_RED, _WHITE, _BLUE, _BLACK = rgb(196, 28, 36), rgb(238, 238, 236), rgb(28, 76, 164), rgb(22, 22, 24)
_TO_CAMERA = (0.0, 0.2, -0.98)


def _bar(
    stage: Stage, a: tuple[float, float, float], b: tuple[float, float, float], width: float, color: Color, label: int
) -> None:
    """A round bar between two world points, lit from the sun's side; the label keeps it however thin it is."""
    points = np.array([stage.camera.pixel(*a), stage.camera.pixel(*b)])
    z = (a[2] + b[2]) / 2
    thick = max(1.0, width * stage.camera.scale(z))
    stage.canvas.lines(points, thick, stage.light.lit(color, _TO_CAMERA, z), label)
    if thick > 3.5:
        shift = thick * 0.25 * (1 if stage.light.sun[0] > 0 else -1)
        bright = stage.light.lit(scale(color, 1.35), _TO_CAMERA, z)
        stage.canvas.lines(points + (shift, 0.0), thick * 0.3, bright, label)


def lamp_post(rng: np.random.Generator, light: Light, x: float, z: float, side: int) -> Thing:
    """A street lamp, its arm over the road, or a wooden mast without lamp."""
    metal = _METAL[int(rng.integers(len(_METAL)))]
    wood = rng.random() < 0.2
    height, width = rng.uniform(5.0, 9.0), rng.uniform(0.1, 0.17)
    arm = rng.uniform(0.6, 2.2)

    def paint(stage: Stage) -> None:
        color = _WOOD if wood else metal
        _bar(stage, (x, 0, z), (x, height, z), width * (1.35 if wood else 1.0), color, POLE)
        _bar(stage, (x, 0, z), (x, 0.9, z), width * 1.35, scale(color, 0.9), POLE)
        if wood:
            _bar(stage, (x - 0.8, height - 0.4, z), (x + 0.8, height - 0.4, z), 0.1, color, POLE)
            return
        tip = (x - side * arm, height + 0.35, z)
        _bar(stage, (x, height, z), tip, width * 0.6, color, POLE)
        u, v = stage.camera.pixel(*tip)
        px = stage.camera.scale(z)
        glow = rgb(255, 226, 150) if stage.light.lamps else stage.light.lit(rgb(170, 172, 168), _TO_CAMERA, z)
        stage.canvas.ellipse(u, v, max(1.5, 0.42 * px), max(1.0, 0.12 * px), glow, POLE)

    return Thing(
        z, paint, post_shadow(light, x, z, 2 * width * 0.6, height), [circle(x, z, width * 1.6, 8)], x, arm + 1
    )


def _plate(stage: Stage, shape: str, x: float, y: float, z: float, size: float, back: bool) -> None:
    """One sign plate of half width `size` metres around (x, y, z)."""
    u, v = stage.camera.pixel(x, y, z)
    r = size * stage.camera.scale(z)
    light, canvas = stage.light, stage.canvas

    def ink(color: Color) -> Color:
        return light.lit(color, _TO_CAMERA, z)

    turns = {"triangle": 3, "octagon": 8, "diamond": 4}
    if shape in turns:
        count = turns[shape]
        angle = np.linspace(0, 2 * np.pi, count, endpoint=False) + (np.pi / 8 if count == 8 else 0.0)
        outline = np.stack([np.sin(angle), -np.cos(angle)], axis=1)
        inner = {"triangle": _WHITE, "octagon": _RED, "diamond": rgb(240, 196, 40)}[shape]
        canvas.poly((u, v) + r * outline, ink(rgb(120, 122, 122) if back else _WHITE if count == 4 else _RED), SIGN)
        if not back:
            canvas.poly((u, v) + r * outline * (0.6 if count == 3 else 0.84), ink(inner), SIGN)
            canvas.ellipse(u, v, r * 0.12, r * 0.3, ink(_WHITE if count == 8 else _BLACK), SIGN)
    elif shape == "round":
        red = stage.rng.random() < 0.6
        canvas.ellipse(u, v, r, r, ink(rgb(120, 122, 122) if back else _RED if red else _BLUE), SIGN)
        if not back:
            canvas.ellipse(u, v, r * (0.7 if red else 0.45), r * (0.7 if red else 0.14), ink(_WHITE), SIGN)
            if red:
                canvas.ellipse(u, v, r * 0.28, r * 0.38, ink(_BLACK), SIGN)
    else:
        wide = r * (1.9 if shape == "board" else 0.8)
        tall = r * (1.0 if shape == "board" else 1.1)
        box = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float)
        color = (_BLUE, rgb(20, 104, 60), _WHITE, rgb(236, 188, 40))[int(stage.rng.integers(4))]
        canvas.poly((u, v) + box * (wide, tall), ink(rgb(120, 122, 122) if back else _WHITE), SIGN)
        if not back:
            canvas.poly((u, v) + box * (wide * 0.92, tall * 0.92), ink(color), SIGN)
            text = ink(_WHITE if sum(color) < 420 else _BLACK)
            for k in (-0.45, 0.05, 0.5):
                span = np.array([[-0.7 * wide, k * tall], [stage.rng.uniform(-0.1, 0.7) * wide, k * tall]])
                canvas.lines((u, v) + span, max(1.0, r * 0.16), text, SIGN)


def traffic_sign(rng: np.random.Generator, light: Light, x: float, z: float) -> Thing:
    """One or two plates on a post."""
    height = rng.uniform(2.2, 3.2)
    shapes = rng.choice(
        ("triangle", "round", "octagon", "diamond", "panel", "board"), 2, p=(0.22, 0.32, 0.1, 0.1, 0.16, 0.1)
    )
    double, back = rng.random() < 0.35, rng.random() < 0.16
    size = rng.uniform(0.34, 0.52)

    def paint(stage: Stage) -> None:
        _bar(stage, (x, 0, z), (x, height, z), 0.09, rgb(136, 138, 138), POLE)
        _plate(stage, str(shapes[0]), x, height, z, size, back)
        if double:
            _plate(
                stage, str(shapes[1]) if shapes[1] != "board" else "panel", x, height - 1.9 * size, z, size * 0.85, back
            )

    return Thing(z, paint, post_shadow(light, x, z, 2 * 0.06, height), [circle(x, z, 0.15, 8)], x, 1.2)


def traffic_light(rng: np.random.Generator, light: Light, x: float, z: float, side: int) -> Thing:
    """A signal on a post, sometimes a second one on an arm above the road."""
    lit = int(rng.integers(3))
    arm = rng.random() < 0.4

    def paint(stage: Stage) -> None:
        height = 5.6 if arm else 3.2
        _bar(stage, (x, 0, z), (x, height, z), 0.13, rgb(70, 74, 74), POLE)
        heads = [(x, 2.9)]
        if arm:
            _bar(stage, (x, height, z), (x - side * 3.2, height + 0.1, z), 0.1, rgb(70, 74, 74), POLE)
            heads.append((x - side * 3.1, height - 0.2))
        for hx, hy in heads:
            _signal_head(stage, hx, hy, z, lit)

    return Thing(z, paint, post_shadow(light, x, z, 2 * 0.1, 3.4), [circle(x, z, 0.25, 8)], x, 4.0)


def _signal_head(stage: Stage, x: float, y: float, z: float, lit: int) -> None:
    u, v = stage.camera.pixel(x, y, z)
    px = stage.camera.scale(z)
    box = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float)
    far = stage.light.far
    stage.canvas.poly((u, v) + box * (0.27 * px, 0.6 * px), far(rgb(30, 32, 30), z), SIGN)
    on = (rgb(255, 40, 30), rgb(255, 190, 40), rgb(40, 240, 130))
    for k in range(3):
        color = on[k] if k == lit else scale(on[k], 0.22)
        stage.canvas.ellipse(u, v + (k - 1) * 0.37 * px, 0.14 * px, 0.14 * px, far(color, z), SIGN)


def fence(rng: np.random.Generator, light: Light, side: int, x: float, z0: float, z1: float) -> Thing:
    """A railing, picket fence, mesh or board fence along x from z0 to z1; the open ones are seen through."""
    z0 = max(z0, NEAR + 0.3)
    kind = str(rng.choice(("rail", "picket", "mesh", "board", "guard"), p=(0.4, 0.18, 0.14, 0.16, 0.12)))
    height = {
        "rail": rng.uniform(1.0, 1.6),
        "picket": rng.uniform(0.9, 1.3),
        "mesh": rng.uniform(1.6, 2.6),
        "board": rng.uniform(1.4, 2.0),
        "guard": 1.0,
    }[kind]
    green = rgb(48, 76, 50)
    color = {
        "rail": (rgb(40, 42, 44), green, rgb(170, 172, 170))[int(rng.integers(3))],
        "picket": (rgb(226, 222, 210), _WOOD)[int(rng.integers(2))],
        "mesh": (green, rgb(130, 134, 134))[int(rng.integers(2))],
        "board": (_WOOD, rgb(128, 104, 78), green)[int(rng.integers(3))],
        "guard": rgb(168, 170, 170),
    }[kind]

    def paint(stage: Stage) -> None:
        ends = ((x, z0), (x, z1)) if side < 0 else ((x, z1), (x, z0))
        quad = stage.camera.project(wall_quad(*ends, 0.0, height))
        detail = float(np.clip(stage.camera.scale(max(z0, 7.0)), 6, 48))
        texture, alpha = _lattice(stage.rng, kind, z1 - z0, height, detail, color)
        shaded = shade_texture(texture, light, (-float(side), 0.0, 0.0), (z0 + z1) / 2)
        stage.canvas.warp(quad, shaded, FENCE, alpha)

    line = np.array([[x - 0.06, z0], [x + 0.06, z0], [x + 0.06, z1], [x - 0.06, z1]])
    solid = kind in ("board", "guard")
    return Thing(z1, paint, cast_shadow(light, line, height) if solid else [], [line])


def _lattice(
    rng: np.random.Generator, kind: str, length: float, height: float, detail: float, color: Color
) -> tuple[np.ndarray, np.ndarray]:
    """Picture uint8 [h, w, 3] and cover uint8 [h, w] of `length` x `height` metres of fence."""
    h, w = max(6, int(height * detail)), max(8, int(length * detail))
    y, x = np.arange(h)[:, None] / detail, np.arange(w)[None, :] / detail
    line = max(0.035, 0.7 / detail)
    if kind == "rail":
        cover = (
            (np.mod(x, 0.16) < line)
            | (np.abs(y - 0.08) < line)
            | (np.abs(y - height + 0.12) < line)
            | (np.mod(x, 2.2) < 0.09)
        )
    elif kind == "picket":
        cover = (np.mod(x, 0.2) < 0.12) & (y > 0.06 * (np.mod(x, 0.4) < 0.2)) | (np.abs(y - height * 0.3) < 0.05)
    elif kind == "mesh":
        cover = (
            (np.mod(x + y, 0.17) < line * 0.8)
            | (np.mod(x - y, 0.17) < line * 0.8)
            | (np.mod(x, 2.6) < 0.08)
            | (y < 0.06)
        )
    elif kind == "guard":
        cover = ((y > 0.15) & (y < 0.55)) | (np.mod(x, 2.0) < 0.12)
    else:
        cover = np.ones((h, w), bool)
    tone = np.repeat(rng.normal(1, 0.09, max(1, int(length / 0.18) + 1)), max(1, int(0.18 * detail)))
    tone = np.resize(tone, w)[None, :] * (1 - 0.3 * (np.mod(x, 0.18) < line) * (kind == "board"))
    tone = tone * (1 + (0.18 * np.sin(y / max(height, 0.1) * 14) if kind == "guard" else 0.0 * y))
    picture = np.clip(tone[..., None] * np.array(color), 0, 255).astype(np.uint8)
    return picture, (cover * 235).astype(np.uint8) if kind != "board" else (cover * 255).astype(np.uint8)


def bin_or_box(rng: np.random.Generator, light: Light, x: float, z: float) -> Thing:
    """A litter bin, cabinet or parcel on the pavement: things without a class, so void."""
    w, h = rng.uniform(0.22, 0.5), rng.uniform(0.6, 1.5)
    color = (rgb(44, 82, 56), rgb(62, 66, 70), rgb(150, 40, 40), rgb(150, 150, 146), rgb(34, 58, 110))[
        int(rng.integers(5))
    ]

    def paint(stage: Stage) -> None:
        d = w * 0.8
        for face, normal in (
            (np.array([[x - w, h, z - d], [x + w, h, z - d], [x + w, h, z + d], [x - w, h, z + d]]), (0.0, 1.0, 0.0)),
            (wall_quad((x - w, z - d), (x + w, z - d), 0, h), (0.0, 0.0, -1.0)),
        ):
            stage.face(face, color, VOID, normal)
        stage.face(
            wall_quad((x - w, z - d), (x + w, z - d), h * 0.82, h * 0.95), scale(color, 0.5), VOID, (0.0, 0.0, -1.0)
        )

    base = np.array([[x - w, z - w], [x + w, z - w], [x + w, z + w], [x - w, z + w]])
    return Thing(z, paint, cast_shadow(light, base, h), [base], x, 1.0)
