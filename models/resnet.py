"""ResNets at output stride 8, with the deep stem (three 3x3 convolutions) or the plain one (one 7x7).

Stages 3 and 4 keep stride 1 and are dilated by 2 and 4 instead. The first block of a dilated stage starts with half
the dilation (1 and 2): in a bottleneck block that is its only 3x3 convolution, in a basic block the first of two.
Parameter names are those of torchvision, plus conv2/bn2/conv3/bn3 of the deep stem.

``resnet18_original`` is a ResNet-18 here. The reference builds a ResNet-50 under that name, so its files of that name
are to be loaded as ``resnet50_original``.
"""
from __future__ import annotations

from torch import Tensor, nn

from models.backbone import Backbone, NormLayer, Stages, scaled


def conv3x3(c_in: int, c_out: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """3x3 convolution without bias that keeps the size (up to the stride)."""
    return nn.Conv2d(c_in, c_out, 3, stride, padding=dilation, dilation=dilation, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut. ``first_dilation`` belongs to conv1, ``dilation`` to conv2."""

    expansion = 1

    def __init__(self, c_in: int, planes: int, stride: int, first_dilation: int, dilation: int,
                 downsample: nn.Module | None, norm_layer: NormLayer) -> None:
        super().__init__()
        self.conv1 = conv3x3(c_in, planes, stride, first_dilation)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes, 1, dilation)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, h, w] -> [B, planes, h/stride, w/stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 (stride and dilation), 1x1 convolutions and a shortcut; the full ``dilation`` is not used here."""

    expansion = 4

    def __init__(self, c_in: int, planes: int, stride: int, first_dilation: int, dilation: int,
                 downsample: nn.Module | None, norm_layer: NormLayer) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, planes, 1, bias=False)
        self.bn1 = norm_layer(planes)
        self.conv2 = conv3x3(planes, planes, stride, first_dilation)
        self.bn2 = norm_layer(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, h, w] -> [B, 4 * planes, h/stride, w/stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + shortcut)


Block = type[BasicBlock] | type[Bottleneck]
#: depth -> block class and blocks per stage
DEPTHS: dict[int, tuple[Block, tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)), 50: (Bottleneck, (3, 4, 6, 3)), 101: (Bottleneck, (3, 4, 23, 3))}


class ResNet(Backbone):
    """Dilated ResNet. depth: 18, 50 or 101; deep_stem: 3x3 stem; width: factor on every channel count."""

    def __init__(self, depth: int, deep_stem: bool = True, width: float = 1.0,
                 norm_layer: NormLayer = nn.BatchNorm2d) -> None:
        block, counts = DEPTHS[depth]
        planes = [scaled(c, width) for c in (64, 128, 256, 512)]
        super().__init__(tuple(p * block.expansion for p in planes))
        self.deep_stem = deep_stem
        base = scaled(64, width)
        c_in = scaled(128, width) if deep_stem else base
        stem = ([conv3x3(3, base, stride=2), conv3x3(base, base), conv3x3(base, c_in)] if deep_stem else
                [nn.Conv2d(3, base, 7, 2, padding=3, bias=False)])
        for i, conv in enumerate(stem, start=1):
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", norm_layer(conv.out_channels))
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        for i, (stride, dilation) in enumerate(((1, 1), (2, 1), (1, 2), (1, 4))):
            stage = _make_stage(block, c_in, planes[i], counts[i], stride, dilation, norm_layer)
            self.add_module(f"layer{i + 1}", stage)
            c_in = self.channels[i]
        self.init_weights()

    def forward(self, x: Tensor) -> Stages:
        x = self.relu(self.bn1(self.conv1(x)))
        if self.deep_stem:
            x = self.relu(self.bn2(self.conv2(x)))
            x = self.relu(self.bn3(self.conv3(x)))
        c1 = self.layer1(self.maxpool(x))
        c2 = self.layer2(c1)
        c3 = self.layer3(c2)
        return c1, c2, c3, self.layer4(c3)


def _make_stage(block: Block, c_in: int, planes: int, count: int, stride: int, dilation: int,
                norm_layer: NormLayer) -> nn.Sequential:
    c_out, shortcut = planes * block.expansion, None
    if stride != 1 or c_in != c_out:
        shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), norm_layer(c_out))
    first = block(c_in, planes, stride, max(1, dilation // 2), dilation, shortcut, norm_layer)
    return nn.Sequential(first, *(block(c_out, planes, 1, dilation, dilation, None, norm_layer)
                                  for _ in range(count - 1)))
