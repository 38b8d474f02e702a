"""Validation during training: choose the best model, draw panels, report on the test split at the end."""
from __future__ import annotations

import numpy as np
from torch import nn

from dataset import SegmentationDataset
from utils.distributed import Distributed, broadcast_buffers
from utils.evaluate import evaluate
from utils.logger import LOG, RunLogger
from utils.visualize import comparison


class Validator:
    """Evaluates a student on one split; on the main process it also writes records and panels."""

    def __init__(self, dataset: SegmentationDataset, distributed: Distributed, workers: int,
                 logger: RunLogger | None, panels: int = 0) -> None:
        self.dataset, self.distributed, self.workers = dataset, distributed, workers
        self.logger, self.panels = logger, panels

    def __call__(self, net: nn.Module, step: int, kind: str = "val") -> dict:
        """Metrics of ``net`` (fractions) over the whole split and all processes; net goes back to its mode."""
        broadcast_buffers(net)
        pictures: list[np.ndarray] = []

        def draw(prediction, item) -> None:
            pictures.append(self._panel(prediction, item))

        result = evaluate(net, self.dataset, device=self.distributed.device, workers=self.workers,
                          on_prediction=draw if self.logger else None, prediction_limit=self.panels)
        LOG.info("%s %s step %d  mIoU %.2f  pixAcc %.2f  mAcc %.2f  (%d images)", kind, self.dataset.split, step,
                 100 * result["mIoU"], 100 * result["pixAcc"], 100 * result["mAcc"], len(self.dataset))
        if self.logger is not None:
            self.logger.record(kind, step, split=self.dataset.split,
                               **{k: result[k] for k in ("mIoU", "pixAcc", "mAcc", "mIoU_present")})
            for i, picture in enumerate(pictures):
                self.logger.picture(f"{kind}/{i}", picture, step)
        return result

    def _panel(self, prediction, item) -> np.ndarray:
        image = np.ascontiguousarray(item["image"].permute(1, 2, 0).numpy()[..., ::-1])
        spec = self.dataset.spec
        return comparison([image], [item["label"]], [[prediction]], ["prediction"], palette=spec.palette,
                          classes=spec.classes)
