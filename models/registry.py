"""Names of networks: the registry of backbones and models, and the one entry that builds a network.

A backbone registers its full-width names with :func:`register_backbone`, a model its name and the backbones that it
goes with through :func:`register_model`. The suffix ``_w<factor>`` on a backbone name scales every channel count of the
backbone (multiples of 8, see ``backbone.scaled``) and, by the same factor and rounding, the width of the main head:
``resnet18_w0.25``, ``mobilenetv2_w0.5``. The branches of the pooling pyramid and the auxiliary head are always a
quarter of the stage they read.
"""
from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from models.backbone import Backbone, NormLayer, scaled
from models.heads import DeepLabHead, FCNHead, PSPHead
from models.mobilenetv2 import MobileNetV2
from models.preprocess import Preprocess
from models.resnet import ResNet
from models.segmentation import SegmentationNet
from models.weights import is_given, load_weights
from utils.errors import UserError

log = logging.getLogger("afdcd")

WIDTH_SUFFIX = re.compile(r"(?P<base>.+)_w(?P<width>\d+(?:\.\d+)?)")
MAX_WIDTH = 4.0


@dataclass(frozen=True)
class BackboneEntry:
    """A full-width backbone: how to build it and which head widths belong to it."""

    build: Callable[[float, NormLayer], Backbone]
    head_widths: dict[str, int]


@dataclass(frozen=True)
class ModelEntry:
    """A model: how to build it, the backbones it goes with, whether it has an auxiliary head by default."""

    build: Callable[..., nn.Module]
    backbones: tuple[str, ...]
    aux: bool


_BACKBONES: dict[str, BackboneEntry] = {}
_MODELS: dict[str, ModelEntry] = {}


def register_backbone(name: str, head_widths: dict[str, int]) -> Callable:
    """Decorator of a function ``(width, norm_layer) -> Backbone``.

    head_widths: {'aspp' | 'psp': channels of that head at full width}.
    """

    def wrap(build: Callable[[float, NormLayer], Backbone]) -> Callable[[float, NormLayer], Backbone]:
        if name in _BACKBONES:
            raise ValueError(f"backbone {name!r} is registered twice")
        _BACKBONES[name] = BackboneEntry(build, head_widths)
        return build

    return wrap


def register_model(name: str, backbones: tuple[str, ...], aux: bool) -> Callable:
    """Decorator of a function ``(model, backbone, num_class, aux, norm_layer, **options) -> network``.

    The network offers what ``SegmentationNet`` documents. ``backbones`` are full-width names; ``aux`` is the default.
    """

    def wrap(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        if name in _MODELS:
            raise ValueError(f"model {name!r} is registered twice")
        _MODELS[name] = ModelEntry(build, tuple(backbones), aux)
        return build

    return wrap


def list_models() -> list[tuple[str, str]]:
    """Every (model, backbone) pair at full width, in the order of registration."""
    return [(model, backbone) for model, entry in _MODELS.items() for backbone in entry.backbones]


def split_backbone(name: str) -> tuple[str, float]:
    """'resnet18_w0.25' -> ('resnet18', 0.25); 'resnet18' -> ('resnet18', 1.0). UserError for a width out of range."""
    match = WIDTH_SUFFIX.fullmatch(name)
    if match is None:
        return name, 1.0
    width = float(match["width"])
    if not 0 < width <= MAX_WIDTH:
        raise UserError(f"backbone {name!r}: the width factor after '_w' must be above 0 and at most {MAX_WIDTH:g}")
    return match["base"], width


def default_aux(model: str) -> bool:
    """Whether the model has an auxiliary head unless told otherwise: True over ResNets, False over MobileNets."""
    return _entry(model).aux


def get_segmentation_model(model: str = "deeplabv3", backbone: str = "resnet18", num_class: int = 19,
                           aux: bool | None = None, pretrained: str | None = None, pretrained_base: str | None = None,
                           norm_layer: NormLayer = nn.BatchNorm2d, local_rank: int | None = None,
                           preprocess: Preprocess | str | None = None, **options: Any) -> nn.Module:
    """Build a network by name and load its weights.

    model, backbone: a pair of :func:`list_models`, the backbone optionally with a width suffix (``_w0.5``).
    aux: auxiliary head; None = the habit of the model. pretrained: a whole segmentation network; pretrained_base: an
    ImageNet backbone (not read when ``pretrained`` is given, which holds the backbone too). Both as in
    ``weights.load_weights``; None, '' and 'None' load nothing. norm_layer: called with a channel count.
    local_rank: accepted for old callers, without effect. preprocess: 'bgr', 'rgb' or a ``Preprocess``, overrides what
    the weights suggest. Other keyword arguments go to the model's builder.
    Raises UserError for an unknown name, a class count below 1, or weights that do not fit.
    """
    entry = _entry(model)
    _check_backbone(model, entry, backbone)
    if isinstance(num_class, bool) or not isinstance(num_class, int) or num_class < 1:
        raise UserError(f"{model}-{backbone}: num_class must be a whole number of at least 1, got {num_class!r}")
    net = entry.build(model, backbone, num_class, entry.aux if aux is None else bool(aux), norm_layer, **options)
    if is_given(pretrained):
        load_weights(net, pretrained, "model", preprocess=preprocess)
        if is_given(pretrained_base):
            log.info("%s-%s: %s is not read, %s holds the backbone too", model, backbone, pretrained_base, pretrained)
    else:
        load_weights(net, pretrained_base, "backbone", preprocess=preprocess)
    return net


def _entry(model: str) -> ModelEntry:
    if model not in _MODELS:
        raise UserError(f"unknown model {model!r}: expected one of {', '.join(_MODELS)}")
    return _MODELS[model]


def _check_backbone(model: str, entry: ModelEntry, backbone: str) -> None:
    base, _ = split_backbone(str(backbone))
    if base not in entry.backbones:
        raise UserError(f"unknown backbone {backbone!r} for {model}: expected one of {', '.join(entry.backbones)}, "
                        "optionally with a width suffix such as _w0.5")


def _register_backbones() -> None:
    for depth, aspp, psp in ((18, 128, 128), (50, 256, 512), (101, 256, 512)):
        for suffix, deep in (("", True), ("_original", False)):
            register_backbone(f"resnet{depth}{suffix}", {"aspp": aspp, "psp": psp})(
                lambda width, norm, depth=depth, deep=deep: ResNet(depth, deep, width, norm))
    register_backbone("mobilenetv2", {"aspp": 128, "psp": 128})(MobileNetV2)


_register_backbones()
RESNETS = tuple(name for name in _BACKBONES if name.startswith("resnet"))


def _compose(kind: str, head: type[nn.Module], model: str, backbone: str, num_class: int, aux: bool,
             norm_layer: NormLayer) -> SegmentationNet:
    base, width = split_backbone(backbone)
    entry = _BACKBONES[base]
    features = entry.build(width, norm_layer)
    main = head(features.channels[3], scaled(entry.head_widths[kind], width), num_class, norm_layer)
    auxlayer = FCNHead(features.channels[2], num_class, norm_layer) if aux else None
    return SegmentationNet(model, backbone, features, main, auxlayer, num_class)


@register_model("deeplab_mobile", backbones=("mobilenetv2",), aux=False)
@register_model("deeplabv3", backbones=RESNETS, aux=True)
def deeplabv3(model: str, backbone: str, num_class: int, aux: bool, norm_layer: NormLayer) -> SegmentationNet:
    """DeepLabV3: atrous spatial pyramid of width 128 (ResNet-18, MobileNetV2) or 256 (ResNet-50 and -101)."""
    return _compose("aspp", DeepLabHead, model, backbone, num_class, aux, norm_layer)


@register_model("psp_mobile", backbones=("mobilenetv2",), aux=False)
@register_model("psp", backbones=RESNETS, aux=True)
def psp(model: str, backbone: str, num_class: int, aux: bool, norm_layer: NormLayer) -> SegmentationNet:
    """PSPNet: pooling pyramid and a block of width 128 (ResNet-18, MobileNetV2) or 512 (ResNet-50 and -101)."""
    return _compose("psp", PSPHead, model, backbone, num_class, aux, norm_layer)
