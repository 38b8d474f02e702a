"""From images to logits, or to the class of every pixel: scales, mirror images, sliding windows."""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import UserError

Size = tuple[int, int]
#: logits of one scale at the size the network gives them: [of the image] or [of the image, of its mirror image]
Maps = list[Tensor]

#: logits that may lie in memory at full size, by device; more are made class by class (CPU: what stays in the cache)
AT_ONCE = {"cpu": 2**18, "cuda": 2**28}


def predict(net: nn.Module, image: Tensor, valid: Tensor | None = None, *, size: Size | None = None,
            scales: Sequence[float] = (1.0,), flip: bool = False, window: Size | None = None,
            stride: Size | None = None, amp: torch.dtype | None = None) -> Tensor:
    """Logits of one batch of images at full size.

    image: uint8 [B,3,H,W] BGR; valid: int [B,4] or None, the arguments of ``net.preprocess``. size: (height, width) of
    the answer, default that of the image. scales: the normalized image is resized to floor(side * scale), and the
    logits are averaged over the scales; flip: over the image and its mirror image, too. window: (height, width) of a
    sliding window, in pixels of the resized image, None = the whole image at once; stride: its step, default two thirds
    of it; logits are averaged where windows overlap. amp: half precision of the network, None for none. Returns
    [B,K,*size], float32 or as the weights. All resizing is bilinear, align_corners=True.
    """
    maps = _maps(net, image, valid, scales, flip, window, stride, amp)
    return _average(maps, tuple(size or image.shape[-2:]))


def predict_classes(net: nn.Module, image: Tensor, valid: Tensor | None = None, *, size: Size | None = None,
                    at_once: int | None = None, **options) -> Tensor:
    """Class indices int16 [B,*size], exactly the arg max of the finite logits of `predict`, in less memory and time.

    at_once: logits that may lie in memory together; with more, the classes are resized one after the other and a
    running maximum is kept. Default: `AT_ONCE` of the device. options, others: as of `predict`."""
    maps = _maps(net, image, valid, **{"scales": (1.0,), "flip": False, "window": None, "stride": None, "amp": None,
                                       **options})
    size = tuple(size or image.shape[-2:])
    count, classes = maps[0][0].shape[:2]
    if at_once is None:
        at_once = AT_ONCE.get(image.device.type, AT_ONCE["cuda"])
    if count * classes * size[0] * size[1] <= at_once:
        return _average(maps, size).argmax(1).to(torch.int16)
    best = _average(_of_class(maps, 0), size)
    found = torch.zeros_like(best, dtype=torch.int16)
    for k in range(1, classes):
        logits = _average(_of_class(maps, k), size)
        found.masked_fill_(logits > best, k)
        torch.maximum(best, logits, out=best)
    return found.squeeze(1)


def scaled_size(size: Sequence[int], scale: float) -> Size:
    """(floor(height * scale), floor(width * scale)); `UserError` when a side vanishes."""
    height, width = (math.floor(side * scale) for side in size)
    if min(height, width) < 1:
        raise UserError(f"--scales: {scale:g} leaves nothing of an image of {size[0]}x{size[1]} pixels; "
                        "expected a larger factor")
    return height, width


def check_options(scales: Sequence[float], window: Size | None, stride: Size | None) -> None:
    """`UserError` that names the flag of `eval.py` when scales, window or stride cannot be."""
    if not scales or not all(math.isfinite(s) and s > 0 for s in scales):
        raise UserError(f"--scales: expected at least one factor, all above 0, got {list(scales)}")
    if window is None and stride is not None:
        raise UserError("--stride: expected together with --window, the size of the sliding window")
    if window is None:
        return
    if len(window) != 2 or min(window) < 1:
        raise UserError(f"--window: expected height and width of at least 1, got {list(window)}")
    if stride is not None and (len(stride) != 2 or min(stride) < 1 or any(s > w for s, w in zip(stride, window,
                                                                                                strict=True))):
        raise UserError(f"--stride: expected height and width between 1 and the window {list(window)}, "
                        f"got {list(stride)}")


def _maps(net: nn.Module, image: Tensor, valid: Tensor | None, scales: Sequence[float], flip: bool,
          window: Size | None, stride: Size | None, amp: torch.dtype | None) -> list[Maps]:
    """What the network says of each scale, [B,K,h,w]: before resizing, or windows put together."""
    normalized = net.preprocess(image, valid)
    inputs = (_resize(normalized, scaled_size(normalized.shape[-2:], scale)) for scale in scales)
    return [[_whole_or_slide(net, one, window, stride, amp) for one in ((x, x.flip(-1)) if flip else (x,))]
            for x in inputs]


def _of_class(maps: list[Maps], k: int) -> list[Maps]:
    """The maps [B,1,h,w] of one class."""
    return [[one[:, k:k + 1] for one in scale] for scale in maps]


def _average(maps: list[Maps], size: Size) -> Tensor:
    """Mean of the maps of all scales and mirror images at full size, [B,C,*size]."""
    total = None
    for scale in maps:
        logits = _resize(scale[0], size)
        if len(scale) > 1:
            logits = (logits + _resize(scale[1], size).flip(-1)) / 2
        total = logits if total is None else total + logits
    return total if len(maps) == 1 else total / len(maps)


def _resize(x: Tensor, size: Size | torch.Size) -> Tensor:
    """Bilinear, align_corners=True; [B,C,h,w] -> [B,C,*size]."""
    return x if x.shape[-2:] == tuple(size) else F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)


def _logits(net: nn.Module, x: Tensor, amp: torch.dtype | None) -> Tensor:
    """Logits of a normalized image in float32 or better, with the order of memory in which classes are apart."""
    with torch.autocast(x.device.type, amp, enabled=amp is not None):
        logits = net(x).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32), memory_format=torch.contiguous_format)


def _whole_or_slide(net: nn.Module, x: Tensor, window: Size | None, stride: Size | None,
                    amp: torch.dtype | None) -> Tensor:
    """Logits of a normalized image [B,3,h,w]: [B,K,h/8,w/8] of the whole, or [B,K,h,w] window by window."""
    if window is None or all(w >= side for w, side in zip(window, x.shape[-2:], strict=True)):
        return _logits(net, x, amp)
    return _slide(net, x, window, stride or tuple(max(side * 2 // 3, 1) for side in window), amp)


def _slide(net: nn.Module, x: Tensor, window: Size, stride: Size, amp: torch.dtype | None) -> Tensor:
    """Mean logits [B,K,h,w] of overlapping windows; the last window of a row or column ends at the border."""
    height, width = x.shape[-2:]
    tall, wide = min(window[0], height), min(window[1], width)
    total, count = None, x.new_zeros((height, width))
    for top in _starts(height, tall, stride[0]):
        for left in _starts(width, wide, stride[1]):
            rows, columns = slice(top, top + tall), slice(left, left + wide)
            logits = _resize(_logits(net, x[..., rows, columns], amp), (tall, wide))
            if total is None:
                total = logits.new_zeros((*logits.shape[:2], height, width))
            total[..., rows, columns] += logits
            count[rows, columns] += 1
    return total.div_(count)


def _starts(side: int, window: int, stride: int) -> list[int]:
    """First rows (columns) of the windows that cover a side."""
    last = side - window
    return [*range(0, last, stride), last]
