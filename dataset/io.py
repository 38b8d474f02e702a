"""Reading pictures and label files; every failure names the file and what was expected."""
from __future__ import annotations

import io
import os

import cv2
import numpy as np
from PIL import Image

from dataset.discovery import Sample
from utils.errors import UserError

LONGEST_SIDE = 2**15 - 1  # of an image: positions travel as int16
ORIENTATION, UPRIGHT = 0x0112, 1  # the EXIF entry, and its value for a picture that is stored as it is shown
EXIF_REACH = 2**17  # EXIF data stand in the first or last so many bytes of a file
PNG_DEPTH = 24  # position of the byte with the bits per color
JPEG_START, JPEG_SCAN, JPEG_END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
PNG_START, PNG_END = b"\x89PNG", b"IEND"
#: start of a file -> what it holds if there are EXIF data (a TIFF file may always)
EXIF_MARKS = {JPEG_START: b"Exif\0\0", PNG_START: b"eXIf", b"RIFF": b"EXIF", b"": b""}


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


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """(height, width) of what :func:`read_image` gives, from the head of the file if that can be read. A turn that EXIF
    data behind the pixels ask for is not seen."""
    try:
        with Image.open(path) as picture:
            turned = "exif" in picture.info and _exif_orientation(picture) > 4
            return picture.size if turned else picture.size[::-1]
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
        return read_image(path).shape[:2]


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

    An image that its EXIF data turn is turned; a label never is. Raises UserError as :func:`read_image` and
    :func:`read_label`, for sizes that differ, and for an image of which nothing tells whether its label is turned too.
    """
    image = _decode_image(image_data, sample.image)
    if label_data is None:
        return image, None
    label = _decode_label(label_data, sample.label)
    if not sample.upright_label and (orientation := _orientation(image_data)) != UPRIGHT:
        _check_turned(sample, orientation, image.shape[:2], label.shape)
    if label.shape != image.shape[:2]:
        raise UserError(f"{sample.label}: label of {label.shape[0]}x{label.shape[1]} pixels; expected "
                        f"{image.shape[0]}x{image.shape[1]} (height x width), the size of {sample.image}")
    return image, label


def _orientation(data: bytes) -> int:
    """How EXIF data say that a picture is to be shown: 1 as it is stored, 2..4 mirrored or upside down, 5..8 with its
    sides exchanged."""
    mark = next((mark for start, mark in EXIF_MARKS.items() if data.startswith(start)), b"")
    if mark not in data[:EXIF_REACH] and mark not in data[-EXIF_REACH:]:
        return UPRIGHT
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return _exif_orientation(picture)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
        return UPRIGHT  # OpenCV has decoded it, without what cannot be read of its EXIF data


def _exif_orientation(picture: Image.Image) -> int:
    try:
        found = picture.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF data can make the reader raise nearly anything
        found = None
    return found if found in range(2, 9) else UPRIGHT


def _check_turned(sample: Sample, orientation: int, shown: tuple[int, int], label: tuple[int, int]) -> None:
    """UserError unless the size of the label tells that it was made for the picture as it is shown. shown, label:
    (height, width)."""
    told_by_size = orientation > 4 and shown[0] != shown[1]
    if label == shown and not told_by_size or label != shown and label == shown[::-1]:
        raise UserError(f"{sample.image}: its EXIF data turn or mirror this image (orientation {orientation}), and "
                        "nothing tells that its label is turned too; expected an image stored as it is shown, without "
                        "that entry")


def _decode_image(data: bytes, path: str | os.PathLike) -> np.ndarray:
    plain = data.startswith((JPEG_START, PNG_START))  # with 8 bits, or with their number in the head
    flags = cv2.IMREAD_COLOR if plain else cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        image = None
    if image is None:
        raise UserError(f"{path}: cannot decode this image; expected a picture file such as PNG or JPEG")
    if image.dtype != np.uint8 or data.startswith(PNG_START) and data[PNG_DEPTH] > 8:
        raise UserError(f"{path}: more than 8 bits per color; expected 8, which what it holds has to be scaled to (its "
                        "upper 8 bits alone leave a picture of 12 bits nearly black)")
    if max(image.shape) > LONGEST_SIDE:
        raise UserError(f"{path}: {image.shape[0]}x{image.shape[1]} pixels (height x width); expected sides of at most "
                        f"{LONGEST_SIDE}, in parts")
    return image


def _decode_label(data: bytes, path: str | os.PathLike) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as picture:
            mode = picture.mode
            label = np.array(picture, dtype=np.uint8) if mode in ("1", "L", "P") else None
            turned = _exif_orientation(picture) != UPRIGHT
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot decode this label ({reason}); expected a complete index PNG") from None
    if label is None:
        raise UserError(f"{path}: picture mode {mode}; expected one 8-bit index per pixel (a gray or palette picture)")
    if turned:
        raise UserError(f"{path}: EXIF data that turn or mirror this label; expected a label stored as it is shown, "
                        "without them")
    if mode == "L" and data.startswith(PNG_START) and data[PNG_DEPTH] in (2, 4):
        label //= 255 // (2 ** data[PNG_DEPTH] - 1)  # Pillow spreads the values of such a gray picture over 0..255
    return label
