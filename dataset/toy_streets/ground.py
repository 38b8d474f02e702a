"""The ground: asphalt with markings, kerbs, slabs and verges, computed per pixel from road coordinates."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from dataset.toy_streets.labels import PAVEMENT, ROAD, TREE, Color, rgb
from dataset.toy_streets.world import Stage, Thing, clip_near, sample_noise

KERB = 0.22


@dataclass(frozen=True)
class Street:
    """Cross-section of the street, metres: the road from `left` to `right`, pavements of the two widths beside it."""

    left: float
    right: float
    pavement_left: float
    pavement_right: float
    lanes: int
    parking_left: float
    parking_right: float
    verge_left: bool
    verge_right: bool
    crossing: float | None
    junction: float | None

    def house_line(self, side: int) -> float:
        """x at which the pavement ends on the `side` (-1 left, 1 right)."""
        return self.left - self.pavement_left if side < 0 else self.right + self.pavement_right

    def kerb_line(self, side: int) -> float:
        """x at which the pavement begins."""
        return self.left if side < 0 else self.right


def sample_street(rng: np.random.Generator) -> Street:
    """Draw the cross-section of a street and what lies on it."""
    lanes = int(rng.choice((1, 2, 3, 4), p=(0.12, 0.6, 0.16, 0.12)))
    lane = rng.uniform(2.8, 3.5)
    parking = [float(rng.choice((0.0, 2.1), p=(0.45, 0.55))) for _ in range(2)]
    half = lanes * lane / 2
    pavement = rng.uniform(1.8, 5.6, 2)
    crossing = float(rng.uniform(8, 30)) if rng.random() < 0.4 else None
    junction = float(rng.uniform(35, 80)) if rng.random() < 0.3 else None
    verge = rng.random(2) < 0.2
    return Street(
        -half - parking[0],
        half + parking[1],
        float(pavement[0]),
        float(pavement[1]),
        lanes,
        parking[0],
        parking[1],
        bool(verge[0]),
        bool(verge[1]),
        crossing,
        junction,
    )


def _band(value: np.ndarray, centre: float | np.ndarray, width: float, footprint: np.ndarray) -> np.ndarray:
    """Share 0..1 of each pixel that a stripe of `width` around `centre` covers."""
    return np.clip((width / 2 - np.abs(value - centre)) / footprint + 0.5, 0, 1) * np.minimum(1, width / footprint)


def _grid(value: np.ndarray, period: float, width: float, footprint: np.ndarray) -> np.ndarray:
    """Share 0..1 of joints of `width` every `period`, fading where they become finer than a pixel."""
    offset = np.mod(value, period) - period / 2
    return _band(np.abs(offset), period / 2, width, footprint)


def paint_ground(stage: Stage, street: Street, things: list[Thing]) -> None:
    """Paint everything below the horizon with its shadows; labels road, pavement or (grass) tree."""
    camera, light, canvas = stage.camera, stage.light, stage.canvas
    first = int(np.clip(camera.horizon - abs(camera.roll) * camera.width, 0, canvas.height - 2)) // 2 * 2
    x, z = camera.ground(first)
    below = z > 0
    z = np.where(below, np.minimum(z, 400.0), 400.0)
    fine_x, fine_z = 2 * z / camera.focal, 2 * z * z / (camera.focal * camera.eye)
    color, label = _asphalt(stage, street, x, z, fine_x, fine_z)
    in_junction = np.abs(z - street.junction) < 4.5 if street.junction else np.zeros_like(below)
    for side in (-1, 1):
        edge = street.kerb_line(side)
        outside = ((x - edge) * side > 0) & ~in_junction
        off = (x[outside] - edge) * side
        color[outside], label[outside] = _pavement(
            stage, street, side, off, z[outside], fine_x[outside], fine_z[outside]
        )
        gutter = _band(x, edge - side * 0.12, 0.2, fine_x) * ~in_junction
        color *= 1 - 0.35 * gutter[..., None]
    shadow = _shadow_share(stage, first, things)
    gain = np.array(light.gain((0.0, 1.0, 0.0)), np.float32)
    tint = np.array([1.0 - light.shadow * 0.85, 1.0 - light.shadow, 1.0 - light.shadow * 1.05], np.float32)
    color *= gain * (1 + shadow[..., :1] * (tint - 1)) * (1 - 0.55 * shadow[..., 1:])
    air = (1 - np.exp(-light.thickness * z))[..., None]
    color += (np.array(light.haze, np.float32) - color) * air
    pixels = np.concatenate([np.clip(color, 0, 255).astype(np.uint8), label[..., None]], axis=2)
    twice = cv2.resize(pixels, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    sky = canvas.px[first : first + int(2 * abs(camera.roll) * camera.width) + 4]
    above = cv2.resize(
        (~below[: (len(sky) + 1) // 2]).astype(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST
    )
    twice[: len(sky)][above[: len(sky)] > 0] = sky[above[: len(sky)] > 0]
    canvas.px[first:] = twice


def _asphalt(
    stage: Stage, street: Street, x: np.ndarray, z: np.ndarray, fine_x: np.ndarray, fine_z: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    rng = stage.rng
    ox, oz = rng.uniform(0, 500, 2)
    level = rng.uniform(62, 128) * (0.8 if stage.light.wet else 1.0)
    tone = 0.07 * sample_noise(x * 1.7 + ox, z * 0.7 + oz, 1.3) + 0.035 * sample_noise(x * 40 + ox, z * 22 + oz, 0.3)
    lane = (street.right - street.parking_right - street.left - street.parking_left) / street.lanes
    inner = np.mod(x - street.left - street.parking_left, lane)
    tone -= 0.06 * (_band(inner, lane * 0.27, 0.5, fine_x) + _band(inner, lane * 0.73, 0.5, fine_x))
    crack = sample_noise(x * 5 + oz, z * 2.2 + ox, 1.5)
    tone -= 0.16 * np.clip(1 - np.abs(crack) * 14, 0, 1) * (fine_x < 0.05)
    for _ in range(int(rng.integers(0, 5))):
        px, pz, w, d = (
            rng.uniform(street.left, street.right),
            rng.uniform(4, 40),
            rng.uniform(0.5, 3),
            rng.uniform(1, 9),
        )
        tone += rng.choice((-0.16, -0.1, 0.09)) * _band(x, px, w, fine_x) * _band(z, pz, d, fine_z)
    for _ in range(int(rng.integers(0, 3))):
        cx, cz = rng.uniform(street.left, street.right), rng.uniform(5, 20)
        ring = (x - cx) ** 2 + (z - cz) ** 2
        tone -= 0.3 * (ring < 0.12) - 0.18 * (ring < 0.06)
    tint = np.array([1 + rng.uniform(-0.05, 0.05), 1.0, 1 + rng.uniform(-0.05, 0.05)], np.float32)
    color = (level * (1 + tone))[..., None].astype(np.float32) * tint
    paint, hue = _markings(stage, street, x, z, fine_x, fine_z)
    worn = np.clip(0.9 - 0.28 * np.maximum(sample_noise(x * 9 + oz, z * 5, 0.9) - rng.uniform(0, 1.5), 0), 0.15, 1)
    color += (hue - color) * (paint * worn)[..., None]
    return color, np.full(x.shape, ROAD, np.uint8)


def _markings(
    stage: Stage, street: Street, x: np.ndarray, z: np.ndarray, fine_x: np.ndarray, fine_z: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Coverage [h, w] and colour [h, w, 3] or [3] of the paint on the road."""
    rng = stage.rng
    white = np.array(rgb(232, 232, 226), np.float32)
    yellow = np.array(rgb(222, 178, 60), np.float32)
    line = np.zeros_like(x)
    left, right = street.left + street.parking_left, street.right - street.parking_right
    period = float(rng.choice((4.0, 6.0, 9.0)))
    dash = np.clip((np.abs(np.mod(z + rng.uniform(0, 9), period) - period / 2) - period * 0.22) / fine_z + 0.5, 0, 1)
    for k in range(1, street.lanes):
        at = left + (right - left) * k / street.lanes
        style = rng.choice(("dash", "solid", "double")) if 2 * k == street.lanes else "dash"
        if style == "double":
            line = np.maximum(line, _band(x, at - 0.13, 0.11, fine_x) + _band(x, at + 0.13, 0.11, fine_x))
        else:
            line = np.maximum(line, _band(x, at, 0.15, fine_x) * (dash if style == "dash" else 1.0))
    for edge, inward in ((left, 1), (right, -1)):
        style = rng.choice(("none", "line", "double"), p=(0.35, 0.4, 0.25))
        if style != "none":
            line = np.maximum(line, _band(x, edge + inward * 0.3, 0.12, fine_x))
        if style == "double":
            line = np.maximum(line, _band(x, edge + inward * 0.55, 0.12, fine_x))
    for parking, at in ((street.parking_left, left), (street.parking_right, right)):
        if parking and rng.random() < 0.6:
            reach = np.abs(x - (at + np.sign(at) * parking / 2)) < parking / 2
            line = np.maximum(line, _grid(z, 5.4, 0.12, fine_z) * reach)
    inside = (x > left) & (x < right)
    if street.crossing:
        apart = np.abs(z - street.crossing)
        line = line * (apart > 3.2)
        stripe = np.clip((0.26 - np.abs(np.mod(x, 1.04) - 0.52)) / fine_x + 0.5, 0, 1)
        line = np.maximum(line, stripe * np.clip((1.7 - apart) / fine_z + 0.5, 0, 1) * inside)
        line = np.maximum(line, _band(z, street.crossing - 2.9, 0.35, fine_z) * inside)
    if street.junction:
        line = line * (np.abs(z - street.junction) > 5)
    return line, yellow if rng.random() < 0.12 else white


_PAVINGS: tuple[tuple[Color, float, float], ...] = (
    (rgb(158, 154, 148), 0.6, 0.6),
    (rgb(172, 166, 152), 0.9, 0.6),
    (rgb(150, 112, 96), 0.24, 0.5),
    (rgb(132, 131, 132), 0.4, 0.4),
    (rgb(178, 172, 168), 1.2, 1.2),
    (rgb(140, 128, 116), 0.3, 0.3),
    (rgb(112, 112, 116), 9.0, 9.0),
)
_GRASS = (rgb(88, 108, 50), rgb(104, 112, 58), rgb(70, 92, 44), rgb(128, 122, 72))


def _pavement(
    stage: Stage, street: Street, side: int, off: np.ndarray, z: np.ndarray, fine_x: np.ndarray, fine_z: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Color [n, 3] and label [n] of ground pixels that lie `off` metres outside the kerb line."""
    rng = stage.rng
    base, across, along = _PAVINGS[int(rng.integers(len(_PAVINGS)))]
    gain = rng.uniform(0.8, 1.15)
    ox, oz = rng.uniform(0, 500, 2)
    cell = sample_noise(np.floor(off / across) * 7.3 + ox, np.floor(z / along) * 5.1 + oz, 0.2)
    seen = np.clip(1.2 - fine_z / along, 0, 1)
    tone = 0.06 * cell * seen + 0.05 * sample_noise(off * 1.1 + ox, z * 0.9 + oz, 1.3)
    tone += 0.04 * sample_noise(off * 31 + ox, z * 17 + oz, 0.3)
    tone -= 0.2 * np.maximum(_grid(off, across, 0.025, fine_x), _grid(z, along, 0.025, fine_z) * seen)
    color = gain * (1 + tone)[:, None] * np.array(base, np.float32)
    stone = np.clip((KERB - off) / fine_x + 0.5, 0, 1)[:, None]
    joint = (1 - 0.25 * _grid(z, 1.0, 0.04, fine_z))[:, None]
    color += (np.array(rgb(188, 186, 180), np.float32) * joint - color) * stone
    label = np.full(off.shape, PAVEMENT, np.uint8)
    width = street.pavement_left if side < 0 else street.pavement_right
    verge = street.verge_left if side < 0 else street.verge_right
    grass = (off > width) | (verge & (off > KERB) & (off < min(1.2, width * 0.45)))
    blade = 0.16 * sample_noise(off[grass] * 6 + ox, z[grass] * 3 + oz, 0.8)
    blade += 0.12 * sample_noise(off[grass] * 40 + ox, z[grass] * 15 + oz, 0.2)
    color[grass] = (1 + blade)[:, None] * np.array(_GRASS[int(rng.integers(len(_GRASS)))], np.float32)
    label[grass] = TREE
    return color.astype(np.float32), label


def _shadow_share(stage: Stage, first: int, things: list[Thing]) -> np.ndarray:
    """float32 [(H - first) / 2, W / 2, 2]: cast shadow and contact shadow of all things, soft at the edges."""
    camera = stage.camera
    share = np.zeros(((camera.height - first) // 2, camera.width // 2, 2), np.uint8)
    for index, outlines in enumerate(([s for t in things for s in t.shadows], [s for t in things for s in t.contacts])):
        layer = np.zeros(share.shape[:2], np.uint8)
        if outlines:
            flat = np.concatenate(outlines)
            flat = np.stack([flat[:, 0], np.zeros(len(flat)), flat[:, 1]], axis=1)
            clipped = [clip_near(o) for o in np.split(flat, np.cumsum([len(o) for o in outlines])[:-1])]
            pixels = ((camera.project(np.concatenate(clipped)) - (0, first)) * 8).astype(np.int32)
            for piece in np.split(pixels, np.cumsum([len(c) for c in clipped])[:-1]):
                if len(piece) >= 3:
                    cv2.fillPoly(layer, [piece], 255, cv2.LINE_8, 4)
        share[..., index] = layer
    sigma = camera.width / 640
    return cv2.GaussianBlur(share, (0, 0), sigma).astype(np.float32) / 255.0
