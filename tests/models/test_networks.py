"""One battery over every registered network; a network that is added to the registry is tested by itself."""
from __future__ import annotations

import copy
import functools
import json
import math
from pathlib import Path

import pytest
import torch
from reference import fill
from torch import nn

from models import (
    IMAGENET_RGB,
    NetworkChoice,
    SegOutput,
    default_aux,
    get_segmentation_model,
    list_models,
    split_backbone,
)
from models.backbone import scaled
from models.mobilenetv2 import MobileNetV2
from models.resnet import BasicBlock, Bottleneck, ResNet
from utils.errors import UserError

KEYS = Path(fill.__file__).parent / "checkpoint_keys"
PAIRS = list_models()
TRUE_RESNET18 = "resnet18_original"
all_networks = pytest.mark.parametrize(("model", "backbone"), PAIRS, ids=lambda v: v)


@functools.cache
def on_meta(*args, **kwargs) -> nn.Module:
    """A network without memory: enough for names, shapes and channel counts. Shared, do not change it."""
    with torch.device("meta"):
        return get_segmentation_model(*args, **kwargs)


@functools.cache
def narrow(model: str, backbone: str, **kwargs) -> nn.Module:
    """The same network with an eighth of the channels, for tests that compute. Shared, do not change it."""
    torch.manual_seed(0)
    return get_segmentation_model(model, f"{backbone}_w0.125", **kwargs).eval()


def shapes(net: nn.Module) -> list[tuple[str, list[int]]]:
    return [(k, list(v.shape)) for k, v in net.state_dict().items()]


def check_output(net: nn.Module, x: torch.Tensor) -> SegOutput:
    """Strides, channels and the None fields are as the attributes say."""
    out = net(x)
    assert isinstance(out, SegOutput)
    filled = [tap for tap in SegOutput._fields if getattr(out, tap) is not None]
    assert list(net.channels) == filled
    for tap in filled:
        stride = 4 if tap == "c1" else net.output_stride
        side = [math.ceil(s / stride) for s in x.shape[2:]]
        assert list(getattr(out, tap).shape) == [x.shape[0], net.channels[tap], *side], tap
    return out


def test_the_fourteen_pairs_are_listed():
    resnets = [f"resnet{d}{s}" for d in (18, 50, 101) for s in ("", "_original")]
    want = {(m, b) for m in ("deeplabv3", "psp") for b in resnets}
    assert set(PAIRS) == want | {("deeplab_mobile", "mobilenetv2"), ("psp_mobile", "mobilenetv2")}
    assert len(PAIRS) == 14


@pytest.mark.parametrize(("model", "backbone"), [p for p in PAIRS if p[1] != TRUE_RESNET18], ids=lambda v: v)
def test_names_shapes_and_order_equal_the_released_checkpoints(model, backbone):
    want = json.loads((KEYS / f"{model}_{backbone}.json").read_text())
    net = on_meta(model, backbone)
    assert shapes(net) == list(want["state_dict"].items())
    assert net.aux == want["aux"]
    assert sum(p.numel() for p in net.parameters()) == want["parameters"]
    assert net.backbone_prefix == want["backbone_file"]["prefix_in_model"]
    own = {k.removeprefix(net.backbone_prefix): s for k, s in shapes(net) if k.startswith(net.backbone_prefix)}
    assert own == want["backbone_file"]["shapes"]


@pytest.mark.parametrize("model", ["deeplabv3", "psp"])
def test_resnet18_original_is_a_resnet18(model):
    net, deep = on_meta(model, TRUE_RESNET18), on_meta(model, "resnet18")
    blocks = [m for m in net.modules() if isinstance(m, (BasicBlock, Bottleneck))]
    assert len(blocks) == 8 and all(type(b) is BasicBlock for b in blocks)
    plain, same = dict(shapes(net)), dict(shapes(deep))
    assert plain["pretrained.conv1.weight"] == [64, 3, 7, 7]
    assert plain["pretrained.layer1.0.conv1.weight"] == [64, 64, 3, 3]  # the deep stem has 128 channels here
    behind = ("pretrained.layer1.1.", "pretrained.layer2", "pretrained.layer3", "pretrained.layer4", "head", "aux")
    assert [kv for kv in plain.items() if kv[0].startswith(behind)] == \
        [kv for kv in same.items() if kv[0].startswith(behind)]
    backbone = sum(p.numel() for p in net.pretrained.parameters())
    assert backbone == 11_176_512  # the published ResNet-18 of 11 689 512 parameters without its 513 000 of fc


@all_networks
def test_shapes_agree_with_the_attributes(model, backbone):
    """At full width, on the meta device: nothing is computed."""
    net = on_meta(model, backbone)
    check_output(net, torch.empty(2, 3, 65, 72, device="meta"))
    assert net.name == f"{model}-{backbone}" and net.num_class == 19 and net.output_stride == 8
    assert net.preprocess.channel_order == "bgr"


@all_networks
def test_it_computes_at_odd_sizes_and_is_deterministic(model, backbone):
    net = narrow(model, backbone)
    x = torch.randn(1, 3, 41, 59)
    with torch.no_grad():
        out, again = check_output(net, x), net(x)
        check_output(net, torch.randn(1, 3, 8, 8))
    assert all(torch.isfinite(t).all() for t in out if t is not None)
    assert torch.equal(out.logits, again.logits)
    assert out.logits.std() > 0


@all_networks
def test_aux_can_be_chosen(model, backbone):
    """The default is tested above, here the other choice."""
    default = on_meta(model, backbone).aux
    assert default == ("mobile" not in model) == default_aux(model)
    net = on_meta(model, backbone, aux=not default)
    out = check_output(net, torch.empty(2, 3, 32, 32, device="meta"))
    assert (out.aux is None) == default != net.aux == ("aux" in net.channels)
    assert any(k.startswith("auxlayer.") for k in net.state_dict()) != default


@all_networks
def test_class_count_changes_only_the_classifiers(model, backbone):
    a, b = dict(shapes(on_meta(model, backbone))), dict(shapes(on_meta(model, backbone, num_class=7)))
    changed = {k.rsplit(".", 1)[0] for k in a if a[k] != b[k]}
    head = "head.block.4" if "deeplab" in model else "head.classifier"
    assert changed == ({head, "auxlayer.block.4"} if "mobile" not in model else {head})
    assert all(b[k][0] == 7 for k in a if a[k] != b[k])


@all_networks
def test_float64_agrees_with_float32(model, backbone):
    net = narrow(model, backbone)
    x = torch.randn(1, 3, 33, 40, dtype=torch.float64)
    with torch.no_grad():
        single = net(x.float()).logits
        double = copy.deepcopy(net).double()(x).logits
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-5 * float(double.abs().max()))


@all_networks
def test_every_parameter_gets_a_gradient(model, backbone):
    net = copy.deepcopy(narrow(model, backbone)).train()
    out = net(torch.randn(2, 3, 32, 32))
    (out.logits.square().mean() + (out.aux.square().mean() if net.aux else 0)).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("width", [0.25, 0.75])
@all_networks
def test_width_variants(model, backbone, width):
    full, net = on_meta(model, backbone), on_meta(model, f"{backbone}_w{width}")
    assert [k for k, _ in shapes(net)] == [k for k, _ in shapes(full)]
    assert net.name.endswith(f"_w{width}")
    expansion = 4 if "resnet50" in backbone or "resnet101" in backbone else 1
    for tap in ("c1", "c2", "c3", "c4"):
        assert net.channels[tap] == expansion * scaled(full.channels[tap] // expansion, width)
    assert net.channels["head"] == scaled(full.channels["head"], width)


def test_width_one_is_the_full_network():
    assert shapes(on_meta("psp", "resnet18_w1.0")) == shapes(on_meta("psp", "resnet18"))


@pytest.mark.parametrize("factor", [0.1, 0.25, 0.35, 0.5, 0.75, 1.4])
def test_scaled_channels_are_multiples_of_8_and_not_far_below(factor):
    for channels in (16, 24, 32, 64, 96, 160, 320, 512):
        got = scaled(channels, factor)
        assert got % 8 == 0 and 0.9 * channels * factor <= got <= channels * factor + 8
        assert scaled(channels, 1.0) == channels


def test_split_backbone():
    assert split_backbone("resnet18_original_w0.25") == ("resnet18_original", 0.25)
    assert split_backbone("resnet18_original") == ("resnet18_original", 1.0)


@pytest.mark.parametrize("name", ["resnet18_w0", "resnet18_w0.0", "resnet18_w9", "mobilenetv2_w400"])
def test_width_out_of_range(name):
    with pytest.raises(UserError, match=f"{name}.*above 0 and at most 4"):
        get_segmentation_model("psp", name)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(UserError, match="unknown model 'unet'.*deeplabv3.*psp_mobile"):
        get_segmentation_model("unet", "resnet18")
    for name in ("resnet34", "resnet18_w", "resnet18_wide", "mobilenetv2", "", None):
        with pytest.raises(UserError, match="unknown backbone.*for psp: .*resnet18.*resnet101_original.*_w0.5"):
            get_segmentation_model("psp", name)


@pytest.mark.parametrize("num_class", [0, -1, 2.5, "19", True])
def test_class_count_must_be_positive(num_class):
    with pytest.raises(UserError, match="num_class"):
        get_segmentation_model("psp", "resnet18_w0.125", num_class=num_class)


@pytest.mark.parametrize("x", [torch.zeros(3, 32, 32), torch.zeros(1, 1, 32, 32), torch.zeros(1, 3, 7, 32),
                               torch.zeros(1, 3, 32, 7), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)],
                         ids=["3d", "gray", "low", "thin", "uint8"])
def test_wrong_input_names_the_expected_shape(x):
    net = narrow("deeplab_mobile", "mobilenetv2")
    with pytest.raises(UserError, match=r"mobilenetv2_w0.125 expects a float image batch \[B, 3, H, W\]"):
        net(x)


def test_norm_layer_reaches_every_norm_and_no_other_network():
    class Norm(nn.BatchNorm2d):
        pass

    for model, backbone in (("psp_mobile", "mobilenetv2"), ("deeplabv3", "resnet50"), ("psp", "resnet18_original")):
        kinds = {type(m) for m in on_meta(model, backbone, norm_layer=Norm).modules() if isinstance(m, nn.BatchNorm2d)}
        assert kinds == {Norm}
        kinds = {type(m) for m in on_meta(model, backbone).modules() if isinstance(m, nn.BatchNorm2d)}
        assert kinds == {nn.BatchNorm2d}


def test_a_choice_builds_what_its_names_say():
    choice = NetworkChoice("psp", "resnet18_w0.125", preprocess="rgb", aux=False)
    net = choice.build(7, norm_layer=nn.InstanceNorm2d)
    assert (net.name, net.num_class, net.aux) == ("psp-resnet18_w0.125", 7, False)
    assert net.preprocess == IMAGENET_RGB and isinstance(net.pretrained.bn1, nn.InstanceNorm2d)
    assert NetworkChoice("psp", "resnet18_w0.125").build(19).aux and not net.aux
    with pytest.raises(UserError, match="no such weights file"):
        NetworkChoice("psp", "resnet18_w0.125", "missing.pth").build(19)


def test_options_and_old_arguments():
    assert get_segmentation_model("psp_mobile", "mobilenetv2_w0.125", local_rank=0, pretrained="", pretrained_base=None)
    with pytest.raises(TypeError, match="color"):
        get_segmentation_model("psp_mobile", "mobilenetv2_w0.125", color="red")


def test_dropout_is_made_of_modules_with_the_usual_rates():
    rates = {n: m.p for n, m in on_meta("deeplabv3", "resnet18").named_modules() if isinstance(m, nn.Dropout)}
    assert rates == {"head.aspp.project.3": 0.5, "head.block.3": 0.1, "auxlayer.block.3": 0.1}
    rates = {n: m.p for n, m in on_meta("psp", "resnet18").named_modules() if isinstance(m, nn.Dropout)}
    assert rates == {"head.block.3": 0.1, "auxlayer.block.3": 0.1}


def test_backbone_initialization_is_he_fan_out():
    torch.manual_seed(0)
    for backbone in (ResNet(18, width=0.5), MobileNetV2(width=0.5)):
        for conv in (m for m in backbone.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 4000):
            fan_out = conv.out_channels * conv.kernel_size[0] ** 2
            assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


def test_receptive_dilations():
    """The dilation grids, spelled out."""
    net = on_meta("psp", "resnet50").pretrained
    grid = [[block.conv2.dilation[0] for block in stage] for stage in (net.layer1, net.layer2, net.layer3, net.layer4)]
    assert grid == [[1] * 3, [1] * 4, [1] + [2] * 5, [2, 4, 4]]
    net = on_meta("psp", "resnet18").pretrained
    grid = [(b.conv1.dilation[0], b.conv2.dilation[0]) for stage in (net.layer3, net.layer4) for b in stage]
    assert grid == [(1, 2), (2, 2), (2, 4), (4, 4)]
    net = on_meta("psp_mobile", "mobilenetv2").pretrained.net
    grid = [next(m.dilation[0] for m in block.modules() if isinstance(m, nn.Conv2d) and m.groups > 1)
            for block in net.features[1:]]
    assert grid == [1] * 7 + [2] * 7 + [4] * 3
