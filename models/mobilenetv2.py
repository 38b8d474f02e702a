"""MobileNetV2 at output stride 8, without its last 1x1 block.

The last two strides are removed; the stages behind them are dilated by 2 and 4, their first block by half of that,
as in the ResNets. Parameter names are ``net.features.<block>.conv.<index>.*``, flat inside a block (the older
torchvision layout; ``weights.py`` translates the newer one).
"""
from __future__ import annotations

from torch import Tensor, nn

from models.backbone import Backbone, NormLayer, Stages, conv_norm_act, scaled

#: expansion, channels, blocks, stride in the original network, dilation at output stride 8
SETTINGS = ((1, 16, 1, 1, 1), (6, 24, 2, 2, 1), (6, 32, 3, 2, 1), (6, 64, 4, 2, 2), (6, 96, 3, 1, 2), (6, 160, 3, 2, 4),
            (6, 320, 1, 1, 4))
#: index of the last block of c1 (stride 4), c2, c3, c4 (stride 8)
TAPS = (3, 6, 13, 17)


class InvertedResidual(nn.Module):
    """1x1 expansion (unless 1), 3x3 depthwise, linear 1x1 projection; a shortcut where the shape allows it."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int, dilation: int, shortcut: bool,
                 norm_layer: NormLayer) -> None:
        super().__init__()
        hidden = c_in * expansion
        layers = conv_norm_act(c_in, hidden, 1, norm_layer, act=nn.ReLU6) if expansion != 1 else []
        layers += conv_norm_act(hidden, hidden, 3, norm_layer, stride=stride, dilation=dilation, groups=hidden,
                                act=nn.ReLU6)
        self.conv = nn.Sequential(*layers, nn.Conv2d(hidden, c_out, 1, bias=False), norm_layer(c_out))
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, h, w] -> [B, c_out, h/stride, w/stride]."""
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(Backbone):
    """Dilated MobileNetV2; width: factor on every channel count."""

    key_prefix = "net."

    def __init__(self, width: float = 1.0, norm_layer: NormLayer = nn.BatchNorm2d) -> None:
        c_in = scaled(32, width)
        features: list[nn.Module] = [nn.Sequential(*conv_norm_act(3, c_in, 3, norm_layer, stride=2, act=nn.ReLU6))]
        channels = [c_in]
        for expansion, base, count, stride, dilation in SETTINGS:
            c_out = scaled(base, width)
            for i in range(count):
                # the shortcut follows the original strides, so that the removed ones do not add any
                shortcut = c_in == c_out and (i > 0 or stride == 1)
                starts = i == 0 and stride == 2 and dilation > 1
                step = stride if i == 0 and dilation == 1 else 1
                features.append(InvertedResidual(c_in, c_out, step, expansion, dilation // 2 if starts else dilation,
                                                 shortcut, norm_layer))
                c_in = c_out
                channels.append(c_out)
        super().__init__(tuple(channels[i] for i in TAPS))
        self.net = nn.Module()
        self.net.features = nn.Sequential(*features)
        self.init_weights()

    def forward(self, x: Tensor) -> Stages:
        stages = []
        for i, block in enumerate(self.net.features):
            x = block(x)
            if i in TAPS:
                stages.append(x)
        return tuple(stages)
