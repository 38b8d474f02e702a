"""The one network class: a backbone, a head and, if wanted, an auxiliary head."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.backbone import Backbone
from models.output import SegOutput
from models.preprocess import CAFFE_BGR, Preprocess
from models.timm_backbone import is_timm
from utils.errors import UserError

MIN_SIDE = 8  # of an input image, in pixels


class SegmentationNet(nn.Module):
    """Backbone + head (+ auxiliary head), output at the stride of the backbone's last stage.

    Attributes
        name            "<model>-<backbone>", e.g. "deeplabv3-resnet18"; model and backbone are its two parts
        num_class       K
        in_channels     3, see :func:`add_input_channels`
        aux             True when there is an auxiliary head
        channels        {tap: channel count} of exactly the fields that ``forward`` fills, in their order
        strides         {tap: stride of its map}; output_stride: that of the logits
        head_width      channels of the main head when it is not the usual width of model and backbone, else None
        own             whether all parts are of this repository, so that they can be prepared for speed
        preprocess      what the weights expect of the input; weight files change it, see ``weights.py``
        trained_on      {"classes": names, ...} of the data that the weights were trained on (``dataset/fingerprint.py``
                        has the rest of it), None when that is not known

    Submodules are called as in the released checkpoints: ``pretrained`` (backbone), ``head``, ``auxlayer``."""

    def __init__(self, model: str, backbone_name: str, backbone: Backbone, head: nn.Module,
                 auxlayer: nn.Module | None, num_class: int) -> None:
        super().__init__()
        self.model, self.backbone, self.name = model, backbone_name, f"{model}-{backbone_name}"
        self.num_class, self.in_channels, self.aux = num_class, 3, auxlayer is not None
        self.preprocess: Preprocess = CAFFE_BGR
        self.trained_on: dict[str, Any] | None = None
        self.head_width: int | None = None
        self.pretrained, self.own = backbone, not is_timm(backbone_name)
        self.head = head
        if auxlayer is not None:
            self.auxlayer = auxlayer
        stages = {f"c{i}": c for i, c in enumerate(backbone.channels, start=1)}
        self.channels: dict[str, int] = {
            "logits": num_class, **({"aux": num_class} if self.aux else {}), **stages, "head": head.channels}
        self.output_stride = backbone.strides[3]
        own = {"aux": backbone.strides[2], **{f"c{i}": stride for i, stride in enumerate(backbone.strides, start=1)}}
        self.strides: dict[str, int] = {tap: own.get(tap, self.output_stride) for tap in self.channels}

    @property
    def backbone_prefix(self) -> str:
        """What stands before the names of a plain ImageNet backbone file in this network's state_dict."""
        return "pretrained." + self.pretrained.key_prefix

    @property
    def backbone_names(self) -> tuple[str, ...]:
        """What the names of the backbone's tensors start with in this network's state_dict."""
        return (self.backbone_prefix,)

    @property
    def optional(self) -> tuple[str, ...]:
        """What the names of tensors start with that a weight file of this network may hold in vain."""
        return () if self.aux else ("auxlayer.",)

    def forward(self, x: Tensor) -> SegOutput:
        """x: float [B, in_channels, H, W], H and W at least 8; UserError for another shape or an integer type."""
        if x.dim() != 4 or x.shape[1] != self.in_channels or min(x.shape[2:]) < MIN_SIDE or not x.is_floating_point():
            raise UserError(f"{self.name} expects a float image batch [B, {self.in_channels}, H, W] with H and W "
                            f"of at least {MIN_SIDE}, got {x.dtype} {list(x.shape)}")
        c1, c2, c3, c4 = self.pretrained(x)
        logits, feature = self.head(c4)
        return SegOutput(logits, self.auxlayer(c3)[0] if self.aux else None, c1, c2, c3, c4, feature)


def add_input_channels(net: SegmentationNet, count: int) -> SegmentationNet:
    """Give a network ``count`` more input channels, in place: new random weights in its first convolution.

    The weights of the other channels stay, so zeros in the new ones leave the output as it was. Returns the network."""
    stem = next(m for m in net.pretrained.modules() if isinstance(m, nn.Conv2d))
    new = torch.empty_like(stem.weight[:, :1]).repeat(1, count, 1, 1)
    nn.init.kaiming_normal_(new, mode="fan_out", nonlinearity="relu")
    stem.weight = nn.Parameter(torch.cat([stem.weight.detach(), new], dim=1))
    stem.in_channels += count
    net.in_channels += count
    return net
