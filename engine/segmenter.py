"""From pictures to classes in three lines.

    from engine.segmenter import Segmenter
    segmenter = Segmenter.from_pretrained("work_dir/student")
    index = segmenter("street.png")                     # [H, W], and segmenter.classes[index[0, 0]] is a name
"""
from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import groupby, islice

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from dataset.io import read_image
from dataset.palette import bit_palette
from engine.evaluate import prepare_for_inference
from engine.predict import predict, predict_classes
from engine.trained import Known, open_trained
from models.prepare import HALF_PRECISIONS, check_precision
from utils.errors import UserError

#: a path, a PIL picture, or uint8 [H, W, 3] RGB
Picture = str | os.PathLike | Image.Image | np.ndarray


class Segmenter:
    """A network that takes pictures of any size and tells the class of every pixel, as ``eval.py`` would.

    net: of ``models``; a prepared copy of it is kept. classes, palette: names, and RGB colors uint8 [K, 3], in the
    order of the logits; generated when none are given. device: "cpu", "cuda", "cuda:1", ...; default the GPU if there
    is one. amp: half precision of the network, "bf16" or "fp16". Raises UserError for a device that is not there.

    Attributes: ``classes``, ``palette``, ``num_class``, ``device``, ``net``."""

    def __init__(self, net: nn.Module, *, classes: Sequence[str] | None = None, palette: np.ndarray | None = None,
                 device: str | torch.device | None = None, amp: str = "off") -> None:
        self.device, self.num_class = find_device(device), net.num_class
        if amp not in ("off", *HALF_PRECISIONS):
            raise UserError(f"amp {amp!r}: expected one of off, {', '.join(HALF_PRECISIONS)}", settings=["amp"])
        self.amp = HALF_PRECISIONS.get(amp)
        check_precision([self.amp], self.device)
        self.classes = tuple(classes or (f"class {i}" for i in range(net.num_class)))
        self.palette = bit_palette(net.num_class, first=1) if palette is None else np.asarray(palette, np.uint8)
        if not len(self.classes) == len(self.palette) == net.num_class:
            raise UserError(f"{net.name}: {len(self.classes)} class names and {len(self.palette)} colors for "
                            f"{net.num_class} classes")
        self.net = prepare_for_inference(net.to(self.device), dtype=self.amp)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, *, device: str | torch.device | None = None, amp: str = "off",
                        known: Known | None = None) -> Segmenter:
        """The segmenter of a run's folder, a weights file, a folder of ``tools/export.py``, or OWNER/NAME on the
        Hugging Face hub.

        known: what the files do not say, such as ``Known(model="psp", backbone="resnet18", dataset="citys")``. Raises
        UserError, see ``engine.trained.open_trained``."""
        trained = open_trained(source, known)
        return cls(trained.net, classes=trained.class_names, palette=trained.colors, device=device, amp=amp)

    def __call__(self, images: Picture | Sequence[Picture], batch_size: int = 1) -> np.ndarray | list[np.ndarray]:
        """Class indices [H, W] of a picture (uint8; int16 with more than 256 classes), or the list of those of a list.

        batch_size: so many consecutive pictures of one size go through the network together. Raises UserError for what
        is no picture, naming the file."""
        kind = np.uint8 if self.num_class <= 256 else np.int16
        return self._answer(images, batch_size, lambda x: predict_classes(self.net, x, amp=self.amp), kind)

    def probabilities(self, images: Picture | Sequence[Picture],
                      batch_size: int = 1) -> np.ndarray | list[np.ndarray]:
        """float32 [K, H, W] of a picture, which adds up to 1 over the classes, or the list of those of a list."""
        return self._answer(images, batch_size, lambda x: predict(self.net, x, amp=self.amp).softmax(1), np.float32)

    @torch.no_grad()
    def _answer(self, images: Picture | Sequence[Picture], batch_size: int, ask: Callable[[Tensor], Tensor],
                kind: type) -> np.ndarray | list[np.ndarray]:
        alone = not isinstance(images, (list, tuple))
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: expected at least 1", settings=["batch_size"])
        answers: list[np.ndarray] = []
        # one after the other, so that no more than a batch is in memory
        for _, same in groupby(map(to_bgr, [images] if alone else images), key=lambda image: image.shape):
            while batch := list(islice(same, batch_size)):
                x = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).to(self.device)
                answers += list(ask(x.contiguous()).cpu().numpy().astype(kind, copy=False))
        return answers[0] if alone else answers


def to_bgr(picture: Picture) -> np.ndarray:
    """uint8 [H, W, 3] BGR of a path, a PIL picture, or an RGB array. UserError for anything else."""
    if isinstance(picture, (str, os.PathLike)):
        return read_image(picture)
    if isinstance(picture, Image.Image):
        picture = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 \
            or 0 in picture.shape:
        what = f"{picture.dtype} {list(picture.shape)}" if isinstance(picture, np.ndarray) else type(picture).__name__
        raise UserError(f"expected a path, a PIL picture, or an RGB array uint8 [H, W, 3], got {what}")
    return np.ascontiguousarray(picture[..., ::-1])


def find_device(name: str | torch.device | None) -> torch.device:
    """The device of that name; default the GPU if there is one. UserError when torch cannot use it."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"device {str(name)!r} cannot be used ({reason}); expected cpu, cuda, cuda:1, ...",
                        settings=["device"]) from error
    return device
