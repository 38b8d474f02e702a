"""Validation during training: choose the best model, draw panels, report on the test split at the end."""
from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from dataset import SegmentationDataset
from engine.evaluate import evaluate
from engine.journal import Journal
from engine.layout import INDENT, aligned, fold
from engine.log import LOG, RunLogger
from engine.run import Run
from models.weights import load_weights, save_state_dict
from utils.distributed import Distributed, barrier, broadcast_buffers
from utils.module_state import weights_digest
from utils.score import absent_classes
from utils.visualize import comparison

#: most classes of which the terminal shows the IoU too
SHOWN_CLASSES = 24


class Validator:
    """Evaluates a student on one split; on the main process it also writes records and panels. taught: the
    teacher's predictions by image, int64 [H, W], which the panels show too. options: of `evaluate`."""

    def __init__(self, dataset: SegmentationDataset, distributed: Distributed, logger: RunLogger | None,
                 panels: int = 0, taught: Mapping[int, Tensor] | None = None, **options: Any) -> None:
        self.dataset, self.distributed, self.options = dataset, distributed, options
        self.logger, self.panels, self.taught = logger, panels, taught or {}

    def __call__(self, net: nn.Module, step: int, kind: str = "val", best: float | None = None) -> dict:
        """Metrics of ``net`` (fractions) over the whole split and all processes; net goes back to its mode. best: mIoU
        that it has to exceed to be the best model."""
        broadcast_buffers(net)
        start = time.perf_counter()
        pictures: list[np.ndarray] = []

        def draw(prediction, item) -> None:
            pictures.append(self._panel(prediction, item))

        result = evaluate(net, self.dataset, device=self.distributed.device, prediction_limit=self.panels,
                          on_prediction=draw if self.logger else None, **self.options)
        say_scores("validation" if kind == "val" else kind, self.dataset, step, result)
        if self.logger is not None:
            self.logger.record(kind, step, split=self.dataset.split, seconds=round(time.perf_counter() - start, 3),
                               **{k: result[k] for k in ("mIoU", "pixAcc", "mAcc", "mIoU_present", "iou_per_class")},
                               **({} if best is None else {"best": result["mIoU"] > best}))
            for i, picture in enumerate(pictures):
                self.logger.picture(f"{kind}/{i}", picture, step)
        return result

    def _panel(self, prediction, item) -> np.ndarray:
        image = np.ascontiguousarray(item["image"].permute(1, 2, 0).numpy()[..., ::-1])
        spec, taught = self.dataset.spec, self.taught.get(item["index"])
        columns = {"teacher": taught, "student": prediction} if taught is not None else {"prediction": prediction}
        return comparison([image], [item["label"]], [[one] for one in columns.values()], list(columns),
                          palette=spec.palette, classes=spec.classes)


def say_scores(kind: str, dataset: SegmentationDataset, step: int, result: Mapping[str, Any]) -> None:
    """Log the scores, classes without a label that lower the mean, and every class: those of many in the file only."""
    percent = [f"{name} {100 * result[name]:.2f}" for name in ("mIoU", "pixAcc", "mAcc")]
    lines = [fold([f"{kind} on {dataset.split}, step {step}:", *percent, f"({len(dataset)} images)"])]
    classes = list(zip(dataset.spec.classes, result["iou_per_class"], result["label_pixels"], strict=True))
    if note := absent_classes(result, dataset.spec.classes):
        lines.append(INDENT + fold([*note.split(" "), f"(mIoU of the others {100 * result['mIoU_present']:.2f})"],
                                   between=" "))
    width = max(map(len, dataset.spec.classes))
    table = aligned([f"{name:{width}} {100 * iou:5.1f}" if pixels else f"{name:{width}}     -"
                     for name, iou, pixels in classes])
    LOG.info("%s", "\n".join([*lines, *([table] if len(classes) <= SHOWN_CLASSES else [])]))
    if len(classes) > SHOWN_CLASSES:
        LOG.debug("IoU of each class\n%s", table)


def validate(run: Run, journal: Journal) -> None:
    """Evaluate the student, which is saved and therefore finite, on the validation split and keep it if it is the best
    so far."""
    validator = Validator(run.val_set, run.distributed, journal.logger, run.settings.running.panels,
                          run.teacher_predictions, **_options(run))
    score = validator(run.student, run.step, best=run.best)["mIoU"]
    if score > run.best:
        run.best = score
        if run.distributed.is_main_process:
            run.check_lock()
            run.best_weights = weights_digest(run.student.state_dict())
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
