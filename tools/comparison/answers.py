"""What networks say of every image of a split: counted over all of it, and kept image by image."""
from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dataset import SegmentationDataset
from engine.evaluate import evaluate
from utils.score import SegmentationMetric

#: values of an error map
BOTH_RIGHT, ONLY_DISTILLED, ONLY_PLAIN, BOTH_WRONG, IGNORED = range(5)


class Score(NamedTuple):
    """Figures of one image, as fractions. miou: over the classes that occur in its labels."""

    miou: float
    accuracy: float


class Answers:
    """A network's answers on a whole split.

    result: of `evaluate`. confusion: int64 [K,K], rows are labels. scores: of every image. parameters: of the network.
    """

    def __init__(self, net: nn.Module, dataset: SegmentationDataset, device: torch.device, workers: int = 0) -> None:
        self.name, self.parameters = net.name, sum(p.numel() for p in net.parameters())
        self._classes, self._ignore = dataset.spec.num_class, dataset.ignore_label
        self._maps: list[bytes | None] = [None] * len(dataset)
        self._shapes: list[tuple[int, int]] = [(0, 0)] * len(dataset)
        self.scores: list[Score] = [Score(0.0, 0.0)] * len(dataset)
        metric = SegmentationMetric(self._classes, ignore_label=self._ignore)
        self.result = evaluate(net, dataset, device=device, metric=metric, workers=workers, on_prediction=self._keep)
        self.confusion = metric.confusion()

    def _keep(self, prediction: Tensor, item: dict[str, Any]) -> None:
        index = item["index"]
        metric = SegmentationMetric(self._classes, ignore_label=self._ignore)
        metric.update(prediction, item["label"])
        result = metric.result()
        self.scores[index] = Score(result["mIoU_present"], result["pixAcc"])
        # a map of a megapixel takes some kilobytes: those of a whole split fit into memory
        self._maps[index] = zlib.compress(prediction.to(torch.uint8).numpy().tobytes(), 1)
        self._shapes[index] = tuple(prediction.shape)

    def prediction(self, index: int) -> np.ndarray:
        """uint8 [H,W]: the class of every pixel of an image."""
        return np.frombuffer(zlib.decompress(self._maps[index]), np.uint8).reshape(self._shapes[index])


def by_change(plain: Sequence[Score], distilled: Sequence[Score]) -> list[int]:
    """Indices of all images, those first whose mIoU distillation changes most, for better or worse.

    Equal ones go by the change of their accuracy, then by their place."""

    def change(index: int) -> tuple[float, float, int]:
        before, after = plain[index], distilled[index]
        return -abs(after.miou - before.miou), -abs(after.accuracy - before.accuracy), index

    return sorted(range(len(plain)), key=change)


def error_map(label: np.ndarray, plain: np.ndarray, distilled: np.ndarray) -> np.ndarray:
    """uint8 [H,W] of `BOTH_RIGHT` ... `IGNORED`. label: class indices [H,W], below 0 where a pixel does not count."""
    right_before, right_after = plain == label, distilled == label
    kind = np.where(right_after, np.where(right_before, BOTH_RIGHT, ONLY_DISTILLED),
                    np.where(right_before, ONLY_PLAIN, BOTH_WRONG))
    return np.where(label < 0, IGNORED, kind).astype(np.uint8)


def row_shares(confusion: Tensor) -> list[list[float | None]]:
    """[K][K]: which share of the pixels of a class was given each class; None for a class without pixels."""
    shares = []
    for row in confusion.double():
        total = float(row.sum())
        shares.append([float(value) / total if total else None for value in row])
    return shares
