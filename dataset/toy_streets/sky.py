"""Light of the day, sky, clouds and the far skyline."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from dataset.toy_streets.labels import BUILDING, SKY, TREE, VOID, Color, mix, rgb, scale
from dataset.toy_streets.world import Light, Stage, noise_patch, sample_noise

_WEATHER = ("sunny", "hazy", "overcast", "rain", "dusk")
_WEATHER_SHARE = (0.42, 0.16, 0.22, 0.09, 0.11)
WIRE = rgb(40, 42, 45)


def sample_light(rng: np.random.Generator) -> Light:
    """Draw weather, position and colour of the sun."""
    name = str(rng.choice(_WEATHER, p=_WEATHER_SHARE))
    turn, height = rng.uniform(0, 2 * np.pi), rng.uniform(0.08, 0.25) if name == "dusk" else rng.uniform(0.35, 1.1)
    sun = (float(np.sin(turn) * np.cos(height)), float(np.sin(height)), float(np.cos(turn) * np.cos(height)))
    look = {"sunny": _sunny, "hazy": _hazy, "dusk": _dusk}.get(name)
    return Light(name=name, sun=sun, **(look(rng) if look else _grey(rng, name == "rain")))


def _sunny(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "ambient": _tint(rng.uniform(0.42, 0.58), -0.05),
        "direct": _tint(rng.uniform(0.62, 0.85), rng.uniform(0.02, 0.14)),
        "shadow": rng.uniform(0.4, 0.58),
        "haze": rgb(205, 218, 232),
        "thickness": rng.uniform(0.0012, 0.004),
        "sky_top": rgb(rng.uniform(55, 130), rng.uniform(115, 165), rng.uniform(190, 235)),
        "clouds": rng.uniform(-1.2, 0.9),
    }


def _hazy(rng: np.random.Generator) -> dict[str, Any]:
    warm, haze = rng.uniform(-0.04, 0.08), mix(rgb(214, 216, 216), rgb(232, 215, 190), rng.uniform(0, 1))
    return {
        "ambient": _tint(0.72, warm),
        "direct": _tint(0.32, warm + 0.05),
        "shadow": 0.2,
        "haze": haze,
        "thickness": rng.uniform(0.007, 0.015),
        "sky_top": mix(haze, rgb(165, 185, 205), 0.6),
        "clouds": rng.uniform(-0.8, 0.8),
    }


def _dusk(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "ambient": _tint(rng.uniform(0.36, 0.5), -0.06),
        "direct": _tint(0.22, 0.25),
        "shadow": 0.12,
        "haze": scale(mix(rgb(235, 150, 95), rgb(150, 130, 165), rng.uniform(0, 1)), 0.8),
        "thickness": rng.uniform(0.002, 0.006),
        "sky_top": rgb(45, 60, 110),
        "clouds": rng.uniform(-0.8, 0.6),
        "lamps": True,
    }


def _grey(rng: np.random.Generator, rain: bool) -> dict[str, Any]:
    grey = rng.uniform(125, 170) if rain else rng.uniform(150, 225)
    haze = rgb(grey * 0.98, grey, grey * 1.02)
    return {
        "ambient": _tint(0.6 if rain else rng.uniform(0.68, 0.88), -0.02),
        "direct": _tint(0.12, 0.0),
        "shadow": 0.0,
        "haze": haze,
        "thickness": rng.uniform(0.002, 0.008),
        "sky_top": scale(haze, 0.82),
        "clouds": 1.4,
        "wet": rain,
    }


def _tint(level: float, warmth: float) -> Color:
    return (level * (1 - warmth), level, level * (1 + warmth))


def paint_sky(stage: Stage) -> None:
    """Fill the whole canvas with sky: a gradient, the glow of a sun in front, clouds in perspective."""
    camera, light, rng = stage.camera, stage.light, stage.rng
    height, width = stage.canvas.height, stage.canvas.width
    rows = int(np.clip(camera.horizon + abs(camera.roll) * width, 8, height)) // 2
    up = np.maximum(camera.horizon - np.arange(0, 2 * rows, 2, dtype=np.float32)[:, None], 1.0)
    share = np.clip(1.0 - up / (0.9 * height), 0, 1) ** rng.uniform(1.2, 2.5)
    sky = (
        np.array(light.sky_top, np.float32) * (1 - share[..., None])
        + np.array(light.haze, np.float32) * share[..., None]
    )
    cols = np.arange(0, width, 2, dtype=np.float32)[None, :] - width / 2
    if light.sun[2] > 0.2 and light.shadow > 0:
        sun_x, sun_y = camera.focal * light.sun[0] / light.sun[2], camera.focal * light.sun[1] / light.sun[2]
        distance2 = ((cols - sun_x) ** 2 + (up - sun_y) ** 2) / (0.35 * width) ** 2
        sky = sky + np.exp(-distance2)[..., None] * np.array([60, 85, 110], np.float32)
    far = height / (up + 0.12 * height)
    zoom, (ox, oy) = rng.uniform(5.0, 12.0), rng.uniform(0, 500, 2)
    cloud = sample_noise(cols / width * far * zoom * 1.6 + ox, far * zoom * 2.0 + oy + 0 * cols, 1.6)
    cover = np.clip((cloud + light.clouds) * 0.8, 0, 1)[..., None] * rng.uniform(0.6, 0.95)
    shade = np.clip(1.0 - 0.11 * (cloud + light.clouds), 0.7, 1.05)[..., None]
    white = np.array(light.haze if light.lamps else mix(light.haze, rgb(252, 252, 252), 0.7), np.float32)
    sky = np.clip(sky * (1 - cover) + white * shade * cover, 0, 255).astype(np.uint8)
    canvas = stage.canvas.px
    canvas[: 2 * rows, :, :3] = cv2.resize(sky, (width, 2 * rows), interpolation=cv2.INTER_LINEAR)
    canvas[2 * rows :, :, :3] = canvas[2 * rows - 1 : 2 * rows, :, :3]
    canvas[..., 3] = SKY


def paint_skyline(stage: Stage) -> None:
    """Hills, woods and town far away, in one to three hazy layers just above the horizon."""
    camera, light, rng = stage.camera, stage.light, stage.rng
    width = stage.canvas.width
    for distance in (320.0, 220.0, 150.0)[: int(rng.integers(2, 4))]:
        kind = rng.choice(("wood", "town", "hill"), p=(0.45, 0.45, 0.1))
        top = camera.scale(distance) * rng.uniform(4, 13)
        cols = np.arange(-8, width + 9, 2, dtype=np.float32)
        if kind == "town":
            steps = rng.integers(0, 24, len(cols)).cumsum() // 90
            profile = rng.uniform(0.45, 1.5, int(steps.max()) + 1)[steps]
            color, label = rgb(*rng.uniform(90, 165, 3)), BUILDING
        else:
            profile = 0.8 + 0.28 * noise_patch(rng, 1, len(cols), 9.0 if kind == "hill" else 2.0, 1.0)[0]
            color, label = rgb(rng.uniform(45, 90), rng.uniform(70, 105), rng.uniform(35, 70)), TREE
        if kind == "hill":
            label = VOID
        base = camera.horizon + camera.roll * (cols - width / 2)
        points = np.stack([cols, base - top * profile], axis=1)
        points = np.concatenate([points, [[width + 8, base[-1] + 3], [-8, base[0] + 3]]])
        stage.canvas.poly(points, light.lit(color, (0.0, 0.3, -0.6), distance), label)


def paint_wires(stage: Stage) -> None:
    """Overhead cables across the street; they belong to the sky as far as the labels go."""
    camera, rng = stage.camera, stage.rng
    layer = stage.canvas.px.copy()
    for _ in range(int(rng.integers(1, 4))):
        z0, z1 = rng.uniform(6, 14), rng.uniform(14, 60)
        side = rng.choice((-1.0, 1.0))
        share = np.linspace(0, 1, 12)
        points = np.stack(
            [side * (6 - rng.uniform(0, 13) * share), 6.5 - 1.2 * share * (1 - share) * 4, z0 + (z1 - z0) * share],
            axis=1,
        )
        pixels = (camera.project(points) * 16).astype(np.int32)
        cv2.polylines(layer, [pixels], False, (*WIRE, 0), 1, cv2.LINE_AA, 4)
    stage.canvas.px[..., :3] = layer[..., :3]
