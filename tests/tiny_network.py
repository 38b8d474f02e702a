"""A backbone of few layers, "tiny" of "psp", where every layer takes time: in exporters."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from models.backbone import Backbone, Stages, conv_norm_act
from models.registry import ARCHITECTURES, BACKBONES, NARROW, BackboneEntry


class Tiny(Backbone):
    """Five convolutions."""

    def __init__(self, width: float, norm_layer) -> None:
        super().__init__((8, 8, 8, 16))
        shapes = ((3, 8, 2), (8, 8, 2), (8, 8, 2), (8, 8, 1), (8, 16, 1))
        self.convs = nn.ModuleList(nn.Sequential(*conv_norm_act(c_in, c_out, 3, norm_layer, stride=stride))
                                   for c_in, c_out, stride in shapes)

    def forward(self, x: torch.Tensor) -> Stages:
        stages = [x]
        for conv in self.convs:
            stages.append(conv(stages[-1]))
        return tuple(stages[2:])


@contextmanager
def tiny_backbone() -> Iterator[None]:
    """Inside, ``psp`` has the backbone ``tiny``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, "tiny", BackboneEntry(Tiny, NARROW))
        patch.setitem(ARCHITECTURES, "psp", ARCHITECTURES["psp"]._replace(backbones=("tiny",)))
        yield
