"""Reading pictures and label files; every failure names the file and what was expected."""
from __future__ import annotations

import io
import os

import cv2
import numpy as np
from PIL import Image

from dataset.discovery import Sample
from utils.errors import UserError

JPEG_START, JPEG_SCAN, JPEG_END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
PNG_START, PNG_END = b"\x89PNG", b"IEND"


def _read_bytes(path: str | os.PathLike, what: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot read this {what}: {error.strerror or error}") from None
    if not data or _is_cut_off(data):
        raise UserError(f"{path}: truncated {what} ({len(data)} bytes); expected a complete picture file")
    return data


def _is_cut_off(data: bytes) -> bool:
    """True for a JPEG or PNG without its end mark (decoders may silently fill what is missing)."""
    if data.startswith(JPEG_START):
        return data.rfind(JPEG_END) < data.rfind(JPEG_SCAN)
    return data.startswith(PNG_START) and PNG_END not in data


def read_image(path: str | os.PathLike) -> np.ndarray:
    """A color picture: uint8 [H, W, 3], BGR. UserError when it is missing, empty, truncated or not a picture."""
    return _decode_image(_read_bytes(path, "image"), path)


def read_label(path: str | os.PathLike) -> np.ndarray:
    """A label file by index, uint8 [H, W]: the stored values of a gray file, the palette indices of a palette one.

    Raises UserError when it is missing, truncated, not a picture, or has no single 8-bit value per pixel.
    """
    return _decode_label(_read_bytes(path, "label"), path)


def read_files(sample: Sample) -> tuple[bytes, bytes | None]:
    """The bytes of the image and of the label (None: the sample has none)."""
    return _read_bytes(sample.image, "image"), _read_bytes(sample.label, "label") if sample.label is not None else None


def decode_pair(sample: Sample, image_data: bytes, label_data: bytes | None) -> tuple[np.ndarray, np.ndarray | None]:
    """The stored pair of :func:`read_files`: uint8 [H, W, 3] BGR, and uint8 [H, W] label values (None without label).

    Raises UserError as :func:`read_image` and :func:`read_label`, and for sizes that differ.
    """
    image = _decode_image(image_data, sample.image)
    if label_data is None:
        return image, None
    label = _decode_label(label_data, sample.label)
    if label.shape != image.shape[:2]:
        raise UserError(f"{sample.label}: label of {label.shape[0]}x{label.shape[1]} pixels; expected "
                        f"{image.shape[0]}x{image.shape[1]} (height x width), the size of {sample.image}")
    return image, label


def _decode_image(data: bytes, path: str | os.PathLike) -> np.ndarray:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        image = None
    if image is None:
        raise UserError(f"{path}: cannot decode this image; expected a picture file such as PNG or JPEG")
    return image


def _decode_label(data: bytes, path: str | os.PathLike) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as picture:
            mode = picture.mode
            label = np.array(picture, dtype=np.uint8) if mode in ("1", "L", "P") else None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot decode this label ({reason}); expected a complete index PNG") from None
    if label is None:
        raise UserError(f"{path}: picture mode {mode}; expected one 8-bit index per pixel (a gray or palette picture)")
    return label
