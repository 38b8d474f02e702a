"""Evaluation of a network on a data set: every image once, whole, counted exactly under any number of processes."""
from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataset import EvalSampler, collate, worker_init
from engine.predict import Size, check_options, predict, predict_classes
from models.prepare import fold_batch_norms, to_channels_last
from utils.distributed import available_cpus, rank_and_world
from utils.score import SegmentationMetric
from utils.watchdog import in_time, no_prediction, no_step, time_limit


@torch.no_grad()
def evaluate(net: nn.Module, dataset: Dataset, *, device: torch.device, metric: SegmentationMetric | None = None,
             scales: Sequence[float] = (1.0,), flip: bool = False, window: Size | None = None,
             stride: Size | None = None, workers: int = 0, batch_size: int = 1, fast: bool = True,
             amp: torch.dtype | None = None, channels_last: bool | None = None,
             on_prediction: Callable[[Tensor, dict[str, Any]], None] | None = None, prediction_limit: int | None = None,
             progress: bool | None = None) -> dict[str, Any]:
    """Evaluate ``net`` (on ``device``, not wrapped in DDP) on every item of ``dataset``.

    In a process group each process takes its share of the batches, none is repeated, and the integer counts are added
    up, so the result does not depend on the number of processes. The network is put into eval mode and back.

    metric: counts on top of a reset; default: a new one for the classes of the network. scales, flip, window, stride,
    amp: see `predict`. workers: loading processes, at most one per CPU of this process. batch_size: so many consecutive
    images go through the network together, those of different sizes one size after the other. fast: ask a copy of the
    network that was prepared for it, and make no logits at full size unless the metric wants them; the same up to
    rounding. channels_last: order of the copy's weights in memory, default on. on_prediction: called on the process
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
    asked = prepare_for_inference(net, dtype=amp, channels_last=channels_last is not False) if fast else net
    ask = predict_classes if fast and not metric.reference_pixacc else predict
    done = 0
    try:
        for batch in _batches(dataset, device, workers, batch_size, progress):
            with time_limit(no_prediction):
                image, valid, label = (batch[key].to(device, non_blocking=True) for key in ("image", "valid", "label"))
                answer = ask(asked, image, valid, size=label.shape[-2:], scales=scales, flip=flip, window=window,
                             stride=stride, amp=amp)
                metric.update(answer, label)
            if on_prediction is not None:
                wanted = None if prediction_limit is None else max(prediction_limit - done, 0)
                for one, item in zip(answer[:wanted], _items(batch), strict=False):
                    on_prediction((one if one.ndim == 2 else one.argmax(0)).cpu().long(), item)
            done += len(label)
    finally:
        net.train(was_training)
    with time_limit(no_step):
        metric.all_reduce()
        return {**metric.result(), "images": len(dataset)}


def prepare_for_inference(net: nn.Module, *, dtype: torch.dtype | None = None, channels_last: bool = True) -> nn.Module:
    """A frozen copy of a network in eval mode, for `predict`: without auxiliary head, batch norms folded into the
    convolutions before them. dtype: of the convolutions' weights, to be asked under autocast of the same. Of a network
    of another library: a copy as it is."""
    weights = {id(p): nn.Parameter(p.detach().clone(), requires_grad=False) for p in net.parameters()}
    net = copy.deepcopy(net, weights).eval()  # without the gradients, which a copy of a parameter takes along
    if not getattr(net, "own", True):
        return to_channels_last(net) if channels_last else net
    if getattr(net, "aux", False):
        net.aux = False
        del net.auxlayer
    fold_batch_norms(net)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.to(dtype)
    return to_channels_last(net) if channels_last else net


def _batches(dataset: Dataset, device: torch.device, workers: int, size: int,
             progress: bool | None) -> Iterator[dict[str, Any]]:
    """The collated batches of this process, with a progress bar. Which images share one depends on the data and the
    batch size alone."""
    rank, world = rank_and_world()
    chunks = [range(first, min(first + size, len(dataset))) for first in range(0, len(dataset), size)]
    mine = [chunks[i] for i in EvalSampler(len(chunks), rank, world)]
    loader = DataLoader(dataset, batch_sampler=mine, collate_fn=_by_size, num_workers=min(workers, available_cpus()),
                        worker_init_fn=worker_init, pin_memory=device.type == "cuda",
                        generator=torch.Generator())  # else the loader draws from the global stream of a training run
    show = rank == 0 and sys.stderr.isatty() if progress is None else progress
    with tqdm(total=sum(map(len, mine)), desc="evaluate", unit="img", disable=not show, leave=False) as bar:
        for chunk in in_time(loader):
            for batch in chunk:
                yield batch
                bar.update(len(batch["name"]))


def _by_size(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Consecutive items of one size as a batch each."""
    return [collate(list(same)) for _, same in groupby(items, key=lambda item: item["label"].shape)]


def _items(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The items of a batch, one by one."""
    for values in zip(*batch.values(), strict=True):
        item = dict(zip(batch, values, strict=True))
        yield {**item, "index": int(item["index"])}
