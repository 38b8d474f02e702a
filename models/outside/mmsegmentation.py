"""The DeepLabV3 and PSPNet of mmsegmentation, written anew with its names, so that its files load strictly. Its
SegFormer: ``segformer.py``.

They are not networks of ``models/registry.py``: the three convolutions of their stem have 32, 32 and 64 channels (ours
64, 64 and 128), what follows the pyramid is one 3x3 convolution (ours has a 1x1 before it), the second convolution of
their basic blocks is not dilated, and they were trained on maps resized without aligned corners, but for the files with
769x769 in their name.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.resnet import DEPTHS, BasicBlock, Block
from utils.errors import UserError

#: the beginning of a released file's name; b: one 7x7 convolution as the stem
NAME = re.compile(r"(?P<head>deeplabv3|pspnet)_r(?P<depth>18|50|101)(?P<plain>b?)-d8(?P<more>_.+)?")
CLASSIFIER = "decode_head.conv_seg.weight"
STEM = 64  # channels that the stem ends with
STRIDES, DILATIONS = (1, 2, 1, 1), (1, 1, 2, 4)  # of the stages
ASPP_RATES, PSP_BINS = (1, 12, 24, 36), (1, 2, 3, 6)


class Config(NamedTuple):
    """What a name says. aligned: whether maps are resized with aligned corners."""

    head: str
    depth: int
    plain: bool
    aligned: bool


def parse(name: str) -> Config:
    """UserError for a name that is not of these networks."""
    match = NAME.fullmatch(name)
    if match is None:
        raise UserError(f"mmseg:{name}: expected deeplabv3 or pspnet over r18, r50, r101 or r18b, r50b, r101b, as in "
                        "mmseg:deeplabv3_r50-d8, or segformer_mit-b0 ... b5, or so much of a released file's name")
    return Config(match["head"], int(match["depth"]), bool(match["plain"]), "769x769" in (match["more"] or ""))


class ConvModule(nn.Module):
    """Convolution that keeps the size, norm, ReLU, under mmcv's names."""

    def __init__(self, c_in: int, c_out: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=False)
        self.bn = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Backbone(nn.Module):
    """ResNetV1c, or with ``plain`` the usual one."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, half = STEM, STEM // 2
        if config.plain:
            self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        else:
            sizes = ((3, half, 2), (half, half, 1), (half, width, 1))
            self.stem = nn.Sequential(*(layer for c_in, c_out, stride in sizes for layer in (
                nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))))
        block, counts = DEPTHS[config.depth]
        c_in = width
        self.channels: list[int] = []
        for i, count in enumerate(counts):
            stage = _stage(block, c_in, width << i, count, STRIDES[i], DILATIONS[i])
            self.add_module(f"layer{i + 1}", stage)
            c_in = (width << i) * block.expansion
            self.channels.append(c_in)

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> the maps of the four stages."""
        x = F.relu(self.bn1(self.conv1(x))) if hasattr(self, "conv1") else self.stem(x)
        maps = [F.max_pool2d(x, 3, 2, 1)]
        for i in range(1, 5):
            maps.append(getattr(self, f"layer{i}")(maps[-1]))
        return maps[1:]


def _stage(block: Block, c_in: int, planes: int, count: int, stride: int, dilation: int) -> nn.Sequential:
    """The first block of a dilated stage has half its dilation; in a basic block, the second convolution has none."""
    c_out, shortcut = planes * block.expansion, None
    if stride != 1 or c_in != c_out:
        shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
    make = partial(block, planes=planes, norm_layer=nn.BatchNorm2d)
    second = 1 if block is BasicBlock else dilation
    first = make(c_in, stride=stride, first_dilation=max(1, dilation // 2), dilation=second, downsample=shortcut)
    return nn.Sequential(first, *(make(c_out, stride=1, first_dilation=dilation, dilation=second, downsample=None)
                                  for _ in range(count - 1)))


class Head(nn.Module):
    """What the heads share: the last 3x3 convolution and the classifier."""

    def __init__(self, c_in: int, width: int, num_class: int, aligned: bool) -> None:
        super().__init__()
        self.bottleneck, self.conv_seg = ConvModule(c_in, width, 3), nn.Conv2d(width, num_class, 1)
        self.aligned = aligned

    def classify(self, x: Tensor) -> Tensor:
        return self.conv_seg(F.dropout2d(self.bottleneck(x), 0.1, self.training))

    def resize(self, x: Tensor, size: torch.Size) -> Tensor:
        return F.interpolate(x, size, mode="bilinear", align_corners=self.aligned)


class AsppHead(Head):
    """DeepLabV3's: the pooled image first, then the four branches."""

    def __init__(self, c_in: int, width: int, num_class: int, aligned: bool) -> None:
        super().__init__(5 * width, width, num_class, aligned)
        self.image_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), ConvModule(c_in, width, 1))
        self.aspp_modules = nn.ModuleList(ConvModule(c_in, width, 1 if d == 1 else 3, d) for d in ASPP_RATES)

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, h, w] -> [B, num_class, h, w]."""
        pooled = self.resize(self.image_pool(x), x.shape[2:])
        return self.classify(torch.cat([pooled, *(branch(x) for branch in self.aspp_modules)], dim=1))


class PspHead(Head):
    """PSPNet's: the map first, then its pooled versions."""

    def __init__(self, c_in: int, width: int, num_class: int, aligned: bool) -> None:
        super().__init__(c_in + len(PSP_BINS) * width, width, num_class, aligned)
        self.psp_modules = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(b), ConvModule(c_in, width, 1))
                                         for b in PSP_BINS)

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, h, w] -> [B, num_class, h, w]."""
        pooled = [self.resize(module(x), x.shape[2:]) for module in self.psp_modules]
        return self.classify(torch.cat([x, *pooled], dim=1))


class AuxiliaryHead(nn.Module):
    """A 3x3 convolution and the classifier."""

    def __init__(self, c_in: int, width: int, num_class: int) -> None:
        super().__init__()
        self.convs, self.conv_seg = nn.Sequential(ConvModule(c_in, width, 3)), nn.Conv2d(width, num_class, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_seg(F.dropout2d(self.convs(x), 0.1, self.training))


class MMSegNet(nn.Module):
    """[B, 3, H, W] -> logits [B, num_class, H/8, W/8], sides rounded up, with aux {"out": these, "aux": the same of the
    auxiliary head}."""

    def __init__(self, config: Config, num_class: int, aux: bool) -> None:
        super().__init__()
        self.backbone = Backbone(config)
        c3, c4 = self.backbone.channels[2:]
        head = AsppHead if config.head == "deeplabv3" else PspHead
        self.decode_head = head(c4, c4 // 4, num_class, config.aligned)
        if aux:
            self.auxiliary_head = AuxiliaryHead(c3, c3 // 4, num_class)

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        maps = self.backbone(x)
        logits = self.decode_head(maps[3])
        return {"out": logits, "aux": self.auxiliary_head(maps[2])} if hasattr(self, "auxiliary_head") else logits


def taps(aux: bool) -> dict[str, str]:
    """Where the maps are, as ``taps.py`` spells it."""
    found = {f"c{i}": f"backbone.layer{i}" for i in range(1, 5)} | {"head": "decode_head.bottleneck"}
    return found | ({"aux": "auxiliary_head"} if aux else {})


def suggestion(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the network that an mmsegmentation file looks like, '' where it is none of these; None when it is
    no file of mmsegmentation."""
    if not any(name.startswith("decode_head.") for name in tensors):
        return None
    heads = {"decode_head.aspp_modules.0.conv.weight": "deeplabv3", "decode_head.psp_modules.0.1.conv.weight": "pspnet"}
    head = next((head for key, head in heads.items() if key in tensors), None)
    depth = (101 if "backbone.layer3.22.conv1.weight" in tensors else 50 if "backbone.layer3.5.conv1.weight" in tensors
             else 18)
    plain = "backbone.conv1.weight" in tensors
    if head is None or not plain and "backbone.stem.0.weight" not in tensors:
        return ""
    return f"mmseg:{head}_r{depth}{'b' if plain else ''}-d8"
