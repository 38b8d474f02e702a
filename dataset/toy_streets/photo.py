"""From the painted canvas to a photograph: grain, half size, wet road, lens, exposure, blur and sensor noise."""

from __future__ import annotations

import cv2
import numpy as np

from dataset.toy_streets.labels import PAVEMENT, ROAD
from dataset.toy_streets.world import Stage, noise_patch

_GRAIN = np.array([0.004, 0.05, 0.06, 0.03, 0.03, 0.08, 0.03, 0.06, 0.04, 0.08, 0.08, 0.05], np.float32)
"""Strength of the grain by label, void last."""


def develop(stage: Stage) -> np.ndarray:
    """The finished picture, uint8 BGR at half the canvas size."""
    rng, canvas = stage.rng, stage.canvas
    height, width = canvas.height // 2, canvas.width // 2
    fine = noise_patch(rng, canvas.height, canvas.width, max(1.0, width / 160), 0.7)
    grained = canvas.px[..., :3] * (1 + fine * _GRAIN[canvas.px[..., 3]])[..., None]
    picture = cv2.resize(grained, (width, height), interpolation=cv2.INTER_AREA)
    if stage.light.wet:
        picture = _mirror(stage, picture)
    picture = _lens(stage, picture)
    picture = _expose(rng, picture, stage.light.lamps)
    return picture.clip(0, 255).astype(np.uint8)


def _mirror(stage: Stage, picture: np.ndarray) -> np.ndarray:
    """A wet road shows the scene above the horizon upside down, blurred along the rows."""
    height, width = picture.shape[:2]
    horizon = stage.camera.horizon / 2
    rows = np.clip(2 * horizon - np.arange(height), 0, height - 1).astype(np.int64)
    mirrored = cv2.blur(picture[rows], (3, max(3, height // 20)))
    label = stage.canvas.px[::2, ::2, 3]
    puddle = np.clip(0.28 + 0.16 * noise_patch(stage.rng, height, width, width / 60, 1.2), 0, 0.6)
    share = np.where((label == ROAD) | (label == PAVEMENT), puddle, 0.0).astype(np.float32)[..., None]
    return picture * (1 - share) + mirrored * share


def _lens(stage: Stage, picture: np.ndarray) -> np.ndarray:
    """Glow of lamps, slight unsharpness, motion blur and darker corners."""
    rng = stage.rng
    height, width = picture.shape[:2]
    unit = width / 160
    if stage.light.lamps:
        bright = np.maximum(picture - 190, 0)
        picture = picture + 2.2 * cv2.GaussianBlur(bright, (0, 0), 3.0 * unit)
    blur = rng.random()
    if blur < 0.45:
        picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.3, 0.75) * min(unit, 1.5))
    elif blur < 0.55:
        size = max(2, round(rng.uniform(1.5, 3.0) * unit))
        kernel = np.full((1, size), 1.0 / size, np.float32)
        picture = cv2.filter2D(picture, -1, kernel if rng.random() < 0.7 else kernel.T)
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :] ** 2
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None] ** 2
    return picture * (1 - rng.uniform(0, 0.16) * (x + y))[..., None]


def _expose(rng: np.random.Generator, picture: np.ndarray, dark: bool) -> np.ndarray:
    """Exposure, white balance, contrast and saturation, then shot and read-out noise."""
    balance = rng.normal(1, 0.035, 3).astype(np.float32)
    picture = picture * (balance * rng.uniform(0.92, 1.25))
    grey = picture.mean(axis=2, keepdims=True)
    picture = grey + (picture - grey) * rng.uniform(0.7, 1.25)
    picture = (picture - 110) * rng.uniform(0.88, 1.16) + 110
    picture = 255 * (picture.clip(0, 255) / 255) ** rng.uniform(0.88, 1.15)
    read = rng.uniform(0.8, 4.5) + (2.0 if dark else 0.0)
    noise = rng.standard_normal(picture.shape, dtype=np.float32)
    if rng.random() < 0.4:
        noise = cv2.GaussianBlur(noise, (0, 0), 0.6) * 1.6
    return picture + noise * (read + 0.12 * np.sqrt(picture))
