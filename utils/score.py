"""Segmentation metric: exact integer counts on the device that holds the predictions."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from utils.distributed import is_distributed
from utils.errors import UserError

#: the reference divides by ``count + _EPS``: an empty class or an empty data set scores 0
_EPS = 2.220446049250313e-16


def count_cells(cell: Tensor, cells: int, spread: int | None = None) -> Tensor:
    """int64 [cells]: how often each of 0..cells-1 occurs in ``cell``, int64 [N] with no other value.

    Equals ``torch.bincount(cell, minlength=cells)``, which reads the largest value on the host to know how long its
    result is, whatever ``minlength`` says: on a GPU, that waits for all work in the queue. This waits for nothing.
    spread: counters per cell, default 64 on a GPU, where neighboring pixels, mostly of one cell, would wait for each
    other's additions to a single one."""
    spread = spread or (1 if cell.device.type == "cpu" else 64)
    if spread > 1:
        cell = cell + torch.arange(len(cell), device=cell.device).remainder_(spread).mul_(cells)
    counts = torch.zeros(spread * cells, dtype=torch.int64, device=cell.device)
    return counts.scatter_add_(0, cell, torch.ones_like(cell)).view(spread, cells).sum(0)


def _whole_numbers(x: Tensor) -> Tensor:
    """Integers of at least 32 bits; int32, where that holds the type, is half the memory of int64."""
    return x.to(torch.int32 if x.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32) else torch.int64)


def absent_classes(result: Mapping[str, Any], classes: Sequence[str], most: int = 8) -> str | None:
    """One line that names the classes that labels never show, which count 0 in mIoU, and the only one that they show,
    if it is one; None when all occur.

    result: of `SegmentationMetric.result`. most: so many names, then their number."""
    absent = [name for name, pixels in zip(classes, result["label_pixels"], strict=True) if not pixels]
    if not absent:
        return None
    more = f" and {len(absent) - most} more" if len(absent) > most else ""
    noun = "class that does" if len(absent) == 1 else "classes that do"
    present = [name for name in classes if name not in absent]
    alone = f"; every labeled pixel is {present[0]}" if len(present) == 1 else ""
    return f"mIoU counts {len(absent)} {noun} not occur: {', '.join(absent[:most])}{more}{alone}"


class SegmentationMetric:
    """Pixel accuracy and intersection over union from a confusion matrix of int64 counts.

    Labels below 0, and ``ignore_label``, are ignored. A label of ``num_class`` or more is an error that the next
    `get`, `result` or `all_reduce` raises (the reference counts such pixels as labelled, in no class).

    num_class: number of classes K. reference_pixacc: also count what the reference prints as pixel accuracy, the arg
    max of the logits truncated towards 0, which ties small logits. ignore_label: one more value to ignore, for data
    sets that mark ignored pixels with 255. device: where the counts start (they move to that of the first update)."""

    def __init__(self, num_class: int, reference_pixacc: bool = False, *, ignore_label: int = -1,
                 device: torch.device | str = "cpu") -> None:
        self.num_class = num_class
        self.reference_pixacc = reference_pixacc
        self.ignore_label = ignore_label
        self._device = torch.device(device)
        self.reset()

    def reset(self) -> None:
        """Forget every count."""
        k = self.num_class
        # rows: labels, columns: predictions; the last row and column collect values outside 0..K-1
        self._counts = torch.zeros((k + 1, k + 1), dtype=torch.int64, device=self._device)
        self._correct_reference = torch.zeros((), dtype=torch.int64, device=self._device)
        self._highest = torch.full((), -1, dtype=torch.int64, device=self._device)
        self._reduced = False

    def to(self, device: torch.device | str) -> SegmentationMetric:
        """Move the counts; returns self."""
        self._device = torch.device(device)
        for name in ("_counts", "_correct_reference", "_highest"):
            setattr(self, name, getattr(self, name).to(self._device))
        return self

    def update(self, pred_or_logits: Tensor | Sequence[Tensor], label: Tensor | Sequence[Tensor]) -> None:
        """Count one batch, or a list of batches with the list of their labels.

        pred_or_logits: logits [B,K,H,W] (or [K,H,W]), or class indices shaped like the label. label: [B,H,W] (or
        [H,W]), any integer or float dtype holding whole numbers."""
        if isinstance(pred_or_logits, (list, tuple)):
            for one, its_label in zip(pred_or_logits, label, strict=True):
                self.update(one, its_label)
            return
        if self._reduced:
            raise RuntimeError("the counts already hold every process's: reset() before the next update()")
        pred, logits = self._prediction(pred_or_logits, label)
        if self._device != pred.device:
            self.to(pred.device)
        self._count(pred, logits, _whole_numbers(label.to(self._device)))

    def _prediction(self, given: Tensor, label: Tensor) -> tuple[Tensor, Tensor | None]:
        """(class indices shaped like the label, logits or None)."""
        classes = label.ndim - 2
        is_logits = given.ndim == label.ndim + 1
        sizes = given.shape[:classes] + given.shape[classes + is_logits:]
        if sizes != label.shape or (is_logits and given.shape[classes] != self.num_class):
            raise UserError(f"metric: prediction of shape {tuple(given.shape)} does not fit a label of shape "
                            f"{tuple(label.shape)} and {self.num_class} classes")
        return (given.argmax(classes), given) if is_logits else (_whole_numbers(given), None)

    def _count(self, pred: Tensor, logits: Tensor | None, label: Tensor) -> None:
        k = self.num_class
        label = label.where((label >= 0) & (label != self.ignore_label), -1)  # every ignored value is -1 now
        row = label.clamp(max=k)
        column = pred if logits is not None else pred.where((pred >= 0) & (pred < k), k)
        # ignored pixels go to one cell after the matrix: no boolean indexing, hence no host synchronization
        cell = torch.add(column, row, alpha=k + 1).where(row >= 0, (k + 1) ** 2)
        counts = count_cells(cell.flatten().long(), (k + 1) ** 2 + 1)
        self._counts += counts[:-1].view(k + 1, k + 1)
        if label.numel():
            self._highest = torch.maximum(self._highest, label.max())
        if self.reference_pixacc:
            if logits is None:
                raise RuntimeError("reference_pixacc needs logits, not class indices")
            truncated = logits.trunc().argmax(label.ndim - 2)
            self._correct_reference += ((truncated == label) & (label >= 0)).sum()

    def all_reduce(self) -> None:
        """Add up the counts of every process of the default process group, once; alone it does nothing."""
        self._check()
        if self._reduced or not is_distributed():
            return
        flat = torch.cat([self._counts.flatten(), self._correct_reference.view(1)])
        torch.distributed.all_reduce(flat)
        self._counts = flat[:-1].view_as(self._counts).clone()
        self._correct_reference = flat[-1].clone()
        self._reduced = True

    def _check(self) -> None:
        if bool(self._counts[-1].any()):
            also = f", or {self.ignore_label}" if self.ignore_label >= 0 else ""
            raise UserError(f"metric: a label holds class {int(self._highest)}, expected 0..{self.num_class - 1} "
                            f"or an ignored value (below 0{also})")
        if bool(self._counts[:, -1].any()):
            raise UserError(f"metric: a prediction holds a class outside 0..{self.num_class - 1}")

    def confusion(self) -> Tensor:
        """int64 [K,K] on the CPU: entry [i, j] is the number of pixels labelled i and predicted j."""
        self._check()
        return self._counts[:-1, :-1].cpu()

    def get(self) -> tuple[float, float]:
        """(pixAcc, mIoU) as fractions."""
        result = self.result()
        return result["pixAcc"], result["mIoU"]

    def result(self) -> dict[str, float | int | list]:
        """Every figure, as fractions; all are 0 when no pixel is labeled.

        pixAcc: correct / labeled pixels. mIoU: mean IoU over all K classes, where one in neither labels nor
        predictions counts 0, as in the published tables; mIoU_present: over the classes that occur in the labels. mAcc:
        mean accuracy (recall) over those. iou_per_class, acc_per_class, total_inter, total_union, label_pixels: lists
        of K. labelled_pixels: int. pixAcc_reference: the reference's figure, with ``reference_pixacc``."""
        matrix = self.confusion()
        inter, labels = matrix.diagonal(), matrix.sum(1)
        union = labels + matrix.sum(0) - inter
        present = labels > 0
        labelled = int(labels.sum())
        iou = inter.double() / (union.double() + _EPS)
        accuracy = inter.double() / (labels.double() + _EPS)
        result = {
            "pixAcc": int(inter.sum()) / max(labelled, 1),
            "mIoU": float(iou.mean()),
            "mIoU_present": float(iou[present].mean()) if labelled else 0.0,
            "mAcc": float(accuracy[present].mean()) if labelled else 0.0,
            "iou_per_class": iou.tolist(),
            "acc_per_class": accuracy.tolist(),
            "labelled_pixels": labelled,
            "label_pixels": labels.tolist(),
            "total_inter": inter.tolist(),
            "total_union": union.tolist(),
        }
        if self.reference_pixacc:
            result["pixAcc_reference"] = int(self._correct_reference) / max(labelled, 1)
        return result


def table(result: Mapping[str, Any], classes: Sequence[str]) -> str:
    """The figures of `SegmentationMetric.result` in percent, as text: a line per class, then the means."""
    width = max(24, *(len(name) for name in classes))
    lines = [f"{'class':{width}s} {'IoU %':>8s} {'acc %':>8s} {'pixels %':>9s}"]
    total = max(result["labelled_pixels"], 1)
    for name, iou, accuracy, pixels in zip(classes, result["iou_per_class"], result["acc_per_class"],
                                           result["label_pixels"], strict=True):
        shown = f"{100 * accuracy:8.2f}" if pixels else f"{'-':>8s}"  # no pixel of it: no accuracy
        lines.append(f"{name:{width}s} {100 * iou:8.2f} {shown} {100 * pixels / total:9.2f}")
    lines.append("-" * len(lines[0]))
    present = sum(pixels > 0 for pixels in result["label_pixels"])
    rows = [(f"mIoU, all {len(classes)} classes", "mIoU"), (f"mIoU, {present} present classes", "mIoU_present"),
            ("pixAcc", "pixAcc"), ("pixAcc of the reference", "pixAcc_reference"), ("mAcc", "mAcc")]
    lines += [f"{text:{width}s} {100 * result[key]:8.2f}" for text, key in rows if key in result]
    note = absent_classes(result, classes)
    return "\n".join(lines if note is None else [*lines, note])
