"""The segmentation metric against the recorded figures of the reference, and against torchmetrics."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reference import fill
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from models.torchvision_compat import import_torchvision
from utils.errors import UserError
from utils.score import SegmentationMetric, absent_classes, count_cells, table

CASES = json.loads((Path(__file__).parents[1] / "reference" / "metric.json").read_text())["cases"]


def batch(spec: dict, i: int) -> tuple[Tensor, Tensor]:
    """(logits [B,K,H,W], label [B,H,W]) of update i, by the recipe under "inputs"."""
    b, h, w = spec["updates"][i]
    k, seed = spec["num_class"], spec["seed"]
    label = fill.labels(f"metric_labels{i}", (b, h, w), spec.get("label_classes", k), seed,
                        ignore_frac=spec.get("ignore_frac", 0.15))
    logits = fill.tensor(f"metric_logits{i}", (b, k, h, w), seed, spec.get("scale", 1.0))
    hit = fill.uniform(f"metric_hit{i}", (b, h, w), seed) < spec.get("hit", 0.6)
    boost = torch.zeros_like(logits).scatter_(1, label.clamp(min=0)[:, None], hit[:, None] * spec.get("boost", 3.0))
    return logits + boost, label.to(getattr(torch, spec.get("label_dtype", "int64")))


def check(result: dict, expect: dict, extra: dict) -> None:
    assert result["total_inter"] == expect["total_inter"]
    assert result["total_union"] == expect["total_union"]
    assert result["pixAcc"] == pytest.approx(expect["pixAcc"], abs=1e-6)
    assert result["mIoU"] == pytest.approx(expect["mIoU"], abs=1e-6)
    assert result["pixAcc_reference"] == pytest.approx(expect["pixAcc_reference"], abs=1e-6)
    assert result["labelled_pixels"] == extra["labelled_pixels"]
    assert result["iou_per_class"] == pytest.approx(extra["iou_per_class"], abs=1e-6)
    assert result["mIoU_present"] == pytest.approx(extra["mIoU_over_classes_in_labels"], abs=1e-6)
    assert sum(n > 0 for n in result["label_pixels"]) == extra["classes_in_labels"]


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_golden(case: dict) -> None:
    spec, expect = case["spec"], case["expect"]
    metric = SegmentationMetric(spec["num_class"], reference_pixacc=True)
    batches = [batch(spec, i) for i in range(len(spec["updates"]))]
    for logits, label in batches:
        if spec.get("as_list"):
            metric.update(list(logits.split(1)), list(label.split(1)))
        else:
            metric.update(logits, label)
    check(metric.result(), expect, case["extra"])
    assert metric.get() == (metric.result()["pixAcc"], metric.result()["mIoU"])
    metric.reset()
    metric.update(*batches[0])
    if spec.get("reset"):
        assert metric.get()[1] == pytest.approx(expect["mIoU_after_reset"], abs=1e-6)
    assert metric.result()["labelled_pixels"] == int((batches[0][1] >= 0).sum())


def test_agrees_with_torchmetrics() -> None:
    import_torchvision()  # torchmetrics imports it, and the registry's build does not import beside a CPU-only torch
    classification = pytest.importorskip("torchmetrics.classification")
    metric = SegmentationMetric(7)
    theirs = [classification.MulticlassConfusionMatrix(7, ignore_index=-1),
              classification.MulticlassJaccardIndex(7, average=None, ignore_index=-1),
              classification.MulticlassAccuracy(7, average="micro", ignore_index=-1),
              classification.MulticlassAccuracy(7, average="macro", ignore_index=-1)]
    for i in range(3):
        logits, label = batch({"num_class": 7, "updates": [[2, 21, 34]] * 3, "seed": 9, "label_classes": 6}, i)
        metric.update(logits, label)
        for other in theirs:
            other.update(logits, label)
    result = metric.result()
    assert torch.equal(metric.confusion(), theirs[0].compute())
    assert result["iou_per_class"] == pytest.approx(theirs[1].compute().tolist(), abs=1e-6)
    assert result["pixAcc"] == pytest.approx(theirs[2].compute().item(), abs=1e-6)
    # torchmetrics counts a class that is only predicted as 0; here the mean is over the classes in the labels
    assert result["mAcc"] * 6 / 7 == pytest.approx(theirs[3].compute().item(), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64])
def test_label_dtypes_and_forms_of_prediction(dtype: torch.dtype) -> None:
    logits, label = batch({"num_class": 5, "updates": [[2, 9, 13]], "seed": 3, "ignore_frac": 0.0}, 0)
    expected = SegmentationMetric(5)
    expected.update(logits, label)
    indices, single = SegmentationMetric(5), SegmentationMetric(5)
    indices.update(logits.argmax(1), label.to(dtype))
    for one, its_label in zip(logits, label, strict=True):
        single.update(one, its_label.to(dtype))
    assert indices.result() == expected.result() == single.result()


def test_a_second_ignored_value() -> None:
    logits, label = batch({"num_class": 5, "updates": [[1, 20, 20]], "seed": 3}, 0)
    minus, byte = SegmentationMetric(5), SegmentationMetric(5, ignore_label=255)
    minus.update(logits, label)
    byte.update(logits, label.where(label >= 0, 255))
    assert minus.result() == byte.result()
    assert (label < 0).any()


def test_label_out_of_range_is_named() -> None:
    metric = SegmentationMetric(4)
    metric.update(torch.zeros(1, 4, 2, 2), torch.tensor([[[0, 3], [255, 1]]]))
    with pytest.raises(UserError, match=r"holds class 255, expected 0\.\.3"):
        metric.get()
    metric.reset()
    metric.update(torch.tensor([[0, 4]]), torch.tensor([[0, 1]]))
    with pytest.raises(UserError, match=r"prediction holds a class outside 0\.\.3"):
        metric.result()


@pytest.mark.parametrize(("pred", "label"), [
    ((1, 5, 4, 4), (1, 4, 4)), ((1, 4, 4, 4), (1, 4, 5)), ((2, 4, 4), (1, 4, 4)), ((4, 4, 4), (4, 4, 4, 4)),
])
def test_shapes_that_do_not_fit(pred: tuple, label: tuple) -> None:
    with pytest.raises(UserError, match="does not fit a label of shape"):
        SegmentationMetric(4).update(torch.zeros(pred), torch.zeros(label, dtype=torch.int64))


def test_counts_stay_exact_above_float_precision() -> None:
    metric = SegmentationMetric(2)
    metric._counts[0, 0] = 2**24 * 2**10  # a float32 counter cannot add 1 to this
    metric.update(torch.tensor([[0, 1]]), torch.tensor([[0, 0]]))
    assert metric.result()["total_inter"][0] == 2**34 + 1
    assert metric.result()["labelled_pixels"] == 2**34 + 2


@pytest.mark.parametrize("spread", [None, 1, 64])
@pytest.mark.parametrize("size", [0, 1, 63, 1000])
def test_cells_are_counted_as_by_bincount(size: int, spread: int | None) -> None:
    cell = torch.randint(0, 7, (size,), generator=torch.Generator().manual_seed(size))
    assert torch.equal(count_cells(cell, 9, spread), torch.bincount(cell, minlength=9))


def test_counting_never_asks_the_host_for_a_value() -> None:
    """Fake tensors have none, so whoever reads one fails; on a GPU it would wait for the device."""
    with FakeTensorMode():
        label = torch.empty(2, 8, 9, dtype=torch.int16)
        metric = SegmentationMetric(5, reference_pixacc=True, ignore_label=255)
        metric.update(torch.empty(2, 5, 8, 9), label)
        assert metric._counts.shape == (6, 6)
        cell = label.flatten().long()
        assert count_cells(cell, 37, spread=64).shape == (37,)
        with pytest.raises(DynamicOutputShapeException):
            torch.bincount(cell, minlength=37)


def test_nothing_counted_is_zero_not_nan() -> None:
    result = SegmentationMetric(3, reference_pixacc=True).result()
    assert result["labelled_pixels"] == 0
    assert {result[key] for key in ("pixAcc", "mIoU", "mIoU_present", "mAcc", "pixAcc_reference")} == {0.0}


def test_classes_that_do_not_occur_are_named() -> None:
    metric = SegmentationMetric(4)
    metric.update(torch.tensor([[0, 1, 1, 3]]), torch.tensor([[0, 0, 2, -1]]))
    names, result = ["road", "car", "tree", "sky"], metric.result()
    assert absent_classes(result, names) == "mIoU counts 2 classes that do not occur: car, sky"
    assert absent_classes(result, names, most=1) == "mIoU counts 2 classes that do not occur: car and 1 more"
    assert table(result, names).endswith("do not occur: car, sky")
    alone = absent_classes({"label_pixels": [5, 0]}, names[:2])
    assert alone == "mIoU counts 1 class that does not occur: car; every labeled pixel is road"
    metric.update(torch.tensor([[0, 1]]), torch.tensor([[1, 3]]))
    assert absent_classes(metric.result(), names) is None and "occur" not in table(metric.result(), names)
