"""The three heads: DeepLabV3 (atrous pyramid), PSPNet (pooling pyramid) and the fully convolutional auxiliary head.

Every head maps a backbone stage [B, C, h, w] to (logits [B, K, h, w], feature [B, ``channels``, h, w]), the feature
being what the classifier reads. Convolutions keep PyTorch's default initialization.
"""
from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import NormLayer, conv_norm_act

ASPP_RATES = (12, 24, 36)
PSP_BINS = (1, 2, 3, 6)


def resize(x: Tensor, size: torch.Size) -> Tensor:
    """Bilinear, corners aligned: the rule of the whole repository."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


class ASPP(nn.Module):
    """Atrous spatial pyramid: 1x1, three dilated 3x3, image pooling; concatenated and projected to ``c_out``.

    Train mode needs 2 images or more, because of the global mean."""

    def __init__(self, c_in: int, c_out: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.b0 = nn.Sequential(*conv_norm_act(c_in, c_out, 1, norm_layer))
        self.b1, self.b2, self.b3 = (
            nn.Sequential(OrderedDict(block=nn.Sequential(*conv_norm_act(c_in, c_out, 3, norm_layer, dilation=rate))))
            for rate in ASPP_RATES)
        pooling = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_norm_act(c_in, c_out, 1, norm_layer))
        self.b4 = nn.Sequential(OrderedDict(gap=pooling))
        self.project = nn.Sequential(*conv_norm_act(5 * c_out, c_out, 1, norm_layer), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, h, w] -> [B, c_out, h, w]."""
        branches = [branch(x) for branch in (self.b0, self.b1, self.b2, self.b3)]
        return self.project(torch.cat([*branches, resize(self.b4(x), x.shape[2:])], dim=1))


class DeepLabHead(nn.Module):
    """ASPP to ``channels``, a 3x3 block, the classifier (``block.4``)."""

    def __init__(self, c_in: int, channels: int, num_class: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.channels = channels
        self.aspp = ASPP(c_in, channels, norm_layer)
        self.block = nn.Sequential(*conv_norm_act(channels, channels, 3, norm_layer), nn.Dropout(0.1),
                                   nn.Conv2d(channels, num_class, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.block[:-1](self.aspp(x))
        return self.block[-1](feature), feature


class PyramidPooling(nn.Module):
    """The map beside four pooled versions of it (c_in // 4 channels each): ``c_out`` channels in total.

    Train mode needs 2 images or more, because of the 1x1 pool."""

    def __init__(self, c_in: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.c_out = c_in + len(PSP_BINS) * (c_in // 4)
        for i in range(1, len(PSP_BINS) + 1):
            self.add_module(f"conv{i}", nn.Sequential(*conv_norm_act(c_in, c_in // 4, 1, norm_layer)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, h, w] -> [B, c_out, h, w]."""
        convs = (self.conv1, self.conv2, self.conv3, self.conv4)
        pooled = [conv(F.adaptive_avg_pool2d(x, bins)) for conv, bins in zip(convs, PSP_BINS, strict=True)]
        return torch.cat([x, *(resize(part, x.shape[2:]) for part in pooled)], dim=1)


class PSPHead(nn.Module):
    """Pooling pyramid, a 3x3 block to ``channels``, the classifier."""

    def __init__(self, c_in: int, channels: int, num_class: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.channels = channels
        self.psp = PyramidPooling(c_in, norm_layer)
        self.block = nn.Sequential(*conv_norm_act(self.psp.c_out, channels, 3, norm_layer), nn.Dropout(0.1))
        self.classifier = nn.Conv2d(channels, num_class, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.block(self.psp(x))
        return self.classifier(feature), feature


class FCNHead(nn.Module):
    """A 3x3 block to a quarter of the channels and the classifier (``block.4``)."""

    def __init__(self, c_in: int, num_class: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.channels = c_in // 4
        self.block = nn.Sequential(*conv_norm_act(c_in, self.channels, 3, norm_layer), nn.Dropout(0.1),
                                   nn.Conv2d(self.channels, num_class, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.block[:-1](x)
        return self.block[-1](feature), feature
