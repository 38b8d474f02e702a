"""Validation during training: choose the best model, draw panels, report on the test split at the end."""
from __future__ import annotations

import time
from typing import Any

import numpy as np
from torch import nn

from dataset import SegmentationDataset
from engine.evaluate import evaluate
from engine.journal import Journal
from engine.log import LOG, RunLogger
from engine.run import Run
from models.weights import load_weights, save_state_dict
from utils.distributed import Distributed, barrier, broadcast_buffers
from utils.score import absent_classes
from utils.visualize import comparison


class Validator:
    """Evaluates a student on one split; on the main process it also writes records and panels. options: of `evaluate`.
    """

    def __init__(self, dataset: SegmentationDataset, distributed: Distributed, logger: RunLogger | None,
                 panels: int = 0, **options: Any) -> None:
        self.dataset, self.distributed, self.options = dataset, distributed, options
        self.logger, self.panels = logger, panels

    def __call__(self, net: nn.Module, step: int, kind: str = "val") -> dict:
        """Metrics of ``net`` (fractions) over the whole split and all processes; net goes back to its mode."""
        broadcast_buffers(net)
        start = time.perf_counter()
        pictures: list[np.ndarray] = []

        def draw(prediction, item) -> None:
            pictures.append(self._panel(prediction, item))

        result = evaluate(net, self.dataset, device=self.distributed.device, prediction_limit=self.panels,
                          on_prediction=draw if self.logger else None, **self.options)
        LOG.info("%s %s step %d  mIoU %.2f  pixAcc %.2f  mAcc %.2f  (%d images)", kind, self.dataset.split, step,
                 100 * result["mIoU"], 100 * result["pixAcc"], 100 * result["mAcc"], len(self.dataset))
        if note := absent_classes(result, self.dataset.spec.classes):
            LOG.info("%s", note)
        if self.logger is not None:
            self.logger.record(kind, step, split=self.dataset.split, seconds=round(time.perf_counter() - start, 3),
                               **{k: result[k] for k in ("mIoU", "pixAcc", "mAcc", "mIoU_present", "iou_per_class")})
            for i, picture in enumerate(pictures):
                self.logger.picture(f"{kind}/{i}", picture, step)
        return result

    def _panel(self, prediction, item) -> np.ndarray:
        image = np.ascontiguousarray(item["image"].permute(1, 2, 0).numpy()[..., ::-1])
        spec = self.dataset.spec
        return comparison([image], [item["label"]], [[prediction]], ["prediction"], palette=spec.palette,
                          classes=spec.classes)


def validate(run: Run, journal: Journal) -> None:
    """Evaluate the student, which is saved and therefore finite, on the validation split and keep it if it is the best
    so far."""
    validator = Validator(run.val_set, run.distributed, journal.logger, run.settings.running.panels, **_options(run))
    score = validator(run.student, run.step)["mIoU"]
    if score > run.best:
        run.best = score
        if run.distributed.is_main_process:
            run.check_lock()
            save_state_dict(run.student, run.files.best)
    run.validated = run.step
    journal.clock.skip()


def report(run: Run, journal: Journal) -> None:
    """Evaluate the best model on the splits that are reported but not selected on (CamVid: test)."""
    if run.val_set is None:
        return
    if run.best < 0:
        LOG.warning("no validation of this run has left a best model in %s", run.files.directory)
        return
    LOG.info("best %s mIoU %.2f  %s", run.val_set.split, 100 * run.best, run.files.best)
    if not run.report_sets:
        return
    barrier()
    load_weights(run.student, str(run.files.best))
    for split in run.report_sets:
        Validator(split, run.distributed, journal.logger, **_options(run))(run.student, run.step, "report")


def _options(run: Run) -> dict[str, Any]:
    """What the settings of the run say about evaluation."""
    speed = run.settings.speed
    return {"workers": run.settings.data.workers, "fast": speed.fast, "amp": speed.amp_dtype,
            "channels_last": speed.uses_channels_last}
