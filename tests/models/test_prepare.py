"""The prepared teacher gives what the network gives, computes no head that is not read, and keeps its attributes."""
from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from models import get_segmentation_model
from models.output import SegOutput
from models.prepare import PreparedTeacher, SubsampledConv2d, fold_batch_norms, to_channels_last

CLASSES, EVERYTHING = 5, SegOutput._fields
NETWORKS = [("deeplabv3", "resnet18_w0.25"), ("psp", "resnet50_original_w0.125"), ("deeplabv3", "resnet50_w0.125"),
            ("deeplab_mobile", "mobilenetv2_w0.25"), ("psp_mobile", "mobilenetv2_w0.25")]


def network(model: str, backbone: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A network in eval mode whose batch norms do something."""
    torch.manual_seed(0)
    net = get_segmentation_model(model, backbone, CLASSES).to(dtype)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.weight, 0.5), (module.running_var, 0.5), (module.bias, -0.5),
                                (module.running_mean, -0.5)):
                nn.init.uniform_(tensor, low, low + 1)
    return net.eval().requires_grad_(False)


def images(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("choice", NETWORKS, ids="-".join)
def test_every_tap_is_that_of_the_network(choice) -> None:
    net = network(*choice)
    expected = net(images())
    prepared = to_channels_last(PreparedTeacher(copy.deepcopy(net), EVERYTHING))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in prepared.modules())
    for tap, value, wanted in zip(EVERYTHING, prepared(images()), expected, strict=True):
        if wanted is None:
            assert tap == "aux" and value is None
        else:
            torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-9, msg=tap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_channels_last_changes_neither_values_nor_names(dtype) -> None:
    net = network(*NETWORKS[0], dtype)
    laid_out = to_channels_last(copy.deepcopy(net))
    for (name, value), (other, wanted) in zip(laid_out.state_dict().items(), net.state_dict().items(), strict=True):
        assert name == other and torch.equal(value, wanted)
    assert laid_out.pretrained.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    x = images(dtype)
    for value, wanted in zip(laid_out(x.contiguous(memory_format=torch.channels_last)), net(x), strict=True):
        within = 1e-4 if dtype is torch.float32 else 1e-9
        torch.testing.assert_close(value, wanted, rtol=within, atol=within)


def test_a_convolution_with_a_bias_is_folded_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).double().eval()
    nn.init.uniform_(net[1].running_mean)
    nn.init.uniform_(net[1].running_var)
    expected = net(images())
    folded = fold_batch_norms(copy.deepcopy(net))
    torch.testing.assert_close(folded(images()), expected, rtol=1e-12, atol=1e-12)
    assert isinstance(folded[1], nn.Identity) and isinstance(folded[3], nn.BatchNorm2d), "no convolution before it"


@pytest.mark.parametrize(("taps", "heads"), [({"c4"}, ()), ({"aux", "c3"}, ("auxlayer",)), ({"logits"}, ("head",)),
                                             ({"head", "aux"}, ("head", "auxlayer"))])
def test_only_heads_that_are_read_are_computed(taps, heads) -> None:
    net = network(*NETWORKS[0], torch.float32)
    expected, preprocess = net(images(torch.float32)), net.preprocess
    prepared, called = PreparedTeacher(net, taps), []
    for name in ("head", "auxlayer"):
        for module in getattr(net, name, nn.Module()).modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda *_, name=name: called.append(name))
    output = prepared(images(torch.float32))
    assert {tap for tap, value in output._asdict().items() if value is not None} == taps == set(prepared.channels)
    assert set(called) == set(heads)
    for tap in taps:
        torch.testing.assert_close(getattr(output, tap), getattr(expected, tap), rtol=1e-4, atol=1e-4)
    assert (prepared.name, prepared.num_class, prepared.output_stride) == ("deeplabv3-resnet18_w0.25", CLASSES, 8)
    assert prepared.preprocess == preprocess


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(("dtype", "within"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_its_own_precision(dtype, within, fold) -> None:
    net = network(*NETWORKS[0], torch.float32)
    expected = net(images(torch.float32)).c4
    prepared = PreparedTeacher(net, {"c4"}, dtype, fold=fold)
    c4 = prepared(images(torch.float32)).c4
    assert c4.dtype == dtype
    assert 1e-5 < (c4.float() - expected).norm() / expected.norm() < within
    prepared.output_dtype = torch.float32
    assert torch.equal(prepared(images(torch.float32)).c4, c4.float())


def test_autocast_does_not_reach_it() -> None:
    prepared = PreparedTeacher(network(*NETWORKS[0], torch.float32), {"c4"})
    expected = prepared(images(torch.float32)).c4
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prepared(images(torch.float32)).c4, expected)


def test_narrow_strided_convolutions_are_computed_without_a_stride() -> None:
    """oneDNN writes past the gradient of their weight in channels-last order."""
    net = get_segmentation_model(model="psp", backbone="resnet18_w0.125", num_class=3)
    names = [name for name, m in to_channels_last(net).named_modules() if type(m) is SubsampledConv2d]
    assert names == ["pretrained.layer2.0.downsample.0"]
    conv = nn.Conv2d(5, 7, 1, stride=(2, 3)).double()
    x = torch.randn(2, 5, 9, 11, dtype=torch.float64)
    expected = conv(x)
    (changed,) = to_channels_last(nn.Sequential(conv))
    assert changed is conv and type(conv) is SubsampledConv2d
    torch.testing.assert_close(conv(x), expected, rtol=1e-12, atol=1e-12)
    wide, padded = nn.Conv2d(16, 7, 1, stride=2), nn.Conv2d(5, 7, 1, stride=2, padding=1)
    assert all(type(m) is nn.Conv2d for m in to_channels_last(nn.Sequential(wide, padded)))
