"""Houses along the street and across its end, as boxes with painted fronts and roofs."""

from __future__ import annotations

import numpy as np

from dataset.toy_streets.facade import Style, front, sample_style
from dataset.toy_streets.labels import BUILDING, TREE, Color, mix, rgb, scale
from dataset.toy_streets.world import NEAR, Camera, Light, Stage, Thing, cast_shadow, signed_area

_ROOFS = (rgb(110, 62, 50), rgb(72, 72, 78), rgb(92, 84, 78), rgb(130, 84, 60), rgb(58, 62, 70))


def wall_quad(a: tuple[float, float], b: tuple[float, float], low: float, high: float) -> np.ndarray:
    """Upright rectangle [4, 3] above the ground line a..b, (x, z) each: top-left a, top-right b, then the bottom."""
    return np.array([[a[0], high, a[1]], [b[0], high, b[1]], [b[0], low, b[1]], [a[0], low, a[1]]])


def _normal(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float, float]:
    dx, dz = b[0] - a[0], b[1] - a[1]
    length = max(1e-6, (dx * dx + dz * dz) ** 0.5)
    return (dz / length, 0.0, -dx / length)


def shade_texture(
    texture: np.ndarray, light: Light, normal: tuple[float, float, float], z: float, shaded: float = 0.0
) -> np.ndarray:
    """Light and haze on a picture [h, w, 3]; its lowest share `shaded` lies in the shadow of the other side.

    Returns uint8 [h, w, 3].
    """
    clear = 2.718281828 ** (-light.thickness * z)
    gain = np.empty((texture.shape[0], 1, 3), np.float32)
    gain[:] = [g * clear for g in light.gain(normal)]
    gain[int(texture.shape[0] * (1 - shaded)) :] = [
        min(g, a) * clear for g, a in zip(light.gain(normal), light.ambient, strict=True)
    ]
    shaded_texture = texture * gain
    shaded_texture += np.array([h * (1 - clear) for h in light.haze], np.float32)
    return np.minimum(shaded_texture, 255, out=shaded_texture).astype(np.uint8)


def _put_front(
    stage: Stage, style: Style, a: tuple[float, float], b: tuple[float, float], height: float, blind: bool
) -> None:
    """Paint the wall above the ground line a (left on the screen) to b, if it is seen from its outer side."""
    camera, light = stage.camera, stage.light
    corners = wall_quad(a, b, 0.0, height)
    quad = camera.project(corners)
    if signed_area(quad) < 3 or quad[:, 0].max() < 0 or quad[:, 0].min() > camera.width:
        return
    normal = _normal(a, b)
    if np.ptp(quad[:, 0]) < 7:
        flat = mix(style.color, rgb(60, 66, 70), 0.3)
        stage.canvas.poly(quad, light.lit(flat, normal, (a[1] + b[1]) / 2), BUILDING)
        return
    z_seen = _nearest_seen(camera, a, b)
    width = float(np.hypot(b[0] - a[0], b[1] - a[1]))
    detail = float(np.clip(camera.scale(z_seen) * 0.8, 2.5, 34))
    texture = front(stage.rng, style, width, height, detail, light, blind)
    shaded = stage.rng.uniform(0, 0.6) if light.shadow > 0.3 and not blind else 0.0
    stage.canvas.warp(quad, shade_texture(texture, light, normal, (a[1] + b[1]) / 2, shaded), BUILDING)


def _nearest_seen(camera: Camera, a: tuple[float, float], b: tuple[float, float]) -> float:
    """Distance of the nearest part of a wall that is inside the picture."""
    places = [(a[0] + (b[0] - a[0]) * k / 6, a[1] + (b[1] - a[1]) * k / 6) for k in range(7)]
    return min((z for x, z in places if camera.sees(x, z, 0.0)), default=max(a[1], b[1]))


def house(
    rng: np.random.Generator,
    light: Light,
    side: int,
    x: float,
    z0: float,
    z1: float,
    heights: tuple[float, float] = (5.5, 15.0),
    adjoined: float = 0.0,
) -> tuple[Thing, float]:
    """A house on the `side` (-1 left, 1 right) whose front runs along x from z0 to z1, and its height.

    `adjoined`: height of a house that touches its near end; what that one hides is not painted.
    """
    style = sample_style(rng)
    height = rng.uniform(*heights) if rng.random() < 0.88 else rng.uniform(15, 30)
    depth = rng.uniform(8, 12)
    gable = height < 11 and style.wall in ("brick", "plaster") and rng.random() < 0.7
    roof = _ROOFS[int(rng.integers(len(_ROOFS)))]
    rise = rng.uniform(2.0, 3.6)
    z0 = max(z0, NEAR + 0.3)
    back = x + side * depth

    def paint(stage: Stage) -> None:
        near_wall = ((back, z0), (x, z0)) if side < 0 else ((x, z0), (back, z0))
        if height > adjoined:
            _put_front(stage, style, *near_wall, height, True)
        if gable and height + rise > adjoined:
            _roof(stage, side, x, back, z0, z1, height, rise, roof, style.color)
        _put_front(stage, style, *(((x, z0), (x, z1)) if side < 0 else ((x, z1), (x, z0))), height, False)
        if gable:
            _slope(stage, side, x, back, z0, z1, height, rise, roof)

    base = np.array([[x, z0], [x, z1], [back, z1], [back, z0]])
    return Thing(z1, paint, cast_shadow(light, base, height), [base + np.array([[-0.3 * side, 0.0]])]), height


def _roof(
    stage: Stage,
    side: int,
    x: float,
    back: float,
    z0: float,
    z1: float,
    height: float,
    rise: float,
    roof: Color,
    wall: Color,
) -> None:
    middle = (x + back) / 2
    gable = np.array([[x, height, z0], [middle, height + rise, z0], [back, height, z0]])
    stage.face(gable, wall, BUILDING, (0.0, 0.0, -1.0))
    if stage.rng.random() < 0.6:
        for z in np.linspace(z0 + 1, z1 - 1, 2):
            chimney = wall_quad((middle - 0.5, z), (middle + 0.5, z), height + rise - 0.6, height + rise + 1.1)
            stage.face(chimney, scale(wall, 0.8), BUILDING, (0.0, 0.0, -1.0))


def _slope(
    stage: Stage, side: int, x: float, back: float, z0: float, z1: float, height: float, rise: float, roof: Color
) -> None:
    eave, middle = x - side * 0.4, (x + back) / 2
    slope = np.array(
        [[eave, height - 0.1, z0], [middle, height + rise, z0], [middle, height + rise, z1], [eave, height - 0.1, z1]]
    )
    if signed_area(stage.camera.project(slope)) * -side <= 0:
        return
    stage.face(slope, roof, BUILDING, (-side * 0.5, 0.85, 0.0))
    for share in (0.25, 0.5, 0.75):
        if stage.camera.scale(z0) < 12:
            break
        line = slope[[0, 3]] + (slope[[1, 2]] - slope[[0, 3]]) * share
        pixels = stage.camera.project(line)
        stage.canvas.lines(
            pixels, 1, stage.light.lit(scale(roof, 0.8), (-side * 0.5, 0.85, 0.0), (z0 + z1) / 2), BUILDING
        )


def closing_house(rng: np.random.Generator, light: Light, x0: float, x1: float, z: float) -> Thing:
    """A house across the end of the street, its front to the camera."""
    style, height = sample_style(rng), rng.uniform(7, 18)

    def paint(stage: Stage) -> None:
        _put_front(stage, style, (x0, z), (x1, z), height, False)

    return Thing(z, paint, [], [np.array([[x0, z - 0.3], [x1, z - 0.3], [x1, z + 1], [x0, z + 1]])])


def garden_wall(rng: np.random.Generator, light: Light, side: int, x: float, z0: float, z1: float) -> Thing:
    """A low brick wall (building) or a clipped hedge (tree) at the end of the pavement."""
    z0 = max(z0, NEAR + 0.3)
    hedge = rng.random() < 0.5
    height = rng.uniform(0.9, 1.8) if hedge else rng.uniform(0.7, 1.5)
    style = sample_style(rng)
    color = rgb(rng.uniform(45, 75), rng.uniform(75, 105), rng.uniform(35, 50)) if hedge else style.color
    back = x + side * (0.9 if hedge else 0.3)

    def paint(stage: Stage) -> None:
        label = TREE if hedge else BUILDING
        ends = ((x, z0), (x, z1)) if side < 0 else ((x, z1), (x, z0))
        top = np.array([[x, height, z0], [x, height, z1], [back, height, z1], [back, height, z0]])
        stage.face(top, scale(color, 1.1), label, (0.0, 1.0, 0.0))
        stage.face(wall_quad((x, z0), (back, z0), 0, height), color, label, (0.0, 0.0, -1.0))
        stage.face(wall_quad(*ends, 0, height), color, label, (-float(side), 0.0, 0.0))

    base = np.array([[x, z0], [x, z1], [back, z1], [back, z0]])
    return Thing(z1, paint, cast_shadow(light, base, height), [base])
