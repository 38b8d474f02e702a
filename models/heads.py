"""The three heads: DeepLabV3 (atrous pyramid), PSPNet (pooling pyramid) and the fully convolutional auxiliary head.

Every head maps a backbone stage [B, C, h, w] to (logits [B, K, h, w], feature [B, C', h, w]); the feature is what the
classifier reads. Convolutions keep PyTorch's default initialization. Dropout goes through ``nn.Dropout`` modules.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import NormLayer, conv_norm_act

ASPP_RATES = (12, 24, 36)
PSP_BINS = (1, 2, 3, 6)


def resize(x: Tensor, size: torch.Size) -> Tensor:
    """Bilinear, corners aligned: the rule of the whole repository."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


class ASPPConv(nn.Module):
    """One dilated 3x3 branch."""

    def __init__(self, c_in: int, c_out: int, rate: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.block = nn.Sequential(*conv_norm_act(c_in, c_out, 3, norm_layer, dilation=rate))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class ASPPPooling(nn.Module):
    """Image-level branch: global mean, 1x1 convolution, spread over the map. Train mode needs 2 images or more."""

    def __init__(self, c_in: int, c_out: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.gap = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_norm_act(c_in, c_out, 1, norm_layer))

    def forward(self, x: Tensor) -> Tensor:
        return resize(self.gap(x), x.shape[2:])


class ASPP(nn.Module):
    """Atrous spatial pyramid: 1x1, three dilated 3x3, image pooling; concatenated and projected to ``c_out``."""

    def __init__(self, c_in: int, c_out: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.b0 = nn.Sequential(*conv_norm_act(c_in, c_out, 1, norm_layer))
        self.b1, self.b2, self.b3 = (ASPPConv(c_in, c_out, rate, norm_layer) for rate in ASPP_RATES)
        self.b4 = ASPPPooling(c_in, c_out, norm_layer)
        self.project = nn.Sequential(*conv_norm_act(5 * c_out, c_out, 1, norm_layer), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, h, w] -> [B, c_out, h, w]."""
        return self.project(torch.cat([branch(x) for branch in (self.b0, self.b1, self.b2, self.b3, self.b4)], dim=1))


class DeepLabHead(nn.Module):
    """ASPP to ``channels``, a 3x3 block, the classifier (``block.4``)."""

    def __init__(self, c_in: int, channels: int, num_class: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.channels = channels
        self.aspp = ASPP(c_in, channels, norm_layer)
        self.block = nn.Sequential(*conv_norm_act(channels, channels, 3, norm_layer), nn.Dropout(0.1),
                                   nn.Conv2d(channels, num_class, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, c_in, h, w] -> logits [B, K, h, w], feature [B, channels, h, w]."""
        feature = self.block[:-1](self.aspp(x))
        return self.block[-1](feature), feature


class PyramidPooling(nn.Module):
    """The map beside four pooled versions of it (c_in/4 channels each), 2 * c_in channels in total for c_in % 4 == 0.

    Train mode needs 2 images or more, because of the 1x1 pool.
    """

    def __init__(self, c_in: int, norm_layer: NormLayer) -> None:
        super().__init__()
        width = c_in // 4
        self.c_out = c_in + len(PSP_BINS) * width
        for i in range(1, len(PSP_BINS) + 1):
            self.add_module(f"conv{i}", nn.Sequential(*conv_norm_act(c_in, width, 1, norm_layer)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, h, w] -> [B, c_out, h, w]."""
        convs = (self.conv1, self.conv2, self.conv3, self.conv4)
        pooled = [resize(conv(F.adaptive_avg_pool2d(x, bins)), x.shape[2:])
                  for conv, bins in zip(convs, PSP_BINS, strict=True)]
        return torch.cat([x, *pooled], dim=1)


class PSPHead(nn.Module):
    """Pooling pyramid, a 3x3 block to ``channels``, the classifier."""

    def __init__(self, c_in: int, channels: int, num_class: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.channels = channels
        self.psp = PyramidPooling(c_in, norm_layer)
        self.block = nn.Sequential(*conv_norm_act(self.psp.c_out, channels, 3, norm_layer), nn.Dropout(0.1))
        self.classifier = nn.Conv2d(channels, num_class, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, c_in, h, w] -> logits [B, K, h, w], feature [B, channels, h, w]."""
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
        """[B, c_in, h, w] -> logits [B, K, h, w], feature [B, c_in/4, h, w]."""
        feature = self.block[:-1](x)
        return self.block[-1](feature), feature
