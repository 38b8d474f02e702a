"""SegFormer (Xie et al. 2021) as CIRKD and CIRKDv2 have it, written anew with their names, so that their files load
strictly. But for the names it is the authors' own: scales are joined as they are, the coarsest first, and the head is
768 channels wide from MiT-B2 on."""
from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.outside import segformer
from models.outside.segformer import EXPANSION, HEADS, REDUCTIONS, SIZES, Norm, Size, shares, start, to_map, to_tokens
from utils.errors import UserError

NAME = re.compile(r"segformer_MiT_B(?P<size>[0-5])")
NARROW, WIDE, WIDE_FROM = 256, 768, 2  # channels of the head; the first MiT with the wide one


class Config(NamedTuple):
    """What a name says. head: its channels."""

    size: Size
    head: int


def parse(name: str) -> Config:
    """Of segformer_MiT_B0 ... B5. UserError for another name."""
    match = NAME.fullmatch(name)
    if match is None:
        raise UserError(f"cirkd:{name}: expected cirkd:segformer_MiT_B0 ... B5 (CIRKD's other networks go by the names "
                        "of this repository)")
    return Config(SIZES[int(match["size"])], WIDE if int(match["size"]) >= WIDE_FROM else NARROW)


class Attention(nn.Module):
    """Of every position to a map that is smaller by ``reduction``."""

    def __init__(self, width: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        if reduction > 1:
            self.sr, self.norm = nn.Conv2d(width, width, reduction, reduction), nn.LayerNorm(width)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """[B, h w, C] -> [B, h w, C]."""
        seen = self.norm(to_tokens(self.sr(to_map(x, size)))) if hasattr(self, "sr") else x
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (self.q(x), *self.kv(seen).chunk(2, 2)))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class DepthConv(nn.Module):
    """A 3x3 convolution of each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """[B, h w, C] -> [B, h w, C]."""
        return to_tokens(self.dwconv(to_map(x, size)))


class Mlp(nn.Module):
    """Two linear layers with the convolution between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = EXPANSION * width
        self.fc1, self.dwconv, self.fc2 = nn.Linear(width, inner), DepthConv(inner), nn.Linear(inner, width)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """[B, h w, C] -> [B, h w, C]."""
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), size)))


class Block(segformer.Block):
    """With these two parts."""

    attention, perceptron, name = Attention, Mlp, "mlp"


class Embedding(segformer.Embedding):
    """With the names and norms of CIRKD."""

    name, eps = "proj", 1e-5


class Scale(nn.Module):
    """A map at the width of the head."""

    def __init__(self, c_in: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(c_in, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, h, w] -> [B, width, h, w]."""
        return to_map(self.proj(to_tokens(x)), x.shape[2:])


class Segformer(nn.Module):
    """[B, 3, H, W] -> logits [B, num_class, H/4, W/4], sides rounded up."""

    def __init__(self, config: Config, num_class: int) -> None:
        super().__init__()
        size, head = config
        dropped, c_in = iter(shares(size)), 3
        for i, (heads, depth) in enumerate(zip(HEADS, size.depths, strict=True)):
            width = size.width * heads
            self.add_module(f"patch_embed{i + 1}", Embedding(c_in, width, 3 if i else 7, 2 if i else 4))
            self.add_module(f"block{i + 1}", nn.ModuleList(Block(width, heads, REDUCTIONS[i], next(dropped))
                                                           for _ in range(depth)))
            self.add_module(f"norm{i + 1}", Norm(width))
            self.add_module(f"linear_c{i + 1}", Scale(width, head))
            c_in = width
        self.linear_fuse = nn.Sequential(nn.Conv2d(len(HEADS) * head, head, 1), nn.BatchNorm2d(head), nn.ReLU())
        self.linear_pred = nn.Conv2d(head, num_class, 1)
        self.apply(start)

    def forward(self, x: Tensor) -> Tensor:
        parts: list[Tensor] = []
        for i in range(1, len(HEADS) + 1):
            x, size = getattr(self, f"patch_embed{i}")(x)
            for block in getattr(self, f"block{i}"):
                x = block(x, size)
            x = to_map(getattr(self, f"norm{i}")(x), size)
            part = getattr(self, f"linear_c{i}")(x)
            parts.append(F.interpolate(part, parts[0].shape[2:], mode="bilinear") if parts else part)
        return self.linear_pred(self.linear_fuse(torch.cat(parts[::-1], 1)))


#: where the maps are, as ``taps.py`` spells it
TAPS = {f"c{i}": f"linear_c{i}:in" for i in range(1, 5)} | {"head": "linear_fuse"}
