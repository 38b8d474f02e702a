"""Names of networks: one table of architectures and one of backbones, and the one entry that builds a network.

The suffix ``_w<factor>`` on a backbone name (``resnet18_w0.25``) scales every channel count of the backbone (see
``backbone.scaled``) and, likewise, the width of the main head. The branches of the pooling pyramid and the auxiliary
head are always a quarter of the stage they read.
"""
from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from models.backbone import Backbone, NormLayer, scaled
from models.heads import DeepLabHead, FCNHead, PSPHead
from models.mobilenetv2 import MobileNetV2
from models.outside import build_outside, check_said, is_outside, parse_taps, portable, suggestion
from models.preprocess import Preprocess
from models.resnet import ResNet
from models.segmentation import SegmentationNet
from models.timm_backbone import PREFIX, WIDE_FROM, TimmBackbone, is_timm
from models.weight_files import WeightFile, open_weights, read_info
from models.weights import is_given, load_weights
from utils.errors import UserError

log = logging.getLogger("afdcd")
WIDTH_SUFFIX = re.compile(r"(?P<base>.+)_w(?P<width>\d+(?:\.\d+)?)")
MAX_WIDTH = 4.0
UNSAFE = re.compile(r"[^\w.+-]+")  # in names of files


class BackboneEntry(NamedTuple):
    """A full-width backbone. build(width, norm_layer); head_widths: channels of each head over it, at full width."""

    build: Callable[[float, NormLayer], Backbone]
    head_widths: dict[type[nn.Module], int]


class Architecture(NamedTuple):
    """A model: its head, the full-width backbones that it goes with, whether it has an auxiliary head by default, and
    the tensor whose input channels are the width of the head."""

    head: type[nn.Module]
    backbones: tuple[str, ...]
    aux: bool
    classifier: str


NARROW, WIDE = {DeepLabHead: 128, PSPHead: 128}, {DeepLabHead: 256, PSPHead: 512}
BACKBONES = {
    **{f"resnet{depth}{suffix}": BackboneEntry(partial(ResNet, depth, not suffix), NARROW if depth == 18 else WIDE)
       for depth in (18, 50, 101) for suffix in ("", "_original")},
    "mobilenetv2": BackboneEntry(MobileNetV2, NARROW),
}
RESNETS = tuple(name for name in BACKBONES if name.startswith("resnet"))
ARCHITECTURES = {
    "deeplabv3": Architecture(DeepLabHead, RESNETS, aux=True, classifier="head.block.4.weight"),
    "deeplab_mobile": Architecture(DeepLabHead, ("mobilenetv2",), aux=False, classifier="head.block.4.weight"),
    "psp": Architecture(PSPHead, RESNETS, aux=True, classifier="head.classifier.weight"),
    "psp_mobile": Architecture(PSPHead, ("mobilenetv2",), aux=False, classifier="head.classifier.weight"),
}


@dataclass(frozen=True)
class NetworkChoice:
    """A network as the settings name it; the fields are arguments of :func:`get_segmentation_model`. backbone: without
    a meaning for networks of other libraries."""

    model: str
    backbone: str
    pretrained: str | None = None
    pretrained_base: str | None = None
    preprocess: str | Preprocess | None = None
    aux: bool | None = None
    taps: str | None = None
    head_width: int | None = None

    def build(self, num_class: int, **more: Any) -> nn.Module:
        """The network with its weights. more: further arguments, as ``norm_layer``."""
        return get_segmentation_model(self.model, self.backbone, num_class, self.aux, self.pretrained,
                                      self.pretrained_base, preprocess=self.preprocess, taps=self.taps,
                                      head_width=self.head_width, **more)

    def build_bare(self, num_class: int) -> nn.Module:
        """The network without its weights, which are not read: what it is like, their JSON file says where it does."""
        info = (read_info(self.pretrained) if is_given(self.pretrained) else None) or {}
        same = info.get("model") == self.model and (is_outside(self.model) or info.get("backbone") == self.backbone)
        said = info if same else {}
        bare = replace(self, pretrained=None, pretrained_base=None,
                       head_width=self.head_width or said.get("head_width"))
        return bare.build(num_class, architecture=said.get("architecture"))


def network_name(model: str, backbone: str, between: str = "_") -> str:
    """A network as a part of file names: deeplabv3_resnet18, smp-Unet-resnet34, without the folders of a machine.
    between: model and backbone."""
    return UNSAFE.sub("-", portable(model) if is_outside(model) else f"{model}{between}{backbone}")


def described_network(source: str | None, named: str | None = None, prefix: str = "") -> dict[str, str]:
    """The 'model' and 'backbone' that the JSON file beside weights names, as far as it does.

    named: the model that was asked for. prefix: of the settings, such as "teacher_". UserError when the file is not
    readable, or names a model that only the caller may name (``outside.check_said``)."""
    info = (read_info(source) if is_given(source) else None) or {}
    check_said(info, f"{source}.json", named, f"{prefix}model")
    return {key: info[key] for key in ("model", "backbone") if isinstance(info.get(key), str)}


def check_described(choice: NetworkChoice, said: Mapping[str, str], prefix: str = "") -> None:
    """UserError, naming both, when a network was asked for that is not the one that its weights' JSON file says. The
    backbone of a network from elsewhere has no meaning.

    said: of :func:`described_network`. prefix: of the settings, such as "teacher_"."""
    for key, value in said.items():
        if key == "backbone" and is_outside(choice.model):
            continue
        if getattr(choice, key) != value:
            raise UserError(f"{prefix.replace('_', ' ')}{key} {getattr(choice, key)} was asked for, but "
                            f"{choice.pretrained}.json says {value}: leave it out, or choose other weights",
                            settings=[prefix + key])


def list_models() -> list[tuple[str, str]]:
    """Every (model, backbone) pair at full width, in the order of the table."""
    return [(model, backbone) for model, entry in ARCHITECTURES.items() for backbone in entry.backbones]


def model_help(whose: str = "") -> str:
    """Help of a flag that chooses a model."""
    return (f"architecture{whose}: {', '.join(ARCHITECTURES)}; or of elsewhere: smp:, tv:, hf:, mmseg:, cirkd:, "
            "module:NAME")


def backbone_help(whose: str = "") -> str:
    """Help of a flag that chooses a backbone."""
    by_backbones = {}
    for model, entry in ARCHITECTURES.items():
        by_backbones.setdefault(entry.backbones, []).append(model)
    pairs = "; ".join(f"of {' and '.join(models)}: {', '.join(names)}" for names, models in by_backbones.items())
    return f"backbone{whose}, {pairs}; or timm:NAME; _w0.5 behind a name halves its channels"


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
    return _architecture(model).aux


def get_segmentation_model(model: str = "deeplabv3", backbone: str = "resnet18", num_class: int = 19,
                           aux: bool | None = None, pretrained: str | None = None, pretrained_base: str | None = None,
                           norm_layer: NormLayer = nn.BatchNorm2d, local_rank: int | None = None,
                           preprocess: Preprocess | str | None = None, taps: str | None = None,
                           head_width: int | None = None,
                           architecture: Mapping[str, Any] | None = None) -> nn.Module:
    """Build a network by name and load its weights.

    model, backbone: a pair of :func:`list_models`, the backbone optionally with a width suffix (``_w0.5``).
    aux: auxiliary head; None = the habit of the model. pretrained: a whole segmentation network; pretrained_base: an
    ImageNet backbone (not read when ``pretrained`` is given, which holds the backbone too). Both, and preprocess, as
    in ``weights.load_weights``. norm_layer: called with a channel count. local_rank: for old callers, without effect.
    Networks and backbones of other libraries: see ``models/outside`` and ``timm_backbone``. taps: of such a network, as
    'c4=PATH,head=PATH', see ``outside/taps.py``. head_width: channels of the main head; None = that of the file
    ``pretrained``, else the habit of model and backbone (CIRKDv2's files are 512 wide). architecture: of a network of
    another library (``OutsideNet.architecture``); None = what the JSON file beside ``pretrained`` says, if anything.
    Raises UserError for an unknown name, a class count below 1, or weights that do not fit."""
    if isinstance(num_class, bool) or not isinstance(num_class, int) or num_class < 1:
        raise UserError(f"{model}-{backbone}: num_class must be a whole number of at least 1, got {num_class!r}")
    if is_outside(model):
        if head_width is not None:
            raise UserError(f"{model}: has no head of this repository, whose width could be set to {head_width}")
        file = open_weights(pretrained) if is_given(pretrained) else None
        return _outside_network(model, num_class, aux, taps, architecture, file, pretrained_base, preprocess)
    if taps:
        raise UserError(f"taps {taps!r}: only for networks of other libraries, the maps of {model} are known")
    classifier = _architecture(model).classifier
    file = _open_own(pretrained, f"{model}-{backbone}") if is_given(pretrained) else None
    net = _own_network(model, str(backbone), num_class, aux, norm_layer,
                       pretrained_base if is_given(pretrained_base) and file is None else None,
                       head_width or (file and file.channels_into(classifier)))
    if file is not None:
        _check_head_width(net, file, classifier, head_width)
        load_weights(net, file, "model", preprocess=preprocess)
        if is_given(pretrained_base):
            log.info("%s-%s: %s is not read, %s holds the backbone too", model, backbone, pretrained_base, pretrained)
    else:
        load_weights(net, None if is_timm(str(backbone)) else pretrained_base, "backbone", preprocess=preprocess)
    return net


def _outside_network(model: str, num_class: int, aux: bool | None, taps: str | None,
                     architecture: Mapping[str, Any] | None, file: WeightFile | None, base: str | None,
                     preprocess: Preprocess | str | None) -> nn.Module:
    """A network of another library with the weights of a file, or of its backbone."""
    if architecture is None and file is not None and (file.info or {}).get("model") == model:
        architecture = file.info.get("architecture")
    net = build_outside(model, num_class, parse_taps(taps), aux, architecture)
    if is_given(base) and not net.backbone_names:
        raise UserError(f"{model}: takes no backbone weights; put them into its own file, or into what builds it")
    load_weights(net, file or base, "model" if file else "backbone", preprocess=preprocess)
    return net


def _own_network(model: str, backbone: str, num_class: int, aux: bool | None, norm_layer: NormLayer,
                 timm_weights: str | None, head_width: int | None) -> SegmentationNet:
    """Heads of this repository, the main one of a width or of the usual one, over one of its backbones, or one of
    timm's with its weights."""
    architecture = _architecture(model)
    base, width = (backbone, 1.0) if is_timm(backbone) else split_backbone(backbone)
    if is_timm(backbone):
        features: Backbone = TimmBackbone(backbone.removeprefix(PREFIX), timm_weights)
        head_widths = WIDE if features.channels[3] >= WIDE_FROM else NARROW
    elif base in architecture.backbones:
        features, head_widths = BACKBONES[base].build(width, norm_layer), BACKBONES[base].head_widths
    else:
        raise UserError(f"unknown backbone {backbone!r} for {model}: expected one of "
                        f"{', '.join(architecture.backbones)}, optionally with a width suffix such as _w0.5, or "
                        "timm:NAME")
    usual = scaled(head_widths[architecture.head], width)
    head = architecture.head(features.channels[3], head_width or usual, num_class, norm_layer)
    has_aux = architecture.aux if aux is None else bool(aux)
    auxlayer = FCNHead(features.channels[2], num_class, norm_layer) if has_aux else None
    net = SegmentationNet(model, backbone, features, head, auxlayer, num_class)
    net.head_width = None if head.channels == usual else head.channels
    if is_timm(backbone):
        net.preprocess = features.preprocess
    return net


def _open_own(source: str, name: str) -> WeightFile:
    """A weight file for a network of this repository. UserError, with its model, for one of mmsegmentation."""
    file = open_weights(source)
    if (other := suggestion(file.tensors)) is not None:
        advice = f"it goes to the model {other}" if other else \
            "of those, only DeepLabV3 and PSPNet over ResNets, and SegFormer, are read"
        raise UserError(f"{file.name}: a file of mmsegmentation, whose networks have another stem and head than "
                        f"{name}: {advice}")
    return file


def _check_head_width(net: SegmentationNet, file: WeightFile, classifier: str, asked: int | None) -> None:
    """UserError when the head of a file has another width than was asked for; a line when it is an unusual one."""
    found = file.channels_into(classifier)
    if asked is not None and found is not None and found != asked:
        raise UserError(f"{file.name}: its head is {found} channels wide, but {asked} were asked for: leave the width "
                        "out, or choose other weights")
    if net.head_width is not None:
        log.info("%s: its head is %d channels wide", net.name, net.head_width)


def _architecture(model: str) -> Architecture:
    if model not in ARCHITECTURES:
        raise UserError(f"unknown model {model!r}: expected one of {', '.join(ARCHITECTURES)}, or SOURCE:NAME with "
                        "a source among smp, tv, hf, mmseg, cirkd, module")
    return ARCHITECTURES[model]
