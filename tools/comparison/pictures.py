"""The pictures of a page: each as text that an ``<img>`` takes as its source."""
from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from PIL import Image

from tools.comparison.answers import BOTH_RIGHT, BOTH_WRONG, IGNORED, ONLY_DISTILLED, ONLY_PLAIN, error_map
from utils.visualize import IGNORE_COLOR, color_mask

#: wider pictures are made smaller
MOST_WIDTH = 960
#: what an error map shows: title and color, in the order of its values
ERRORS = {BOTH_RIGHT: ("both right", (203, 209, 215)), ONLY_DISTILLED: ("only distilled right", (0, 114, 178)),
          ONLY_PLAIN: ("only plain right", (230, 159, 0)), BOTH_WRONG: ("both wrong", (66, 72, 80)),
          IGNORED: ("not labeled", IGNORE_COLOR)}


def views(item: Mapping[str, Any], answers: Mapping[str, np.ndarray], palette: np.ndarray) -> dict[str, str]:
    """{title: source} of one image: itself, the truth, each network's answer, and where the students err.

    item: of the data set. answers: {role: classes [H,W]}, with "plain" and "distilled"."""
    photo, label = item["image"].permute(1, 2, 0).numpy()[..., ::-1], item["label"].numpy()
    errors = error_map(label, answers["plain"], answers["distilled"])
    colors = np.array([color for _, color in ERRORS.values()], np.uint8)
    masks = {"truth": color_mask(label, palette), **{role: color_mask(x, palette) for role, x in answers.items()},
             "errors": color_mask(errors, colors)}
    return {"image": source(photo, is_mask=False), **{title: source(x, is_mask=True) for title, x in masks.items()}}


def source(image: np.ndarray, is_mask: bool) -> str:
    """An RGB image uint8 [H,W,3] as a data URI of WebP. A mask keeps its colors exactly, a photograph nearly."""
    height, width = image.shape[:2]
    if width > MOST_WIDTH:
        size = (MOST_WIDTH, max(round(height * MOST_WIDTH / width), 1))
        image = cv2.resize(np.ascontiguousarray(image), size,
                           interpolation=cv2.INTER_NEAREST if is_mask else cv2.INTER_AREA)
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(stream, "WEBP", lossless=is_mask, quality=80, method=4)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def as_css(color: np.ndarray | tuple[int, int, int]) -> str:
    """A color as CSS writes it: "#0072b2"."""
    return "#" + "".join(f"{int(part):02x}" for part in color)
