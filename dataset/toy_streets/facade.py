"""Pictures of house fronts: walls of brick, plaster, stone or glass with windows, doors, shops and posters."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from dataset.toy_streets.labels import Color, mix, rgb, scale
from dataset.toy_streets.world import Light, noise_patch

_WALLS: dict[str, tuple[Color, ...]] = {
    "brick": (rgb(140, 78, 62), rgb(120, 70, 58), rgb(160, 104, 76), rgb(176, 142, 102), rgb(98, 66, 58)),
    "plaster": (
        rgb(222, 214, 196),
        rgb(206, 186, 148),
        rgb(196, 198, 200),
        rgb(216, 170, 140),
        rgb(170, 186, 192),
        rgb(228, 224, 220),
        rgb(190, 160, 120),
        rgb(150, 172, 150),
        rgb(204, 120, 92),
    ),
    "stone": (rgb(172, 164, 148), rgb(150, 148, 146), rgb(188, 180, 160), rgb(124, 120, 116)),
    "glass": (rgb(70, 92, 108), rgb(96, 112, 118), rgb(60, 74, 84), rgb(108, 124, 138)),
    "concrete": (rgb(142, 140, 136), rgb(120, 120, 122), rgb(160, 156, 150)),
}
_SHARE = {"brick": 0.34, "plaster": 0.32, "stone": 0.14, "glass": 0.1, "concrete": 0.1}
_SHOP = (
    rgb(150, 32, 38),
    rgb(24, 70, 120),
    rgb(28, 92, 60),
    rgb(214, 170, 50),
    rgb(40, 40, 44),
    rgb(220, 220, 214),
    rgb(96, 48, 110),
    rgb(216, 110, 40),
)


@dataclass(frozen=True)
class Style:
    """The look of one house."""

    wall: str
    color: Color
    trim: Color
    floor: float
    pitch: float
    window: tuple[float, float]
    bars: int
    shop: bool
    shutters: Color | None
    balcony: bool


def sample_style(rng: np.random.Generator) -> Style:
    """Draw wall material and window habits of a house."""
    wall = str(rng.choice(list(_SHARE), p=list(_SHARE.values())))
    color = scale(_WALLS[wall][int(rng.integers(len(_WALLS[wall])))], rng.uniform(0.82, 1.08))
    trim = rgb(226, 224, 216) if rng.random() < 0.6 else scale(color, 0.62)
    pitch = rng.uniform(1.8, 3.4)
    window = (pitch * rng.uniform(0.35, 0.6), rng.uniform(1.3, 2.0))
    if wall == "glass":
        window = (pitch * 0.92, 2.5)
    shutters = _SHOP[int(rng.integers(len(_SHOP)))] if wall == "plaster" and rng.random() < 0.35 else None
    return Style(
        wall,
        color,
        trim,
        rng.uniform(2.8, 3.4),
        pitch,
        window,
        int(rng.integers(0, 3)),
        rng.random() < 0.4,
        shutters,
        rng.random() < 0.22,
    )


def front(
    rng: np.random.Generator,
    style: Style,
    width: float,
    height: float,
    detail: float,
    light: Light,
    blind: bool = False,
) -> np.ndarray:
    """Paint a front of `width` x `height` metres at `detail` pixels per metre: float32 [h, w, 3], unlit.

    `blind`: a side wall with hardly any window.
    """
    floors, columns = max(1, int(height / style.floor)), max(1, int(width / style.pitch))
    cell_h, cell_w = max(4, int(style.floor * detail)), max(4, int(width / columns * detail))
    wall = _wall(rng, style, floors * cell_h, columns * cell_w, detail)
    if not blind or rng.random() < 0.4:
        _windows(rng, style, wall, floors, columns, detail, light, 0.25 if blind else 1.0)
    ground = min(cell_h, wall.shape[0])
    if not blind:
        if style.shop:
            _shop(rng, wall[-ground:], detail, light)
        elif floors > 1 or rng.random() < 0.8:
            _door(rng, wall[-ground:], cell_w, detail)
    cornice = max(1, int(0.35 * detail))
    wall[:cornice] = style.trim
    wall[cornice : cornice + max(1, cornice // 2)] *= np.float32(0.7)
    if rng.random() < (0.5 if blind else 0.14):
        _poster(rng, wall, detail)
    return wall


def _wall(rng: np.random.Generator, style: Style, height: int, width: int, detail: float) -> np.ndarray:
    """Bare wall float32 [height, width, 3] with its courses, stains and weathering."""
    tone = 1 + 0.045 * noise_patch(rng, height, width, max(1.0, detail * 0.5), 1.4)
    tone += (0.04 - 0.12 / height * np.arange(height, dtype=np.float32))[:, None]
    if style.wall in ("brick", "stone", "concrete"):
        row, col = {"brick": (0.16, 0.5), "stone": (0.45, 0.8), "concrete": (style.floor, 3.0)}[style.wall]
        rows, cols = max(1, int(height / detail / row)), max(1, int(width / detail / col))
        spread = {"brick": 0.1, "stone": 0.07, "concrete": 0.03}[style.wall]
        block = np.float32(spread) * rng.standard_normal((rows, cols), dtype=np.float32)
        tone += cv2.resize(
            block, (width, height), interpolation=cv2.INTER_NEAREST if detail * row > 2 else cv2.INTER_AREA
        )
        if detail * row > 4:
            tone[np.arange(height) % max(2, int(detail * row)) == 0] *= 1.1 if style.wall == "brick" else 0.86
    else:
        tone += np.float32(0.02) * rng.standard_normal((height, width), dtype=np.float32)
    return tone[..., None] * np.array(style.color, np.float32)


def _windows(
    rng: np.random.Generator,
    style: Style,
    wall: np.ndarray,
    floors: int,
    columns: int,
    detail: float,
    light: Light,
    share: float,
) -> None:
    """Put a window into each cell of the floor grid; a few variants are drawn once and repeated."""
    cell_h, cell_w = wall.shape[0] // floors, wall.shape[1] // columns
    count = 1 if detail < 4.5 else 2 if detail < 9 else 4
    variants, masks = zip(*(_window(rng, style, cell_h, cell_w, detail, light) for _ in range(count)), strict=True)
    pick = rng.integers(0, count, (floors, columns))
    bright = rng.uniform(0.75, 1.2, (floors, columns, 1, 1, 1)).astype(np.float32)
    colors = np.stack(variants)[pick] * bright
    colors = colors.transpose(0, 2, 1, 3, 4).reshape(floors * cell_h, columns * cell_w, 3)
    present = (rng.random((1, columns)) < share) | (rng.random((floors, columns)) < share * 0.1)
    mask = (np.stack(masks)[pick] & present[:, :, None, None]).transpose(0, 2, 1, 3).reshape(colors.shape[:2])
    np.copyto(wall[: colors.shape[0], : colors.shape[1]], colors, where=mask[..., None])


def _window(
    rng: np.random.Generator, style: Style, cell_h: int, cell_w: int, detail: float, light: Light
) -> tuple[np.ndarray, np.ndarray]:
    """One window cell: float32 [cell_h, cell_w, 3] and the bool mask of what is not wall."""
    color, mask = np.zeros((cell_h, cell_w, 3), np.float32), np.zeros((cell_h, cell_w), np.uint8)
    w, h = max(2, int(style.window[0] * detail)), max(2, int(min(style.window[1], style.floor * 0.86) * detail))
    x0, y0 = (cell_w - w) // 2, max(0, int((cell_h - h) * 0.45))
    x1, y1 = x0 + w, y0 + h
    edge = max(1, int(0.09 * detail))
    if style.shutters and rng.random() < 0.8:
        half = max(1, w // 3)
        for a in (x0 - half, x1):
            color[y0:y1, max(0, a) : a + half], mask[y0:y1, max(0, a) : a + half] = style.shutters, 1
    color[max(0, y0 - edge) : y1 + edge, max(0, x0 - edge) : x1 + edge] = style.trim
    mask[max(0, y0 - edge) : y1 + edge, max(0, x0 - edge) : x1 + edge] = 1
    glass = mix(rgb(38, 46, 54), scale(light.haze, 0.7), rng.choice((0.08, 0.2, 0.45)))
    color[y0:y1, x0:x1] = glass
    if light.lamps and rng.random() < 0.45:
        color[y0:y1, x0:x1] = rgb(640, 520, 340) if rng.random() < 0.7 else rgb(560, 550, 500)
    color[y0 + h // 2 : y1, x0:x1] *= 0.82
    if rng.random() < 0.35:
        drop = int(h * rng.uniform(0.2, 0.8))
        color[y0 : y0 + drop, x0:x1] = scale(rgb(214, 208, 196), rng.uniform(0.6, 1))
    for k in range(style.bars):
        if k == 0:
            color[y0:y1, x0 + w // 2 : x0 + w // 2 + max(1, edge // 2)] = style.trim
        else:
            color[y0 + h // 3 : y0 + h // 3 + max(1, edge // 2), x0:x1] = style.trim
    if style.balcony and rng.random() < 0.7:
        rail = slice(min(cell_h - 1, y0 + int(h * 0.6)), min(cell_h, y1 + edge))
        a, b = max(0, x0 - w // 4), x1 + w // 4
        color[rail, a:b:2], mask[rail, a:b] = rgb(44, 46, 50), 1
        color[rail.start : rail.start + 1, a:b] = rgb(40, 42, 46)
    return color, mask > 0


def _shop(rng: np.random.Generator, strip: np.ndarray, detail: float, light: Light) -> None:
    """Turn the ground floor into shop fronts: fascia, lettering, display glass, door, sometimes an awning."""
    height, width = strip.shape[:2]
    start = 0
    while start < width:
        end = min(width, start + max(4, int(rng.uniform(4, 8) * detail)))
        body, text = _SHOP[int(rng.integers(len(_SHOP)))], rgb(240, 236, 220)
        strip[:, start:end] = scale(body, 0.8)
        fascia = max(2, int(height * 0.24))
        strip[:fascia, start:end] = body
        for x in range(start + (end - start) // 5, end - (end - start) // 5, max(2, int(0.32 * detail))):
            if rng.random() < 0.8:
                strip[fascia // 3 : fascia - fascia // 4, x : x + max(1, int(0.2 * detail))] = (
                    text if sum(body) < 480 else rgb(30, 30, 34)
                )
        pad = max(1, int(0.18 * detail))
        inside = rgb(60, 62, 62) if not light.lamps else rgb(560, 470, 300)
        view = strip[fascia + pad : height - max(1, int(0.4 * detail)), start + pad : end - pad]
        if view.size:
            blotch = 1 + 0.45 * noise_patch(rng, view.shape[0], view.shape[1], max(1.5, detail * 0.3), 0.9)
            view[:] = (
                blotch[..., None].clip(0.3, 2.4)
                * np.array(mix(inside, light.haze, 0.12), np.float32)
                * rng.uniform(0.7, 1.3, 3)
            )
        door = start + int((end - start) * rng.uniform(0.15, 0.7))
        strip[fascia + pad :, door : door + max(2, int(1.0 * detail))] = scale(body, 0.45)
        if rng.random() < 0.3:
            stripe = (np.arange(end - start) // max(1, int(0.4 * detail))) % 2
            cloth = np.where(stripe[:, None] == 0, body, rgb(236, 232, 222))
            strip[fascia : fascia + max(1, height // 5), start:end] = cloth[None]
        start = end + max(1, int(0.3 * detail))


def _door(rng: np.random.Generator, strip: np.ndarray, cell: int, detail: float) -> None:
    height, width = strip.shape[:2]
    color = _SHOP[int(rng.integers(len(_SHOP)))]
    for x in range(int(rng.integers(0, max(1, cell))), width, max(6, int(rng.uniform(6, 9) * detail))):
        tall, wide = min(height, int(2.2 * detail)), max(2, int(rng.uniform(1.0, 1.4) * detail))
        frame = max(1, int(0.12 * detail))
        strip[height - tall - frame :, max(0, x - frame) : x + wide + frame] = rgb(214, 210, 200)
        strip[height - tall :, x : x + wide] = color
        strip[height - tall : height - int(tall * 0.75), x + frame : x + wide - frame] = rgb(56, 66, 74)


def _poster(rng: np.random.Generator, wall: np.ndarray, detail: float) -> None:
    """A billboard that shows a car or people: building, whatever is on the picture."""
    h, w = int(rng.uniform(1.8, 3.2) * detail), int(rng.uniform(2.2, 4.5) * detail)
    if h < 8 or w < 8 or wall.shape[0] < h + 4 or wall.shape[1] < w + 4:
        return
    base = np.array(rng.uniform(90, 240, 3), np.float32)
    picture = np.linspace(1.1, 0.7, h, dtype=np.float32)[:, None, None] * np.ones((1, w, 1), np.float32) * base
    ink = tuple(float(c) for c in rng.uniform(20, 230, 3))
    if rng.random() < 0.5:
        car = np.array(
            [[0.08, 0.75], [0.1, 0.55], [0.28, 0.5], [0.4, 0.32], [0.68, 0.32], [0.8, 0.52], [0.93, 0.58], [0.93, 0.75]]
        )
        cv2.fillPoly(picture, [(car * (w, h)).astype(np.int32)], ink)
        for x in (0.27, 0.75):
            cv2.circle(picture, (int(x * w), int(0.76 * h)), max(1, int(0.09 * h)), (24, 24, 24), -1)
    else:
        for x in rng.uniform(0.2, 0.8, int(rng.integers(1, 3))):
            cv2.ellipse(picture, (int(x * w), h), (max(1, w // 6), int(h * 0.55)), 0, 180, 360, ink, -1)
            cv2.circle(picture, (int(x * w), int(h * 0.3)), max(1, int(h * 0.15)), rgb(210, 164, 134), -1)
    picture[: max(1, h // 16)] = picture[-max(1, h // 16) :] = 236
    picture[:, : max(1, h // 16)] = picture[:, -max(1, h // 16) :] = 236
    y, x = int(rng.integers(0, wall.shape[0] - h)), int(rng.integers(0, wall.shape[1] - w))
    wall[y : y + h, x : x + w] = picture
