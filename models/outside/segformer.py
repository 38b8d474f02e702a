"""SegFormer (Xie et al. 2021) as mmsegmentation has it, written anew with its names, so that its files load strictly.

It is not the SegFormer of its authors, nor that of transformers: every scale passes a norm and a ReLU before the scales
are joined, the finest scale comes first, the head is 256 channels wide over every backbone, and all norms of the
backbone add 1e-6.
"""
from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.outside.mmsegmentation import ConvModule

#: the beginning of a released file's name
NAME = re.compile(r"segformer_mit-b(?P<size>[0-5])(_.+)?")
HEADS, REDUCTIONS = (1, 2, 5, 8), (8, 4, 2, 1)  # of the stages: heads of attention, shrinking of keys and values
EXPANSION, HEAD_WIDTH, DROPPED = 4, 256, 0.1
Norm = partial(nn.LayerNorm, eps=1e-6)


class Size(NamedTuple):
    """A Mix Transformer. width: channels per head of attention; depths: blocks of each stage."""

    width: int
    depths: tuple[int, int, int, int]


SIZES = (Size(32, (2, 2, 2, 2)), Size(64, (2, 2, 2, 2)), Size(64, (3, 4, 6, 3)), Size(64, (3, 4, 18, 3)),
         Size(64, (3, 8, 27, 3)), Size(64, (3, 6, 40, 3)))


def size_of(name: str) -> Size | None:
    """Of segformer_mit-b0 ... b5, and of what begins so; None for another name."""
    match = NAME.fullmatch(name)
    return SIZES[int(match["size"])] if match else None


def shares(size: Size) -> list[float]:
    """Of images that a block leaves out in training, for every block: from 0 to DROPPED."""
    count = sum(size.depths)
    return [DROPPED * i / (count - 1) for i in range(count)]


def start(module: nn.Module) -> None:
    """The authors' first weights of a layer: linear ones from a normal distribution of width 0.02, cut at 2;
    convolutions from one of width sqrt(2 / fan out); no bias. Norms have torch's."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def to_tokens(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h w, C]."""
    return x.flatten(2).transpose(1, 2)


def to_map(x: Tensor, size: Sequence[int]) -> Tensor:
    """The inverse of :func:`to_tokens`. size: (h, w)."""
    return x.transpose(1, 2).unflatten(2, tuple(size))


class Attention(nn.Module):
    """Of every position to a map that is smaller by ``reduction``."""

    def __init__(self, width: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        if reduction > 1:
            self.sr, self.norm = nn.Conv2d(width, width, reduction, reduction), Norm(width)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """[B, h w, C] -> [B, h w, C]."""
        seen = self.norm(to_tokens(self.sr(to_map(x, size)))) if hasattr(self, "sr") else x
        return self.attn(x, seen, seen, need_weights=False)[0]


class MixFFN(nn.Module):
    """Two 1x1 convolutions and, between them, a 3x3 convolution of each channel, which tells positions apart."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = EXPANSION * width
        self.layers = nn.Sequential(nn.Conv2d(width, inner, 1), nn.Conv2d(inner, inner, 3, padding=1, groups=inner),
                                    nn.GELU(), nn.Identity(), nn.Conv2d(inner, width, 1))

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """[B, h w, C] -> [B, h w, C]."""
        return to_tokens(self.layers(to_map(x, size)))


class Thinned(nn.Module):
    """A block whose parts are left out in training, for the share ``dropped`` of the images."""

    def __init__(self, dropped: float) -> None:
        super().__init__()
        self.dropped = dropped

    def thin(self, x: Tensor) -> Tensor:
        """What a part adds, [B, h w, C]: 0 for some images, more for the others."""
        if not self.training or self.dropped == 0:
            return x
        kept = torch.rand(len(x), 1, 1, dtype=x.dtype, device=x.device) >= self.dropped
        return x * kept / (1 - self.dropped)


class Block(Thinned):
    """Attention and a perceptron of each position, each added to what it is given: its submodule ``name``."""

    attention: type[nn.Module] = Attention
    perceptron: type[nn.Module] = MixFFN
    name = "ffn"

    def __init__(self, width: int, heads: int, reduction: int, dropped: float) -> None:
        super().__init__(dropped)
        self.norm1, self.attn = Norm(width), self.attention(width, heads, reduction)
        self.norm2 = Norm(width)
        self.add_module(self.name, self.perceptron(width))

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """[B, h w, C] -> [B, h w, C]."""
        x = x + self.thin(self.attn(self.norm1(x), size))
        return x + self.thin(self.get_submodule(self.name)(self.norm2(x), size))


class Embedding(nn.Module):
    """Overlapping patches of a map become tokens. name: of the convolution; eps: that the norm adds."""

    name, eps = "projection", 1e-6

    def __init__(self, c_in: int, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.add_module(self.name, nn.Conv2d(c_in, width, kernel, stride, kernel // 2))
        self.norm = nn.LayerNorm(width, eps=self.eps)

    def forward(self, x: Tensor) -> tuple[Tensor, torch.Size]:
        """[B, c_in, H, W] -> tokens [B, h w, width] and (h, w)."""
        x = self.get_submodule(self.name)(x)
        return self.norm(to_tokens(x)), x.shape[2:]


class MixTransformer(nn.Module):
    """The backbone. channels: of its four stages, at stride 4, 8, 16 and 32."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.channels = [size.width * heads for heads in HEADS]
        self.layers, dropped, c_in = nn.ModuleList(), iter(shares(size)), 3
        for i, (width, depth) in enumerate(zip(self.channels, size.depths, strict=True)):
            embedding = Embedding(c_in, width, 3 if i else 7, 2 if i else 4)
            blocks = nn.ModuleList(Block(width, HEADS[i], REDUCTIONS[i], next(dropped)) for _ in range(depth))
            self.layers.append(nn.ModuleList([embedding, blocks, Norm(width)]))
            c_in = width
        self.apply(start)

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> the maps of the four stages."""
        maps = []
        for embedding, blocks, norm in self.layers:
            x, size = embedding(x)
            for block in blocks:
                x = block(x, size)
            x = to_map(norm(x), size)
            maps.append(x)
        return maps


class SegformerHead(nn.Module):
    """All scales at one width, resized to the finest, joined by a 1x1 convolution."""

    def __init__(self, channels: Sequence[int], num_class: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(ConvModule(c_in, HEAD_WIDTH, 1) for c_in in channels)
        self.fusion_conv = ConvModule(len(channels) * HEAD_WIDTH, HEAD_WIDTH, 1)
        self.conv_seg = nn.Conv2d(HEAD_WIDTH, num_class, 1)
        self.apply(start)
        nn.init.normal_(self.conv_seg.weight, std=0.01)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps of the stages -> [B, num_class, h, w] at the stride of the first."""
        parts = [F.interpolate(conv(x), maps[0].shape[2:], mode="bilinear") for conv, x in
                 zip(self.convs, maps, strict=True)]
        return self.conv_seg(F.dropout2d(self.fusion_conv(torch.cat(parts, 1)), 0.1, self.training))


class Segformer(nn.Module):
    """[B, 3, H, W] -> logits [B, num_class, H/4, W/4], sides rounded up."""

    def __init__(self, size: Size, num_class: int) -> None:
        super().__init__()
        self.backbone = MixTransformer(size)
        self.decode_head = SegformerHead(self.backbone.channels, num_class)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode_head(self.backbone(x))


#: where the maps are, as ``taps.py`` spells it; c1 ... c4: what the next stage and the head are given
TAPS = {f"c{i + 1}": f"decode_head.convs.{i}.conv:in" for i in range(4)} | {"head": "decode_head.fusion_conv"}


def suggestion(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the network that a file looks like; None when it is of none of these."""
    if "decode_head.fusion_conv.conv.weight" not in tensors or "backbone.layers.0.0.norm.weight" not in tensors:
        return None
    depths = tuple(max((int(match[1]) for match in map(re.compile(rf"backbone\.layers\.{i}\.1\.(\d+)\..+").fullmatch,
                                                       tensors) if match), default=-1) + 1 for i in range(4))
    found = Size(len(tensors["backbone.layers.0.0.norm.weight"]), depths)
    return f"mmseg:segformer_mit-b{SIZES.index(found)}" if found in SIZES else None
