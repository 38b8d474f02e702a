"""ESPNet (Mehta et al., ECCV 2018), written from the paper: an example of a network from outside this repository.

    python eval.py --model module:examples.espnet:camvid --pretrained decoder_espnet_p_2_q_8_camvid.pth \\
        --dataset camvid --data data/CamVid --split test

The names of the parts are those of the authors' released weights (MIT license), which load strictly.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import Preprocess

#: dilations of the parallel branches of an ESP module (section 3.1 of the paper)
DILATIONS = (1, 2, 4, 8, 16)


class Norm(nn.Module):
    """Batch norm and PReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(channels, eps=1e-3), nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(x))


class Conv(nn.Module):
    """A convolution that keeps the size up to the stride; with ``norm``, batch norm and PReLU behind it."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, dilation: int = 1,
                 norm: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, dilation * (kernel // 2), dilation, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3) if norm else nn.Identity()
        self.act = nn.PReLU(c_out) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Pyramid(nn.Module):
    """Reduce, split into dilated branches, and merge with hierarchical feature fusion (equation 1, figure 1)."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int) -> None:
        super().__init__()
        narrow = c_out // len(DILATIONS)
        self.c1 = Conv(c_in, narrow, kernel, stride)
        for dilation in DILATIONS:
            wide = c_out - (len(DILATIONS) - 1) * narrow if dilation == 1 else narrow
            self.add_module(f"d{dilation}", Conv(narrow, wide, 3, dilation=dilation))

    def fused(self, x: Tensor) -> Tensor:
        """The branches, from the second on each with the sum of those before it."""
        reduced = self.c1(x)
        first, *others = (getattr(self, f"d{dilation}")(reduced) for dilation in DILATIONS)
        sums = [others[0]]
        for branch in others[1:]:
            sums.append(sums[-1] + branch)
        return torch.cat([first, *sums], dim=1)


class Downsampler(Pyramid):
    """An ESP module of stride 2."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(c_in, c_out, 3, 2)
        self.bn, self.act = nn.BatchNorm2d(c_out, eps=1e-3), nn.PReLU(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.fused(x)))


class ESP(Pyramid):
    """An ESP module; ``residual``: with its input added."""

    def __init__(self, c_in: int, c_out: int, residual: bool = True) -> None:
        super().__init__(c_in, c_out, 1, 1)
        self.bn, self.residual = Norm(c_out), residual

    def forward(self, x: Tensor) -> Tensor:
        fused = self.fused(x)
        return self.bn(x + fused if self.residual else fused)


class Encoder(nn.Module):
    """ESPNet-C (figure 4c). p, q: ESP modules at strides 4 and 8."""

    def __init__(self, num_class: int, p: int, q: int) -> None:
        super().__init__()
        self.level1, self.b1 = Conv(3, 16, 3, 2, norm=True), Norm(16 + 3)
        self.level2_0, self.level2 = Downsampler(16 + 3, 64), nn.Sequential(*(ESP(64, 64) for _ in range(p)))
        self.b2 = Norm(128 + 3)
        self.level3_0, self.level3 = Downsampler(128 + 3, 128), nn.Sequential(*(ESP(128, 128) for _ in range(q)))
        self.b3, self.classifier = Norm(256), Conv(256, num_class, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The maps at strides 2, 4 and 8, each with the shrunken image or its own first map beside it."""
        half = F.avg_pool2d(x, 3, stride=2, padding=1)
        quarter = F.avg_pool2d(half, 3, stride=2, padding=1)
        first = self.b1(torch.cat([self.level1(x), half], dim=1))
        down = self.level2_0(first)
        second = self.b2(torch.cat([self.level2(down), down, quarter], dim=1))
        down = self.level3_0(second)
        return first, second, self.b3(torch.cat([down, self.level3(down)], dim=1))


class ESPNet(nn.Module):
    """ESPNet (figure 4d): the encoder and a light decoder. The last class of ``num_class`` scores, the pixels without a
    label, is left out of the output [B, num_class - 1, H, W]. H and W must divide by 8."""

    taps = {"c1": "encoder.b1", "c2": "encoder.b2", "c4": "encoder.b3", "head": "conv"}
    multiple = 8

    def __init__(self, num_class: int, p: int = 2, q: int = 8, preprocess: Preprocess | None = None) -> None:
        super().__init__()
        if preprocess is not None:
            self.preprocess = preprocess
        self.encoder = Encoder(num_class, p, q)
        self.level3_C, self.br = Conv(128 + 3, num_class, 1), nn.BatchNorm2d(num_class, eps=1e-3)
        self.conv = Conv(19 + num_class, num_class, 3, norm=True)
        self.up_l3 = nn.Sequential(nn.ConvTranspose2d(num_class, num_class, 2, stride=2, bias=False))
        self.combine_l2_l3 = nn.Sequential(Norm(2 * num_class), ESP(2 * num_class, num_class, residual=False))
        self.up_l2 = nn.Sequential(nn.ConvTranspose2d(num_class, num_class, 2, stride=2, bias=False), Norm(num_class))
        self.classifier = nn.ConvTranspose2d(num_class, num_class, 2, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """float [B, 3, H, W] -> class scores [B, num_class - 1, H, W]."""
        first, second, third = self.encoder(x)
        third = self.up_l3(self.br(self.encoder.classifier(third)))
        merged = self.up_l2(self.combine_l2_l3(torch.cat([self.level3_C(second), third], dim=1)))
        return self.classifier(self.conv(torch.cat([merged, first], dim=1)))[:, :-1]


#: mean and standard deviation of the 367 training images of CamVid, blue green red, and the division by 255 after them
#: that these weights were trained with
CAMVID = Preprocess("bgr", (110.33, 108.41, 105.03), tuple(255 * std for std in (78.34, 79.46, 78.30)), 1.0)


def camvid() -> ESPNet:
    """The network of ``decoder_espnet_p_2_q_8_camvid.pth``: CamVid's 11 classes and those without a label."""
    return ESPNet(12, preprocess=CAMVID)
