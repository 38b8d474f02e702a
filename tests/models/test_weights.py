"""Fitting weight files to networks: every format that is understood, every misfit that is refused."""
from __future__ import annotations

import functools
import json
import logging

import pytest
import torch
from torch import nn

from models import CAFFE_BGR, IMAGENET_RGB, Preprocess, get_segmentation_model, load_weights, save_state_dict
from models.segmentation import add_input_channels
from models.weights import flat_mobilenet_names
from utils.errors import UserError

W = "_w0.125"
FAMILIES = [("deeplabv3", "resnet18"), ("psp", "resnet50_original"), ("deeplab_mobile", "mobilenetv2")]
families = pytest.mark.parametrize(("model", "backbone"), FAMILIES, ids=lambda v: v)


def make(model: str, backbone: str, seed: int = 0, **kwargs) -> nn.Module:
    """A narrow network whose every tensor is random, the batch-norm statistics too."""
    torch.manual_seed(seed)
    net = get_segmentation_model(model, backbone + W, **kwargs)
    for value in net.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5)
    return net


def same(a: nn.Module, b: nn.Module, prefix: str = "") -> bool:
    other = b.state_dict()
    return all(torch.equal(v, other[k]) for k, v in a.state_dict().items() if k.startswith(prefix))


def backbone_file(net: nn.Module, classifier: str = "fc") -> dict[str, torch.Tensor]:
    """As an ImageNet file: names without prefix, and a classifier."""
    prefix = net.backbone_prefix
    own = {k.removeprefix(prefix): v for k, v in net.state_dict().items() if k.startswith(prefix)}
    return {**own, f"{classifier}.weight": torch.ones(10, 4), f"{classifier}.bias": torch.ones(10)}


def modern_mobilenet_file(net: nn.Module) -> dict[str, torch.Tensor]:
    """As torchvision's newer MobileNetV2 files: convolution and norm nested in each block, the last ones flat."""
    renamed = {}
    for key, value in backbone_file(net, "classifier.1").items():
        parts = key.split(".")
        if "conv" in parts:
            last = 1 if parts[1] == "1" else 2  # number of nested pairs; block 1 has no expansion
            pair, layer = divmod(int(parts[3]), 3)
            parts[3:4] = [str(last + layer)] if pair == last else [str(pair), str(layer)]
        renamed[".".join(parts)] = value
    renamed["features.18.0.weight"] = torch.ones(4, 4, 1, 1)
    return renamed


@families
def test_a_saved_network_loads_again(tmp_path, model, backbone):
    net, other, path = make(model, backbone, 1), make(model, backbone, 2), tmp_path / "deep" / "er" / "net.pth"
    save_state_dict(net, path)
    report = load_weights(other, path)
    assert same(net, other)
    assert len(report.matched) == len(net.state_dict()) and not report.missing and not report.ignored
    plain = torch.load(path, weights_only=True)
    assert list(plain) == list(net.state_dict()) and all(type(v) is torch.Tensor for v in plain.values())
    net.load_state_dict(plain, strict=True)
    assert sorted(p.name for p in path.parent.iterdir()) == ["net.pth", "net.pth.json"]


@pytest.mark.parametrize("preprocess", [CAFFE_BGR, IMAGENET_RGB, Preprocess("rgb", (1, 2, 3), (4, 5, 6), 2)],
                         ids=["bgr", "rgb", "own"])
def test_the_saved_file_carries_the_preprocessing(tmp_path, preprocess):
    net, path = make("psp_mobile", "mobilenetv2"), tmp_path / "net.pth"
    net.preprocess = preprocess
    save_state_dict(net, path)
    again = get_segmentation_model("psp_mobile", "mobilenetv2" + W, pretrained=str(path))
    assert again.preprocess == preprocess and same(net, again)
    told = get_segmentation_model("psp_mobile", "mobilenetv2" + W, pretrained=str(path), preprocess="rgb")
    assert told.preprocess == IMAGENET_RGB
    content = json.loads((tmp_path / "net.pth.json").read_text())
    assert {k: content[k] for k in ("model", "backbone", "num_class", "aux")} == \
        {"model": "psp_mobile", "backbone": "mobilenetv2" + W, "num_class": 19, "aux": False}


def test_without_the_json_file_the_released_preprocessing_is_assumed(tmp_path):
    net, path = make("psp_mobile", "mobilenetv2"), tmp_path / "net.pth"
    torch.save(net.state_dict(), path)
    assert get_segmentation_model("psp_mobile", "mobilenetv2" + W, pretrained=path).preprocess == CAFFE_BGR


@pytest.mark.parametrize("nest", [lambda s: {"state_dict": s}, lambda s: {"model": s, "step": 3, "optimizer": {}},
                                  lambda s: {"net": s}, lambda s: {"model": {"state_dict": s}}, lambda s: s],
                         ids=["state_dict", "model", "net", "twice", "flat"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_nesting_and_prefixes_are_removed(tmp_path, nest, prefix):
    net, other, path = make("psp", "resnet18", 1), make("psp", "resnet18", 2), tmp_path / "net.pth"
    torch.save(nest({prefix + k: v for k, v in net.state_dict().items()}), path)
    load_weights(other, path)
    assert same(net, other)


def test_a_training_checkpoint_may_describe_its_network(tmp_path):
    net, path = make("psp", "resnet18"), tmp_path / "state.pth"
    info = {"model": "psp", "backbone": "resnet18" + W, "num_class": 19, "preprocess": IMAGENET_RGB.to_dict()}
    torch.save({"model": net.state_dict(), "net_info": info}, path)
    other = make("psp", "resnet18", 1)
    load_weights(other, path)
    assert other.preprocess == IMAGENET_RGB
    with pytest.raises(UserError, match="state.pth: its description says num_class 19.*built with 5"):
        load_weights(make("psp", "resnet18", num_class=5), path)


def test_missing_batch_counters_are_no_error(tmp_path):
    net, other, path = make("psp", "resnet18", 1), make("psp", "resnet18", 2), tmp_path / "net.pth"
    torch.save({k: v for k, v in net.state_dict().items() if "num_batches" not in k}, path)
    report = load_weights(other, path)
    assert same(net, other)
    assert report.missing and all(k.endswith("num_batches_tracked") for k in report.missing)
    load_weights(other, path, "backbone")


def test_harmless_extras_of_a_model_file_are_counted(tmp_path):
    net, path = make("psp", "resnet18", 1), tmp_path / "net.pth"
    extras = {"total_ops": torch.ones(1), "head.total_params": torch.ones(1), "pretrained.fc.weight": torch.ones(1)}
    torch.save({**net.state_dict(), **extras}, path)
    lean = make("psp", "resnet18", 2, aux=False)
    report = load_weights(lean, path)
    assert same(lean, net)
    aux = {k for k in net.state_dict() if k.startswith("auxlayer.")}
    assert aux and set(report.ignored) == aux | set(extras)


@pytest.mark.parametrize("source", [None, "", "None", "none", " ", False])
@pytest.mark.parametrize("what", ["model", "backbone"])
def test_nothing_to_load(source, what):
    net, twin = make("psp_mobile", "mobilenetv2"), make("psp_mobile", "mobilenetv2")
    assert load_weights(net, source, what).matched == ()
    assert same(net, twin) and net.preprocess == CAFFE_BGR


@families
@pytest.mark.parametrize("prefix", ["", "module."])
def test_backbone_files(tmp_path, model, backbone, prefix):
    net, other, path = make(model, backbone, 1), make(model, backbone, 2), tmp_path / "imagenet.pth"
    torch.save({"state_dict": {prefix + k: v for k, v in backbone_file(net).items()}}, path)
    report = load_weights(other, path, "backbone")
    assert same(net, other, "pretrained.") and not same(net, other, "head.")
    assert report.ignored == ("fc.weight", "fc.bias") and not report.missing
    assert other.preprocess == (IMAGENET_RGB if "original" in backbone else CAFFE_BGR)
    load_weights(other, path, "backbone", preprocess="bgr")
    assert other.preprocess == CAFFE_BGR


def test_modern_mobilenet_names(tmp_path):
    net, other = make("psp_mobile", "mobilenetv2", 1), make("psp_mobile", "mobilenetv2", 2)
    content, path = modern_mobilenet_file(net), tmp_path / "mobilenet_v2.pth"
    assert {"features.1.conv.0.0.weight", "features.1.conv.1.weight", "features.1.conv.2.bias",
            "features.17.conv.1.1.running_var", "features.17.conv.2.weight", "features.17.conv.3.weight"} < set(content)
    torch.save(content, path)
    report = load_weights(other, path, "backbone")
    assert same(net, other, "pretrained.")
    assert set(report.ignored) == {"features.18.0.weight", "classifier.1.weight", "classifier.1.bias"}
    assert other.preprocess == IMAGENET_RGB
    load_weights(other, path, "backbone", preprocess=CAFFE_BGR)
    assert other.preprocess == CAFFE_BGR
    flat = backbone_file(net, "classifier.1")
    assert list(flat_mobilenet_names(flat)) == list(flat), "the older names are left alone"


@families
def test_the_backbone_of_a_segmentation_file(tmp_path, model, backbone):
    net, other, path = make(model, backbone, 1), make(model, backbone, 2, num_class=7), tmp_path / "net.pth"
    torch.save(net.state_dict(), path)
    load_weights(other, path, "backbone")
    assert same(net, other, "pretrained.") and other.preprocess == CAFFE_BGR
    net.preprocess = IMAGENET_RGB
    save_state_dict(net, path)
    load_weights(other, path, "backbone")
    assert other.preprocess == IMAGENET_RGB


def test_a_few_missing_backbone_tensors_are_reported(tmp_path, caplog):
    net, other, path = make("psp", "resnet18", 1), make("psp", "resnet18", 2), tmp_path / "b.pth"
    content = backbone_file(net)
    del content["bn3.weight"]
    torch.save(content, path)
    with caplog.at_level(logging.INFO, "afdcd"):
        report = load_weights(other, path, "backbone")
    assert report.missing == ("bn3.weight",)
    assert f"{len(report.matched)} tensors matched, 1 missing" in caplog.text
    assert "keep their random values: bn3.weight" in caplog.text


@pytest.mark.parametrize("what", ["model", "backbone"])
def test_what_happened_is_logged(tmp_path, caplog, what):
    net, path = make("psp", "resnet18"), tmp_path / "weights.pth"
    content = {**net.state_dict(), "total_ops": torch.ones(1)} if what == "model" else backbone_file(net)
    torch.save(content, path)
    with caplog.at_level(logging.INFO, "afdcd"):
        report = load_weights(net, path, what)
    assert f"{len(report.matched)} tensors matched, 0 missing" in caplog.text
    assert "1 ignored (total_ops)" in caplog.text or "2 ignored (fc.weight, fc.bias)" in caplog.text
    assert "BGR minus mean" in caplog.text and "weights.pth" in caplog.text


def without(content: dict, *keys: str) -> dict:
    return {k: v for k, v in content.items() if k not in keys}


@functools.cache
def bad_models() -> dict[str, tuple]:
    net = make("psp", "resnet18")
    state = net.state_dict()
    return {
        "nothing": ({"a": torch.ones(1)}, "no tensor of it belongs to psp-resnet18_w0.125 .it has a"),
        "backbone": (backbone_file(net), "no tensor of it belongs.*pretrained-base"),
        "missing": (without(state, "head.classifier.bias"), "lacks 1 of the .* tensors.*head.classifier.bias"),
        "foreign": ({**state, "decoder.weight": torch.ones(1)}, "holds 1 tensors .* does not have: decoder.weight"),
        "other head": (make("deeplabv3", "resnet18").state_dict(), "lacks .* head.psp.conv1.0.weight"),
        "classes": (make("psp", "resnet18", num_class=7).state_dict(),
                    r"head.classifier.weight has shape \[7, 16, 1, 1\], but .* with 19 classes wants \[19, 16, 1, 1\]"),
        "nan": ({**state, "head.classifier.bias": torch.full((19,), float("nan"))}, "head.classifier.bias .*finite"),
    }


@functools.cache
def bad_backbones() -> dict[str, tuple]:
    net = make("psp", "resnet18")
    deep, plain = make("psp", "resnet50"), make("psp", "resnet18_original")
    few = dict(list(backbone_file(net).items())[:40])
    larger = {**backbone_file(net), **{f"layer2.{i}.conv1.weight": torch.ones(8) for i in range(2, 30)}}
    return {
        "nothing": ({"a": torch.ones(1)}, "matches only 0 of the .* tensors of psp-resnet18_w0.125's backbone"),
        "little": (few, "matches only .* of the .* tensors"),
        "other depth": (backbone_file(deep), r"layer1.0.conv1.weight has shape \[8, 16, 1, 1\].*wants \[8, 16, 3, 3\]"),
        "other stem": (backbone_file(plain), r"conv1.weight has shape \[8, 3, 7, 7\].*wants \[8, 3, 3, 3\].*deep stem"),
        "larger": (larger, "another, larger network.*28 tensors have no place .layer2.2.conv1.weight"),
    }


@pytest.mark.parametrize("model, backbone", FAMILIES)
def test_an_input_channel_too_many_or_too_few_is_named(tmp_path, model, backbone):
    plain, wide = make(model, backbone), add_input_channels(make(model, backbone), 1)
    for net, other in ((plain, wide), (wide, plain)):
        torch.save(net.state_dict(), tmp_path / "net.pth")
        with pytest.raises(UserError, match=rf"net.pth: pretrained.*wants .*\] .the file has {net.in_channels} input "
                                            rf"channels, the network {other.in_channels}.$"):
            load_weights(other, tmp_path / "net.pth")


@pytest.mark.parametrize("case", bad_models())
def test_model_files_that_do_not_fit(tmp_path, case):
    refuse(tmp_path / "bad.pth", "model", *bad_models()[case])


@pytest.mark.parametrize("case", bad_backbones())
def test_backbone_files_that_do_not_fit(tmp_path, case):
    refuse(tmp_path / "bad.pth", "backbone", *bad_backbones()[case])


def refuse(path, what: str, content: dict, message: str) -> None:
    """One line that names the file, and a network that is as it was."""
    torch.save(content, path)
    net, twin = make("psp", "resnet18", 5), make("psp", "resnet18", 5)
    with pytest.raises(UserError, match=message) as caught:
        load_weights(net, path, what)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert same(net, twin) and net.preprocess == CAFFE_BGR


@pytest.mark.parametrize("field", ["model", "backbone", "num_class"])
def test_a_description_of_another_network_is_refused(tmp_path, field):
    net, path = make("psp", "resnet18"), tmp_path / "net.pth"
    save_state_dict(net, path)
    beside = tmp_path / "net.pth.json"
    beside.write_text(json.dumps({**json.loads(beside.read_text()), field: 21}))
    with pytest.raises(UserError, match=f"net.pth: its description says {field} 21"):
        load_weights(net, path)


def test_base_is_not_read_beside_a_whole_network(tmp_path, caplog):
    net, path = make("psp", "resnet18"), tmp_path / "net.pth"
    save_state_dict(net, path)
    with caplog.at_level(logging.INFO, "afdcd"):
        again = get_segmentation_model("psp", "resnet18" + W, pretrained=path, pretrained_base="imagenet.pth")
    assert same(net, again) and "imagenet.pth is not read" in caplog.text


def test_half_precision_files_and_wrapped_networks(tmp_path):
    net, path = make("psp", "resnet18", 1), tmp_path / "net.pth"
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}, path)
    other = make("psp", "resnet18", 2)
    load_weights(nn.DataParallel(other), path)
    assert other.head.classifier.weight.dtype == torch.float32
    assert torch.equal(other.head.classifier.weight, net.head.classifier.weight.half().float())
    save_state_dict(nn.DataParallel(other), tmp_path / "again.pth")
    assert list(torch.load(tmp_path / "again.pth", weights_only=True)) == list(net.state_dict())


def test_what_must_be_known():
    with pytest.raises(ValueError, match="'model' or 'backbone'"):
        load_weights(make("psp", "resnet18"), None, "encoder")
