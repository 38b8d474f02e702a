"""What every convolutional backbone of this folder shares: width scaling, the convolution block, initialization."""
from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

NormLayer = Callable[[int], nn.Module]  # a batch-norm class or factory: called with the channel count
Stages = tuple[Tensor, Tensor, Tensor, Tensor]  # c1..c4 of ``SegOutput``


def scaled(channels: int, width: float) -> int:
    """A channel count times ``width``, rounded as in the MobileNet papers: to a multiple of 8, at least 8 and never
    more than 10 % below. Width 1 leaves every count as it is."""
    if width == 1.0:
        return channels
    exact = channels * width
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * exact else rounded + 8


def conv_norm_act(c_in: int, c_out: int, kernel: int, norm_layer: NormLayer, *, stride: int = 1, dilation: int = 1,
                  groups: int = 1, act: type[nn.Module] = nn.ReLU) -> list[nn.Module]:
    """Convolution without bias that keeps the size (up to the stride), norm, activation: three entries of a list."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, dilation * (kernel // 2), dilation, groups, bias=False)
    return [conv, norm_layer(c_out), act(inplace=True)]


class Backbone(nn.Module):
    """A feature extractor.

    channels: channel counts of c1..c4. key_prefix: what the tensor names of this module's state_dict start with, and
    those of an ImageNet file do not ('' or 'net.'). strides: of c1..c4."""

    key_prefix: str = ""
    strides: tuple[int, int, int, int] = (4, 8, 8, 8)

    def __init__(self, channels: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.channels = channels

    def init_weights(self) -> None:
        """He initialization (normal, fan out) of the convolutions; norms start as identity."""
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Stages:
        """[B, 3, H, W] -> c1 [B, C1, H/4, W/4], c2, c3, c4 [B, Ci, H/8, W/8] (sides rounded up)."""
        raise NotImplementedError
