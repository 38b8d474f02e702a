"""torchvision's networks and weight names. Everything else of the repository works without torchvision."""
from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch

from models import CAFFE_BGR, IMAGENET_RGB, get_segmentation_model, load_weights
from models.torchvision_compat import import_torchvision
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def torchvision():
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    return import_torchvision()


@torch.no_grad()
@pytest.mark.parametrize(("backbone", "name"), [("resnet18_original", "resnet18"), ("mobilenetv2", "mobilenet_v2")])
def test_features_equal_torchvision(tmp_path, torchvision, backbone, name):
    """torchvision's weights in our networks compute what they compute in torchvision's, up to stride 8."""
    torch.manual_seed(0)
    reference = getattr(torchvision.models, name)(weights=None).eval()
    for value in reference.state_dict().values():
        if value.is_floating_point() and value.dim() == 1:
            value.uniform_(0.5, 1.5)  # norms: statistics that matter
    path = tmp_path / f"{name}.pth"
    torch.save(reference.state_dict(), path)
    net = get_segmentation_model("psp_mobile" if "mobile" in name else "psp", backbone, pretrained_base=path).eval()
    assert net.preprocess == IMAGENET_RGB
    x = torch.randn(1, 3, 57, 64)
    if "mobile" in name:
        want = reference.features[:7](x)
    else:
        r = reference
        want = r.layer2(r.layer1(r.maxpool(r.relu(r.bn1(r.conv1(x))))))
    torch.testing.assert_close(net(x).c2, want, rtol=0, atol=1e-5 * float(want.abs().max()))


@torch.no_grad()
def test_dilated_resnet50_equals_torchvision(torchvision):
    """Our dilation grid is the one that torchvision makes of the same weights when it replaces strides."""
    torch.manual_seed(0)
    reference = torchvision.models.resnet50(weights=None, replace_stride_with_dilation=[False, True, True]).eval()
    net = get_segmentation_model("psp", "resnet50_original").eval()
    net.pretrained.load_state_dict({k: v for k, v in reference.state_dict().items() if not k.startswith("fc.")})
    x = torch.randn(1, 3, 49, 56)
    r = reference
    want = r.layer4(r.layer3(r.layer2(r.layer1(r.maxpool(r.relu(r.bn1(r.conv1(x))))))))
    got = net(x).c4
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_weight_names_are_downloaded_by_torchvision(torchvision, monkeypatch):
    asked = {}

    def fake(self, **kwargs):
        asked.update(kwargs, name=str(self))
        torch.manual_seed(1)
        return torchvision.models.resnet18(weights=None).state_dict()

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", fake)
    net = get_segmentation_model("psp", "resnet18_original",
                                 pretrained_base="torchvision:ResNet18_Weights.IMAGENET1K_V1")
    assert asked["name"] == "ResNet18_Weights.IMAGENET1K_V1"
    assert asked["weights_only"] is True and asked["check_hash"] is True
    torch.manual_seed(1)
    want = torchvision.models.resnet18(weights=None)
    assert torch.equal(net.pretrained.layer4[1].conv2.weight, want.layer4[1].conv2.weight)
    assert net.preprocess == IMAGENET_RGB
    load_weights(net, "torchvision:ResNet18_Weights.IMAGENET1K_V1", "backbone", preprocess="bgr")
    assert net.preprocess == CAFFE_BGR


def test_no_network(torchvision, monkeypatch):
    def unreachable(self, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr(torchvision.models.ResNet50_Weights, "get_state_dict", unreachable)
    with pytest.raises(UserError, match="torchvision:ResNet50_Weights.IMAGENET1K_V2: download from https.*not known"):
        get_segmentation_model("psp", "resnet50_original_w0.125",
                               pretrained_base="torchvision:ResNet50_Weights.IMAGENET1K_V2")


@pytest.mark.parametrize("name", ["ResNet50_Weights.NOPE", "Nope_Weights.DEFAULT", "", "resnet50"])
def test_unknown_weight_names(torchvision, name):
    with pytest.raises(UserError, match=f"torchvision:{name}: torchvision knows no such weights"):
        get_segmentation_model("psp", "resnet18_original_w0.125", pretrained_base=f"torchvision:{name}")


def test_torchvision_that_is_not_installed(monkeypatch):
    def no_torchvision(name, *args, **kwargs):
        raise ModuleNotFoundError("No module named 'torchvision'")

    monkeypatch.setattr(importlib, "import_module", no_torchvision)
    with pytest.raises(UserError, match="torchvision is needed here.*No module named"):
        import_torchvision()


def test_networks_build_without_torchvision():
    """In a fresh interpreter: nothing imports torchvision before it is asked for."""
    code = ("import sys; sys.modules['torchvision'] = None; import models; "
            "models.get_segmentation_model('psp', 'resnet18_w0.125')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
