"""Networks with mmsegmentation's names: their outputs equal those of its forward pass, written here on tensors by name.
The released files were not at hand: names, shapes and layout are those of its published code."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models import IMAGENET_RGB, get_segmentation_model
from models.outside import mmsegmentation, suggestion
from utils.errors import UserError

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}


class Forward:
    """mmsegmentation's forward pass of EncoderDecoder with ResNetV1c or ResNet, from a state dict alone."""

    def __init__(self, tensors: dict[str, Tensor], depth: int, aligned: bool) -> None:
        self.t, self.depth, self.aligned = tensors, depth, aligned

    def conv(self, x: Tensor, name: str, norm: str, stride: int = 1, dilation: int = 1) -> Tensor:
        weight = self.t[f"{name}.weight"]
        x = F.conv2d(x, weight, None, stride, dilation * (weight.shape[-1] // 2), dilation)
        return F.batch_norm(x, *(self.t[f"{norm}.{of}"] for of in ("running_mean", "running_var", "weight", "bias")))

    def module(self, x: Tensor, name: str, dilation: int = 1) -> Tensor:
        return self.conv(x, f"{name}.conv", f"{name}.bn", dilation=dilation).relu()

    def block(self, x: Tensor, at: str, stride: int, dilation: int) -> Tensor:
        if self.depth == 18:  # the second convolution is never dilated
            out = self.conv(x, f"{at}.conv1", f"{at}.bn1", stride, dilation).relu()
            out = self.conv(out, f"{at}.conv2", f"{at}.bn2")
        else:
            out = self.conv(x, f"{at}.conv1", f"{at}.bn1").relu()
            out = self.conv(out, f"{at}.conv2", f"{at}.bn2", stride, dilation).relu()
            out = self.conv(out, f"{at}.conv3", f"{at}.bn3")
        if f"{at}.downsample.0.weight" in self.t:
            x = self.conv(x, f"{at}.downsample.0", f"{at}.downsample.1", stride)
        return (out + x).relu()

    def backbone(self, x: Tensor) -> list[Tensor]:
        if "backbone.conv1.weight" in self.t:
            x = self.conv(x, "backbone.conv1", "backbone.bn1", 2).relu()
        else:
            for i, stride in ((0, 2), (3, 1), (6, 1)):
                x = self.conv(x, f"backbone.stem.{i}", f"backbone.stem.{i + 1}", stride).relu()
        maps, x = [], F.max_pool2d(x, 3, 2, 1)
        for i, (stride, first, later) in enumerate(((1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 4)), start=1):
            for j in range(BLOCKS[self.depth][i - 1]):
                x = self.block(x, f"backbone.layer{i}.{j}", stride if j == 0 else 1, first if j == 0 else later)
            maps.append(x)
        return maps

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits, auxiliary logits, what the classifier reads)."""
        *_, c3, c4 = self.backbone(x)
        head, size = "decode_head", c4.shape[2:]

        def up(small: Tensor) -> Tensor:
            return F.interpolate(small, size, mode="bilinear", align_corners=self.aligned)

        if f"{head}.image_pool.1.conv.weight" in self.t:
            parts = [up(self.module(c4.mean((2, 3), keepdim=True), f"{head}.image_pool.1"))]
            parts += [self.module(c4, f"{head}.aspp_modules.{i}", d) for i, d in enumerate((1, 12, 24, 36))]
        else:
            parts = [c4] + [up(self.module(F.adaptive_avg_pool2d(c4, bins), f"{head}.psp_modules.{i}.1"))
                            for i, bins in enumerate((1, 2, 3, 6))]
        feature = self.module(torch.cat(parts, 1), f"{head}.bottleneck")
        aux = self.module(c3, "auxiliary_head.convs.0")
        return (*(F.conv2d(y, self.t[f"{at}.conv_seg.weight"], self.t[f"{at}.conv_seg.bias"])
                  for y, at in ((feature, head), (aux, "auxiliary_head"))), feature)


def write_released(path, name: str) -> dict[str, Tensor]:
    """A file as mmsegmentation publishes it, with random numbers in a tenth of the width; its tensors."""
    torch.manual_seed(len(name))
    net = mmsegmentation.MMSegNet(mmsegmentation.parse(name), 5, aux=True)
    tensors = {}
    for key, value in net.state_dict().items():
        random = torch.randn_like(value, dtype=torch.float32)
        tensors[key] = value if value.dim() == 0 else random * (2 / value[0].numel()) ** 0.5 if value.dim() == 4 \
            else 1 + 0.1 * random.abs() if "running_var" in key or key.endswith("weight") else 0.1 * random
    torch.save({"meta": {"CLASSES": ("a", "b"), "PALETTE": [[1, 2, 3]]}, "state_dict": tensors}, path)
    return tensors


@pytest.mark.parametrize("name", ["deeplabv3_r50-d8", "deeplabv3_r18-d8_769x769_80k_cityscapes", "pspnet_r18-d8",
                                  "pspnet_r50b-d8"])
def test_the_forward_pass(name, tmp_path, monkeypatch):
    monkeypatch.setattr(mmsegmentation, "STEM", 8)
    tensors = write_released(tmp_path / "a.pth", name)
    net = get_segmentation_model(f"mmseg:{name}", "", 5, aux=True, pretrained=str(tmp_path / "a.pth")).eval()
    x = torch.rand(2, 3, 161, 200)
    out = net(x)
    wanted = Forward(tensors, 18 if "r18" in name else 50, aligned="769x769" in name)(x)
    for got, expected in zip((out.logits, out.aux, out.head), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert net.strides == {"logits": 8, "aux": 8, "c1": 4, "c2": 8, "c3": 8, "c4": 8, "head": 8}
    assert net.preprocess == IMAGENET_RGB and suggestion(tensors) == f"mmseg:{name.partition('_769')[0]}"
    without = get_segmentation_model(f"mmseg:{name}", "", 5, pretrained=str(tmp_path / "a.pth")).eval()
    assert torch.equal(without(x).logits, out.logits) and without(x).aux is None


def test_other_networks_say_where_the_file_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(mmsegmentation, "STEM", 8)
    tensors = write_released(tmp_path / "a.pth", "pspnet_r18-d8")
    with pytest.raises(UserError, match="a file of mmsegmentation, whose networks have another stem and head than "
                                        "psp-resnet18_w0.125: it goes to the model mmseg:pspnet_r18-d8"):
        get_segmentation_model("psp", "resnet18_w0.125", 5, pretrained=str(tmp_path / "a.pth"))
    torch.save({f"decode_head.{i}.weight": value for i, value in enumerate(tensors.values())}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="only DeepLabV3 and PSPNet over ResNets, and SegFormer, are read"):
        get_segmentation_model("psp", "resnet18_w0.125", 5, pretrained=str(tmp_path / "b.pth"))
    with pytest.raises(UserError, match="mmseg:deeplabv3_r101-d16-mg124: expected deeplabv3 or pspnet over r18"):
        get_segmentation_model("mmseg:deeplabv3_r101-d16-mg124", "", 5)


def test_released_shapes():
    """At full width, on the meta device."""
    with torch.device("meta"):
        net = mmsegmentation.MMSegNet(mmsegmentation.parse("deeplabv3_r50-d8"), 19, aux=True)
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    for key, shape in {"backbone.stem.0.weight": (32, 3, 3, 3), "backbone.stem.6.weight": (64, 32, 3, 3),
                       "backbone.layer1.0.downsample.0.weight": (256, 64, 1, 1),
                       "backbone.layer4.2.conv3.weight": (2048, 512, 1, 1),
                       "decode_head.image_pool.1.conv.weight": (512, 2048, 1, 1),
                       "decode_head.aspp_modules.3.conv.weight": (512, 2048, 3, 3),
                       "decode_head.bottleneck.conv.weight": (512, 2560, 3, 3),
                       "decode_head.conv_seg.weight": (19, 512, 1, 1),
                       "auxiliary_head.convs.0.conv.weight": (256, 1024, 3, 3)}.items():
        assert shapes[key] == shape
