"""Evaluation of a network on a data set: every image once, whole, counted exactly under any number of processes."""
from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataset import EvalSampler, collate, worker_init
from utils.distributed import available_cpus, rank_and_world
from utils.errors import UserError
from utils.score import SegmentationMetric

Size = tuple[int, int]


@torch.no_grad()
def evaluate(net: nn.Module, dataset: Dataset, *, device: torch.device, metric: SegmentationMetric | None = None,
             scales: Sequence[float] = (1.0,), flip: bool = False, window: Size | None = None,
             stride: Size | None = None, workers: int = 0,
             on_prediction: Callable[[Tensor, dict[str, Any]], None] | None = None, prediction_limit: int | None = None,
             progress: bool | None = None) -> dict[str, Any]:
    """Evaluate ``net`` (on ``device``, not wrapped in DDP) on every item of ``dataset``.

    In a process group each process takes its share of the images, none is repeated, and the integer counts are added
    up, so the result does not depend on the number of processes. The network is put into eval mode and back.

    metric: counts on top of a reset; default: a new one for the classes of the network. scales, flip, window, stride:
    see `predict`. workers: loading processes, at most one per CPU of this process. on_prediction: called on the process
    that predicted, with int64 [H,W] class indices on the CPU and the item; prediction_limit: only for the first so many
    of each process. progress: a bar on stderr; default: on the first process, when stderr is a terminal.
    Returns the dict of `SegmentationMetric.result` and "images", the number of images.
    """
    check_options(scales, window, stride)
    if metric is None:
        metric = SegmentationMetric(net.num_class, ignore_label=getattr(dataset, "ignore_label", -1))
    metric.reset()
    metric.to(device)
    was_training = net.training
    net.eval()
    try:
        for done, item in enumerate(_items(dataset, device, workers, progress)):
            label = item["label"].to(device, non_blocking=True).unsqueeze(0)
            logits = predict(net, item["image"].to(device, non_blocking=True).unsqueeze(0),
                             item["valid"].to(device, non_blocking=True).unsqueeze(0), size=label.shape[-2:],
                             scales=scales, flip=flip, window=window, stride=stride)
            metric.update(logits, label)
            if on_prediction is not None and (prediction_limit is None or done < prediction_limit):
                on_prediction(logits.argmax(1)[0].cpu(), item)
    finally:
        net.train(was_training)
    metric.all_reduce()
    return {**metric.result(), "images": len(dataset)}


def predict(net: nn.Module, image: Tensor, valid: Tensor | None = None, *, size: Size | None = None,
            scales: Sequence[float] = (1.0,), flip: bool = False, window: Size | None = None,
            stride: Size | None = None) -> Tensor:
    """Logits of one batch of images at full size.

    image: uint8 [B,3,H,W] BGR; valid: int [B,4] or None, the arguments of ``net.preprocess``. size: (height, width) of
    the answer, default that of the image. scales: the normalized image is resized to floor(side * scale), and the
    logits are averaged over the scales; flip: over the image and its mirror image, too. window: (height, width) of a
    sliding window, in pixels of the resized image, None = the whole image at once; stride: its step, default two thirds
    of it; logits are averaged where windows overlap. Returns [B,K,*size]. All resizing is bilinear, align_corners=True.
    """
    normalized = net.preprocess(image, valid)
    size = tuple(size or image.shape[-2:])
    total = None
    for scale in scales:
        x = _resize(normalized, scaled_size(normalized.shape[-2:], scale))
        logits = _forward(net, x, size, window, stride)
        if flip:
            logits = (logits + _forward(net, x.flip(-1), size, window, stride).flip(-1)) / 2
        total = logits if total is None else total + logits
    return total / len(scales)


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


def _items(dataset: Dataset, device: torch.device, workers: int, progress: bool | None) -> Iterator[dict[str, Any]]:
    """The items of this process, one by one, with a progress bar."""
    rank, world = rank_and_world()
    loader = DataLoader(dataset, batch_size=1, sampler=EvalSampler(len(dataset), rank, world), collate_fn=collate,
                        num_workers=min(workers, available_cpus()), worker_init_fn=worker_init,
                        pin_memory=device.type == "cuda",
                        generator=torch.Generator())  # else the loader draws from the global stream of a training run
    show = rank == 0 and sys.stderr.isatty() if progress is None else progress
    for batch in tqdm(loader, desc="evaluate", unit="img", disable=not show, leave=False):
        yield {key: values[0] if key != "index" else int(values[0]) for key, values in batch.items()}


def _resize(x: Tensor, size: Size | torch.Size) -> Tensor:
    """Bilinear, align_corners=True; [B,C,h,w] -> [B,C,*size]."""
    return x if x.shape[-2:] == tuple(size) else F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)


def _forward(net: nn.Module, x: Tensor, size: Size, window: Size | None, stride: Size | None) -> Tensor:
    """Logits [B,K,*size] of a normalized image [B,3,h,w], whole or window by window."""
    if window is None or all(w >= side for w, side in zip(window, x.shape[-2:], strict=True)):
        return _resize(net(x).logits, size)
    return _resize(_slide(net, x, window, stride or tuple(max(side * 2 // 3, 1) for side in window)), size)


def _slide(net: nn.Module, x: Tensor, window: Size, stride: Size) -> Tensor:
    """Mean logits [B,K,h,w] of overlapping windows; the last window of a row or column ends at the border."""
    height, width = x.shape[-2:]
    tall, wide = min(window[0], height), min(window[1], width)
    total, count = None, x.new_zeros((height, width))
    for top in _starts(height, tall, stride[0]):
        for left in _starts(width, wide, stride[1]):
            rows, columns = slice(top, top + tall), slice(left, left + wide)
            logits = _resize(net(x[..., rows, columns]).logits, (tall, wide))
            if total is None:
                total = logits.new_zeros((*logits.shape[:2], height, width))
            total[..., rows, columns] += logits
            count[rows, columns] += 1
    return total / count


def _starts(side: int, window: int, stride: int) -> list[int]:
    """First rows (columns) of the windows that cover a side."""
    last = side - window
    return [*range(0, last, stride), last]
