"""Evaluation: scales, flip, sliding window, counts, and what it must leave alone."""
from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import fill
from torch import Tensor, nn

from dataset import get_dataset_spec
from engine.evaluate import evaluate, prepare_for_inference
from engine.predict import predict, predict_classes
from engine.validation import Validator
from models import get_segmentation_model
from models.output import SegOutput
from models.preprocess import CAFFE_BGR
from utils.distributed import Distributed
from utils.errors import UserError
from utils.score import SegmentationMetric
from utils.watchdog import Watchdog, no_prediction

CPU = torch.device("cpu")


class Net(nn.Module):
    """A network at stride 2 (or 1, pixel by pixel) with the attributes that evaluation needs."""

    preprocess, num_class = CAFFE_BGR, 5

    def __init__(self, stride: int = 2) -> None:
        super().__init__()
        kernel = 3 if stride > 1 else 1
        self.conv = nn.Conv2d(3, 5, kernel, stride=stride, padding=kernel // 2)
        fill.fill_module(self, 1)
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> SegOutput:
        self.sizes.append(tuple(x.shape[-2:]))
        logits = self.conv(x)
        return SegOutput(logits, None, *[logits] * 5)


class Data:
    """Images of different sizes with labels."""

    ignore_label = -1
    shapes = ((24, 31), (17, 20), (40, 22))

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        h, w = self.shapes[index]
        image = torch.from_numpy(fill.image(f"eval{index}", (h, w, 3))).permute(2, 0, 1).contiguous()
        return {"image": image, "label": fill.labels(f"eval{index}", (h, w), 5).to(torch.int16),
                "valid": torch.tensor([0, h, 0, w], dtype=torch.int16), "name": f"i{index}", "index": index}


def image(index: int = 0) -> Tensor:
    return Data()[index]["image"].unsqueeze(0)


def upsampled(net: nn.Module, x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(net(x).logits, size, mode="bilinear", align_corners=True)


@torch.no_grad()
def test_whole_image() -> None:
    net = Net()
    assert torch.equal(predict(net, image()), upsampled(net, CAFFE_BGR(image()), (24, 31)))


@torch.no_grad()
def test_scales_and_flip_average_logits() -> None:
    net, x = Net(), CAFFE_BGR(image())
    total = torch.zeros(1, 5, 24, 31)
    for scale in (0.5, 1.0, 1.75):
        scaled = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=True)  # floor(side * scale)
        total += (upsampled(net, scaled, (24, 31)) + upsampled(net, scaled.flip(3), (24, 31)).flip(3)) / 2
    got = predict(net, image(), scales=(0.5, 1.0, 1.75), flip=True)
    assert (12, 15) in net.sizes and (42, 54) in net.sizes
    torch.testing.assert_close(got, total / 3, rtol=1e-5, atol=1e-3)
    single = predict(net, image())
    assert torch.equal(predict(net, image(), scales=(1.0, 1.0)), single)
    assert not torch.equal(predict(net, image(), flip=True), single)


@torch.no_grad()
def test_window_that_covers_the_image_is_the_whole_image() -> None:
    net = Net()
    for window in ((24, 31), (24, 40), (100, 100)):
        assert torch.equal(predict(net, image(), window=window), predict(net, image()))


@torch.no_grad()
def test_window_of_a_pixelwise_network_changes_nothing() -> None:
    net = Net(stride=1)
    for window, stride in (((7, 9), None), ((7, 9), (7, 9)), ((10, 31), (1, 3)), ((30, 5), (4, 5)), ((1, 1), None)):
        got = predict(net, image(), window=window, stride=stride, flip=True)
        torch.testing.assert_close(got, predict(net, image(), flip=True), rtol=1e-5, atol=1e-3)


@torch.no_grad()
def test_overlapping_windows_are_averaged() -> None:
    net, x = Net(), CAFFE_BGR(image())
    total, count = torch.zeros(1, 5, 24, 31), torch.zeros(24, 31)
    for top in (0, 10, 12):                # 24 rows, window 12, stride 10: the last one ends at the border
        for left in (0, 8, 15):            # 31 columns, window 16, stride 8
            part = upsampled(net, x[..., top:top + 12, left:left + 16], (12, 16))
            total[..., top:top + 12, left:left + 16] += part
            count[top:top + 12, left:left + 16] += 1
    got = predict(net, image(), window=(12, 16), stride=(10, 8))
    torch.testing.assert_close(got, total / count, rtol=1e-5, atol=1e-3)


def test_evaluate_counts_every_image_once() -> None:
    net, metric, seen = Net().train(), SegmentationMetric(5, reference_pixacc=True), {}
    state = torch.random.get_rng_state()
    result = evaluate(net, Data(), device=CPU, metric=metric, flip=True,
                      on_prediction=lambda prediction, item: seen.update({item["name"]: (prediction, item)}))
    assert torch.equal(torch.random.get_rng_state(), state), "evaluation must not change what training draws next"
    assert net.training
    direct = SegmentationMetric(5, reference_pixacc=True)
    with torch.no_grad():
        for i in range(3):
            logits = predict(net, image(i), flip=True)
            direct.update(logits, Data()[i]["label"].unsqueeze(0))
            prediction, item = seen[f"i{i}"]
            assert torch.equal(prediction, logits.argmax(1)[0])
            assert item["index"] == i and torch.equal(item["label"], Data()[i]["label"])
            assert torch.equal(item["image"], Data()[i]["image"])
    assert result == {**direct.result(), "images": 3}


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Sizes of the predictions that were copied from the device."""
    sizes, cpu = [], Tensor.cpu

    def copy(tensor: Tensor) -> Tensor:
        if tuple(tensor.shape) in Data.shapes:
            sizes.append(tuple(tensor.shape))
        return cpu(tensor)

    monkeypatch.setattr(Tensor, "cpu", copy)
    return sizes


@pytest.mark.parametrize(("limit", "count"), [(None, 3), (5, 3), (2, 2), (0, 0)])
def test_only_the_predictions_that_are_wanted_are_copied(copied: list[tuple[int, ...]], limit: int | None,
                                                         count: int) -> None:
    seen = []
    result = evaluate(Net(), Data(), device=CPU, on_prediction=lambda _, item: seen.append(item["index"]),
                      prediction_limit=limit)
    assert seen == [0, 1, 2][:count] and copied == list(Data.shapes[:count])
    assert result == evaluate(Net(), Data(), device=CPU), "every image counts"


@pytest.mark.parametrize(("panels", "is_main_process", "count"),
                         [(2, True, 2), (0, True, 0), (9, True, 3), (2, False, 0)])
def test_validation_copies_what_it_draws(copied: list[tuple[int, ...]], panels: int, is_main_process: bool,
                                         count: int) -> None:
    data, pictures, records = Data(), {}, []
    camvid = get_dataset_spec("camvid")
    data.spec = SimpleNamespace(palette=camvid.palette, classes=camvid.classes[:Net().num_class])
    data.split = "val"
    logger = SimpleNamespace(record=lambda kind, step, **values: records.append(values),
                             picture=lambda name, image, step: pictures.update({name: image}))
    validator = Validator(data, Distributed(0, 1, 0, CPU), logger if is_main_process else None, panels)
    assert validator(Net(), 7) == evaluate(Net(), data, device=CPU)
    assert copied == list(Data.shapes[:count]) and list(pictures) == [f"val/{i}" for i in range(count)]
    assert all(p.ndim == 3 and p.std() > 0 for p in pictures.values()) and len(records) == is_main_process


def real_network(model: str = "deeplab_mobile", backbone: str = "mobilenetv2_w0.25", dtype: torch.dtype = torch.float64,
                 aux: bool = True) -> nn.Module:
    """A network with batch norms that change something, whose input has the type of its weights."""
    net = fill.fill_module(get_segmentation_model(model, backbone, 5, aux=aux), 2).to(dtype)
    net.preprocess = lambda image, valid=None: CAFFE_BGR(image, valid).to(dtype)
    return net


WAYS = [{}, {"scales": (0.5, 1.25), "flip": True}, {"window": (16, 20), "stride": (10, 16)},
        {"scales": (1.0, 1.5), "window": (20, 16), "flip": True}]


@torch.no_grad()
@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize(("size", "at_once"), [(None, None), (None, 1), ((37, 50), 1), ((37, 50), 10**6)])
def test_classes_are_the_arg_max_of_the_logits(options: dict, size: tuple | None, at_once: int | None) -> None:
    both = torch.cat([image(), image().flip(2)])
    expected = predict(Net(), both, size=size, **options).argmax(1)
    got = predict_classes(Net(), both, size=size, at_once=at_once, **options)
    assert len(expected.unique()) > 2
    assert torch.equal(got.long(), expected)


@torch.no_grad()
def test_of_equal_logits_the_first_class_wins() -> None:
    net = Net()
    net.conv.weight.zero_()
    net.conv.bias.copy_(torch.tensor([0.0, 2.0, 1.0, 2.0, 2.0]))
    assert predict_classes(net, image(), at_once=1).unique().tolist() == [1]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_the_fast_form_equals_the_plain_one(options: dict) -> None:
    net, seen = real_network().train(), {True: [], False: []}
    net.head.block[-1].weight.grad = torch.zeros_like(net.head.block[-1].weight)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    fast, plain = (evaluate(net, Data(), device=CPU, fast=fast, **options,
                            on_prediction=lambda prediction, item, fast=fast: seen[fast].append(prediction))
                   for fast in (True, False))
    assert fast == plain and 0 < plain["pixAcc"] < 1
    assert all(map(torch.equal, seen[True], seen[False])) and seen[True][0].dtype == torch.int64
    assert net.training and net.aux
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(("model", "backbone"), [("deeplabv3", "resnet18"), ("psp", "resnet50_w0.25"),
                                                 ("psp_mobile", "mobilenetv2_w0.25")])
@torch.no_grad()
def test_a_prepared_network_gives_the_same_logits(model: str, backbone: str) -> None:
    net = real_network(model, backbone).eval()
    next(net.parameters()).grad = torch.zeros_like(next(net.parameters()))
    prepared = prepare_for_inference(net)
    x = net.preprocess(image())
    torch.testing.assert_close(prepared(x).logits, net(x).logits, rtol=1e-9, atol=1e-9)
    assert net.aux and not hasattr(prepared, "auxlayer")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in prepared.modules())
    assert not any(p.requires_grad or p.grad is not None for p in prepared.parameters())


@pytest.mark.parametrize("size", [2, 3, 7])
def test_batches_hold_neighbors_of_one_size_and_change_nothing(size: int) -> None:
    data, net, seen, sizes = Data(), real_network(), [], []
    data.shapes = ((24, 31), (24, 31), (24, 31), (17, 20), (24, 31), (24, 31), (17, 20))
    net.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(inputs[0].shape[2:])))
    one = evaluate(net, data, device=CPU, fast=False)
    sizes.clear()
    calls = []
    net.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    many = evaluate(net, data, device=CPU, fast=False, batch_size=size, prediction_limit=4, workers=size % 2,
                    on_prediction=lambda prediction, item: seen.append((item["name"], tuple(prediction.shape))))
    assert calls == {2: [2, 1, 1, 2, 1], 3: [3, 1, 2, 1], 7: [3, 1, 2, 1]}[size]
    assert many == one == evaluate(net, data, device=CPU, batch_size=size)
    assert seen == [(f"i{i}", data.shapes[i]) for i in range(4)], "in order, and no more than are wanted"


@pytest.mark.parametrize("fast", [True, False])
def test_half_precision_is_that_of_the_network(fast: bool) -> None:
    net, types = Net(), set()
    net.register_forward_hook(lambda module, inputs, output: types.add(output.logits.dtype))
    half = evaluate(net, Data(), device=CPU, fast=fast, amp=torch.bfloat16)
    assert types == {torch.bfloat16}
    exact = evaluate(net, Data(), device=CPU, fast=fast)
    assert half["label_pixels"] == exact["label_pixels"]
    assert half["pixAcc"] == pytest.approx(exact["pixAcc"], abs=0.02)


@torch.no_grad()
def test_half_precision_ends_before_the_resizing() -> None:
    net = real_network(dtype=torch.float32).eval()
    logits, exact = predict(net, image(), amp=torch.bfloat16), predict(net, image())
    assert logits.dtype == torch.float32 and len(logits.unique()) > len(logits.bfloat16().unique())
    assert 0 < (logits - exact).abs().max() < 0.1 * exact.abs().max()


def test_the_reference_s_accuracy_costs_nothing_unless_asked_for() -> None:
    plain, with_it = (evaluate(Net(), Data(), device=CPU, metric=SegmentationMetric(5, reference_pixacc=asked))
                      for asked in (False, True))
    assert with_it.pop("pixAcc_reference") > 0 and with_it == plain


def test_a_prediction_that_does_not_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    over, said, net = threading.Event(), [], Net()

    def expire(self: Watchdog, advice: Any) -> None:
        said.append(advice(self.seconds, self.then))
        if advice is no_prediction:
            over.set()

    monkeypatch.setattr(Watchdog, "_expire", expire)
    net.register_forward_hook(lambda *_: over.wait(100) and None)
    with Watchdog(0.05, "start again"):
        evaluate(net, Data(), device=CPU, fast=False)
    assert "a prediction has lasted 0.05 s: the device does not answer (nvidia-smi, dmesg)" in said


def test_workers_do_not_matter_and_the_metric_starts_afresh() -> None:
    metric = SegmentationMetric(5)
    first = evaluate(Net(), Data(), device=CPU, metric=metric, workers=2)
    assert evaluate(Net(), Data(), device=CPU, metric=metric) == first == evaluate(Net(), Data(), device=CPU)


@pytest.mark.parametrize(("options", "said"), [
    ({"scales": ()}, "--scales: expected at least one factor"),
    ({"scales": (1.0, -1.0)}, "--scales"),
    ({"scales": (float("nan"),)}, "--scales"),
    ({"scales": (0.01,)}, "0.01 leaves nothing of an image of 24x31 pixels"),
    ({"stride": (2, 2)}, "--stride: expected together with --window"),
    ({"window": (0, 4)}, "--window"),
    ({"window": (4,)}, "--window"),
    ({"window": (4, 4), "stride": (5, 2)}, "--stride: expected height and width between 1 and the window"),
    ({"window": (4, 4), "stride": (0, 2)}, "--stride"),
])
def test_options_that_cannot_be(options: dict, said: str) -> None:
    with pytest.raises(UserError) as error:
        evaluate(Net(), Data(), device=CPU, **options)
    assert said in str(error.value) and "\n" not in str(error.value)
