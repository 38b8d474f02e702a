"""Pictures of predictions: colour masks, overlays, palette files, titled panels. All images are RGB uint8 [H,W,3]."""
from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from utils.files import write_atomically

Color = tuple[int, int, int]

#: colour of ignored pixels, and their index in palette files
IGNORE_COLOR: Color = (255, 255, 255)
IGNORE_INDEX = 255

_INK, _FAINT, _PAPER = (33, 37, 41), (108, 117, 125), (255, 255, 255)
_EDGE = (173, 181, 189)


def color_mask(index: np.ndarray | Tensor, palette: np.ndarray, ignore: Color = IGNORE_COLOR) -> np.ndarray:
    """Class indices [H,W] (any integer dtype) -> colors [H,W,3]; values outside 0..K-1 get ``ignore``.

    palette: uint8 [K,3] RGB."""
    index = np.asarray(index).astype(np.int64)
    count = len(palette)
    table = np.concatenate([np.asarray(palette, np.uint8), np.array([ignore], np.uint8)])
    return table[np.where((index >= 0) & (index < count), index, count)]


def overlay(image: np.ndarray, index: np.ndarray | Tensor, palette: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """The image [H,W,3] with the colors of the classes [H,W] mixed in; where no class is, the image stays as it is."""
    index = np.asarray(index)
    mixed = np.rint((1 - alpha) * image + alpha * color_mask(index, palette)).astype(np.uint8)
    is_class = (index >= 0) & (index < len(palette))
    return np.where(is_class[..., None], mixed, image)


def with_legend(image: np.ndarray, classes: Sequence[str], palette: np.ndarray) -> np.ndarray:
    """An image [H,W,3] on top of a strip of white paper, as wide, with the color (uint8 [K,3] RGB) and name of each
    class, at least one."""
    width = image.shape[1]
    margin, font = max(width // 60, 4), _font(min(max(width // 40, 12), 28))
    legend = _legend(classes, palette, max(width - 2 * margin, 1), font)
    side = width - legend.shape[1]
    around = ((margin, margin), (side // 2, side - side // 2), (0, 0))
    return np.concatenate([image, np.pad(legend, around, constant_values=255)])


def save_rgb(path: Path, image: np.ndarray) -> None:
    """Write an RGB image [H,W,3] as PNG, atomically."""
    _save(path, Image.fromarray(np.ascontiguousarray(image)))


def save_index(path: Path, index: np.ndarray | Tensor, palette: np.ndarray | None = None) -> None:
    """Write class indices [H,W] as an 8-bit PNG, atomically; values outside 0..254 become 255.

    With a palette (uint8 [K,3] RGB) it is a palette file: programs read indices, viewers show colors. Without one it
    is a grey file, which OpenCV too reads as indices."""
    index = np.asarray(index)
    index = np.where((index >= 0) & (index < IGNORE_INDEX), index, IGNORE_INDEX).astype(np.uint8)
    picture = Image.fromarray(index)
    if palette is not None:
        colors = np.full((256, 3), IGNORE_COLOR, np.uint8)
        colors[:min(len(palette), IGNORE_INDEX)] = np.asarray(palette, np.uint8)[:IGNORE_INDEX]
        picture.putpalette(colors.tobytes())
    _save(path, picture)


def _save(path: Path, picture: Image.Image) -> None:
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))


def panel(images: Sequence[np.ndarray], titles: Sequence[str] = (), *, columns: int | None = None,
          heading: str = "", classes: Sequence[str] = (), palette: np.ndarray | None = None,
          tile_width: int = 360) -> np.ndarray:
    """A grid of pictures on white paper.

    images: RGB uint8 [h,w,3], in reading order; each is fitted into a tile of the shape of the first one. titles: one
    per column (shown above the first row) or one per image; a second line after "\\n" is smaller. columns: default all
    in one row. heading: a line above everything. classes, with ``palette`` [K,3]: a legend strip below.
    Returns uint8 [H,W,3]."""
    columns = columns or len(images)
    rows = math.ceil(len(images) / columns)
    if len(titles) not in (0, columns, len(images)):
        raise ValueError(f"{len(titles)} titles for {len(images)} images in {columns} columns")
    first = images[0].shape
    size = (tile_width, max(round(tile_width * first[0] / first[1]), 1))
    margin, gap = max(tile_width // 18, 8), max(tile_width // 36, 5)
    # one title per column stands above the first row only
    per_row = [list(titles[r * columns:(r + 1) * columns]) if len(titles) > columns or r == 0 else []
               for r in range(rows)]
    font, small, head = (_font(max(tile_width // part, least)) for part, least in ((18, 12), (21, 11), (15, 14)))
    width = 2 * margin + columns * size[0] + (columns - 1) * gap
    legend = _legend(classes, palette, width - 2 * margin, small) if len(classes) else None

    blocks = [_heading(heading, width, margin, head)] if heading else []
    for r in range(rows):
        texts = _titles(per_row[r], width, size[0] + gap, margin, font, small)
        if texts is not None:
            blocks.append(texts)
        blocks.append(_row(images[r * columns:(r + 1) * columns], size, width, margin, gap))
        blocks.append(_paper(gap, width))
    if legend is not None:
        blocks.append(np.pad(legend, ((gap, 0), (margin, margin), (0, 0)), constant_values=255))
    top = 0 if heading or len(titles) else margin
    return np.concatenate([_paper(top, width), *blocks, _paper(margin - gap, width)])


def comparison(images: Sequence[np.ndarray], labels: Sequence[np.ndarray | Tensor],
               predictions: Sequence[Sequence[np.ndarray | Tensor]], titles: Sequence[str], *, palette: np.ndarray,
               classes: Sequence[str] = (), heading: str = "", tile_width: int = 360) -> np.ndarray:
    """One row per sample: image, truth, then one column per model.

    images: RGB uint8 [H,W,3] each; labels: class indices [H,W] each. predictions: one sequence per model, of class
    indices [H,W] per sample. titles: one per model, such as "teacher\\nmIoU 61.2 %". classes: names for the legend,
    which shows those that occur in labels or predictions (at most 48)."""
    tiles: list[np.ndarray] = []
    occurring: set[int] = set()
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        maps = [np.asarray(label), *(np.asarray(model[i]) for model in predictions)]
        # where the truth is unknown, a prediction can be neither right nor wrong; it is shown all the same
        tiles += [image, *(color_mask(index, palette) for index in maps)]
        occurring.update(int(value) for index in maps for value in np.unique(index))
    shown = sorted(value for value in occurring if 0 <= value < len(palette))[:48]
    names = [classes[value] for value in shown] if len(classes) else []
    colors = np.asarray(palette, np.uint8)[shown]
    if names and occurring - set(range(len(palette))):
        names, colors = [*names, "ignored"], np.concatenate([colors, np.array([IGNORE_COLOR], np.uint8)])
    return panel(tiles, ["image", "truth", *titles], columns=2 + len(predictions), heading=heading, classes=names,
                 palette=colors, tile_width=tile_width)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _paper(height: int, width: int) -> np.ndarray:
    return np.full((max(height, 0), width, 3), _PAPER, np.uint8)


def _fit(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize to fit (width, height), centred on white. Enlarging keeps hard edges, as masks need."""
    height, width = image.shape[:2]
    factor = min(size[0] / width, size[1] / height)
    new = (max(round(width * factor), 1), max(round(height * factor), 1))
    # masks have few colors: mixing neighbours would invent classes
    is_mask = len(np.unique(image.reshape(-1, 3)[::7], axis=0)) <= 256
    method = cv2.INTER_NEAREST if is_mask else cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    tile = _paper(size[1], size[0])
    top, left = (size[1] - new[1]) // 2, (size[0] - new[0]) // 2
    tile[top:top + new[1], left:left + new[0]] = cv2.resize(np.ascontiguousarray(image), new, interpolation=method)
    return tile


def _row(images: Sequence[np.ndarray], size: tuple[int, int], width: int, margin: int, gap: int) -> np.ndarray:
    """Pictures side by side, each with a thin edge, so that white ones stand out from the paper."""
    block = _paper(size[1], width)
    for i, image in enumerate(images):
        tile = _fit(image, size)
        tile[[0, -1], :] = _EDGE
        tile[:, [0, -1]] = _EDGE
        left = margin + i * (size[0] + gap)
        block[:, left:left + size[0]] = tile
    return block


def _heading(text: str, width: int, margin: int, font: ImageFont.FreeTypeFont) -> np.ndarray:
    height = _line_height(font)
    canvas = Image.new("RGB", (width, margin + height), _PAPER)
    ImageDraw.Draw(canvas).text((margin, margin * 2 // 3), text, fill=_INK, font=font)
    return np.asarray(canvas)


def _titles(titles: Sequence[str], width: int, step: int, margin: int, font: ImageFont.FreeTypeFont,
            small: ImageFont.FreeTypeFont) -> np.ndarray | None:
    """Titles above a row, or None; the first line of each in ink, further lines smaller and grey."""
    lines = max((title.count("\n") + 1 for title in titles), default=0)
    if not lines:
        return None
    heights = [_line_height(font), *[_line_height(small)] * (lines - 1)]
    canvas = Image.new("RGB", (width, margin // 2 + sum(heights) + 4), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, title in enumerate(titles):
        top = margin // 2
        for k, line in enumerate(title.split("\n")):
            used, ink = (font, _INK) if k == 0 else (small, _FAINT)
            draw.text((margin + i * step, top), _shorten(line, used, step - 6), fill=ink, font=used)
            top += heights[k]
    return np.asarray(canvas)


def _legend(classes: Sequence[str], palette: np.ndarray, width: int, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """Color swatches with class names, in columns of equal width."""
    height = _line_height(font)
    swatch = height * 3 // 4
    step = min(swatch + height + math.ceil(max(font.getlength(name) for name in classes)), width)
    columns = max(width // step, 1)
    rows = math.ceil(len(classes) / columns)
    canvas = Image.new("RGB", (width, rows * height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, (name, colour) in enumerate(zip(classes, np.asarray(palette), strict=True)):
        left, top = (i % columns) * step, (i // columns) * height
        inset = (height - swatch) // 2
        draw.rectangle((left, top + inset, left + swatch, top + inset + swatch), tuple(int(c) for c in colour), _EDGE)
        draw.text((left + swatch + height // 3, top + height // 2), _shorten(name, font, step - swatch - height // 3),
                  fill=_INK, font=font, anchor="lm")
    return np.asarray(canvas)


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    return round(font.size * 1.45)


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, with its end replaced by "..." where it is wider than ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
