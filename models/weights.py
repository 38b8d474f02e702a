"""Fitting weight files to networks: what matches is loaded and counted, what does not is an error or a log line.

Understood, each with or without ``module.`` prefixes and nesting under state_dict/model/net:
  what='model'      segmentation networks: released CIRKD and Af-DCD files, this repository's, its training checkpoints
  what='backbone'   ImageNet backbones: CIRKD's, torchvision's (plain-stem ResNets; MobileNetV2, whose newer names
                    ``conv.0.0.weight`` are translated), and the backbone inside any segmentation file above

A network's preprocessing is the BGR-minus-mean of the released weights, unless replaced by, in this order: the caller's
``preprocess``; what the JSON file beside the weights says; for ImageNet backbones, RGB mean/std when the source is a
torchvision name, a MobileNetV2 with the newer names or a plain-stem (7x7) ResNet. The last is a guess: CIRKD's own
plain-stem files look the same, and for those ``preprocess='bgr'`` has to be said.
"""
from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.preprocess import CAFFE_BGR, IMAGENET_RGB, Preprocess, get_preprocess
from models.weight_files import WeightFile, describe, is_given, open_weights, read_state_dict, save_state_dict, unwrap
from utils.errors import UserError

__all__ = ["LoadReport", "check_values", "describe", "is_given", "load_weights", "read_state_dict", "save_state_dict"]

log = logging.getLogger("afdcd")

#: share of the backbone's tensors that a backbone file must hold, and largest share of foreign ones that it may
MIN_MATCH, MAX_FOREIGN = 0.9, 0.1
COUNTER, VARIANCE = "num_batches_tracked", "running_var"
#: what the floating-point tensors of a file may hold
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PROFILER = re.compile(r"(.*\.)?total_(ops|params)")  # entries that profilers leave in saved files
#: classifiers and heads that belong to no backbone
BACKBONE_EXTRAS = re.compile(r"(fc|classifier|last_linear|features\.18|head|auxlayer|decode_head|linear_\w+)\..*")
#: the same inside a segmentation network whose backbone kept its classifier
MODEL_EXTRAS = re.compile(r"pretrained\.(net\.)?(fc|classifier|last_linear|features\.18)\..*")
NEW_MOBILENET = re.compile(r"(features\.\d+)\.conv\.(\d+)\.([01])\.(.+)")
FLAT_MOBILENET = re.compile(r"(features\.\d+)\.conv\.(\d+)\.(\D.*)")


@dataclass(frozen=True)
class LoadReport:
    """Names of tensors: loaded; absent from the file (left as they were); in the file but not used."""

    matched: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def load_weights(net: nn.Module, source: str | os.PathLike | WeightFile | None, what: str = "model",
                 preprocess: Preprocess | str | None = None) -> LoadReport:
    """Load a file, or a torchvision weight name, into a network in place, and set ``net.preprocess`` and, of a whole
    model, ``net.trained_on``.

    source: None, '' and 'None' load nothing; a file may be opened already. what: 'model' = every tensor of the network
    must be in the file, and only harmless others; 'backbone' = at least nine tenths of the backbone's. Missing batch
    counters are no error.
    preprocess: 'bgr', 'rgb' or a Preprocess. Raises UserError, before anything was changed, naming file and tensor."""
    if what not in ("model", "backbone"):
        raise ValueError(f"what must be 'model' or 'backbone', got {what!r}")
    net, wanted = unwrap(net), None if preprocess is None else get_preprocess(preprocess)
    if not isinstance(source, WeightFile) and not is_given(source):
        net.preprocess = wanted or net.preprocess
        return LoadReport()
    file = source if isinstance(source, WeightFile) else open_weights(source)
    pairs, report, suggested = (_fit_model if what == "model" else _fit_backbone)(net, file)
    with torch.no_grad():
        for target, value in pairs:
            target.copy_(value)
    net.preprocess = wanted or suggested or net.preprocess
    if what == "model":
        net.trained_on = (file.info or {}).get("trained_on")
    _log(net, file, what, report)
    return report


Fit = tuple[list[tuple[Tensor, Tensor]], LoadReport, Preprocess | None]


def _fit_model(net: nn.Module, file: WeightFile) -> Fit:
    for field in ("model", "backbone", "num_class"):
        said, built = (file.info or {}).get(field), getattr(net, field)
        if said is not None and said != built:
            raise UserError(f"{file.name}: its description says {field} {said!r}, "
                            f"but {net.name} was built with {built!r}")
    own = net.state_dict()
    report, foreign = _compare(own, file.tensors, lambda k: bool(PROFILER.fullmatch(k) or MODEL_EXTRAS.fullmatch(k))
                               or k.startswith(net.optional))
    if not report.matched:
        raise UserError(f"{file.name}: no tensor of it belongs to {net.name} (it has {_some(file.tensors)}); "
                        "a backbone file goes to the pretrained-base option")
    if missing := _without_counters(report.missing):
        raise UserError(f"{file.name}: lacks {len(missing)} of the {len(own)} tensors of {net.name}: {_some(missing)}")
    pairs = _pairs(net, file, own, file.tensors, report.matched)
    if foreign:
        raise UserError(f"{file.name}: holds {len(foreign)} tensors that {net.name} does not have: {_some(foreign)}")
    return pairs, report, (file.info or {}).get("preprocess")


def _fit_backbone(net: nn.Module, file: WeightFile) -> Fit:
    prefix = net.backbone_prefix
    own = {k.removeprefix(prefix): v for k, v in net.state_dict().items() if k.startswith(net.backbone_names)}
    inside_net = any(k.startswith(prefix) for k in file.tensors)
    given = {k.removeprefix(prefix): v for k, v in file.tensors.items()}
    if modern := any(NEW_MOBILENET.fullmatch(k) for k in given):
        given = flat_mobilenet_names(given)
    # MobileNets inside torchvision's segmentation networks drop the "features." of its ImageNet files
    given = {short if (short := k.removeprefix("features.")) in own else k: v for k, v in given.items()}
    report, foreign = _compare(own, given, lambda k: bool(PROFILER.fullmatch(k) or BACKBONE_EXTRAS.fullmatch(k)))
    pairs = _pairs(net, file, own, given, report.matched)
    wanted, missing = _without_counters(own), _without_counters(report.missing)
    if len(missing) > (1 - MIN_MATCH) * len(wanted):
        raise UserError(f"{file.name}: matches only {len(wanted) - len(missing)} of the {len(wanted)} tensors of "
                        f"{net.name}'s backbone (it has {_some(given)}; the backbone wants {_some(missing)})")
    if len(foreign) > MAX_FOREIGN * len(wanted):
        raise UserError(f"{file.name}: is of another, larger network than {net.name}'s backbone: {len(foreign)} "
                        f"tensors have no place ({_some(foreign)})")
    report = LoadReport(report.matched, report.missing, report.ignored + foreign)
    plain = "conv1.weight" in given and given["conv1.weight"].shape[-1] == 7
    torchvision = file.from_torchvision or modern or (plain and not inside_net)
    return pairs, report, (file.info or {}).get("preprocess") or (IMAGENET_RGB if torchvision else None)


def flat_mobilenet_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a newer torchvision MobileNetV2 to the older, flat layout.

    Newer: a block's convolutions with norm and activation are nested (conv.0.0, conv.0.1, conv.1.0, ...), its last
    convolution and norm follow (conv.2, conv.3). Flat: each convolution, norm and activation counts by itself."""
    nested: dict[str, int] = {}
    for match in filter(None, map(NEW_MOBILENET.fullmatch, tensors)):
        nested[match[1]] = max(nested.get(match[1], 0), int(match[2]) + 1)
    flat = {}
    for key, value in tensors.items():
        new, old = NEW_MOBILENET.fullmatch(key), FLAT_MOBILENET.fullmatch(key)
        if new:
            key = f"{new[1]}.conv.{3 * int(new[2]) + int(new[3])}.{new[4]}"
        elif old and old[1] in nested:
            key = f"{old[1]}.conv.{int(old[2]) + 2 * nested[old[1]]}.{old[3]}"
        flat[key] = value
    return flat


def _compare(own: dict[str, Tensor], given: dict[str, Tensor],
             harmless: Callable[[str], bool]) -> tuple[LoadReport, tuple[str, ...]]:
    """Report on names alone, and the names of the file that fit nowhere and are not ``harmless(name)``."""
    extra = [k for k in given if k not in own]
    report = LoadReport(tuple(k for k in own if k in given), tuple(k for k in own if k not in given),
                        tuple(k for k in extra if harmless(k)))
    return report, tuple(k for k in extra if not harmless(k))


def _pairs(net: nn.Module, file: WeightFile, own: dict[str, Tensor], given: dict[str, Tensor],
           names: Iterable[str]) -> list[tuple[Tensor, Tensor]]:
    """(target, value) of each name, after checking shapes and that every value is finite."""
    pairs = []
    for name in names:
        target, value = own[name], given[name]
        if target.shape != value.shape:
            raise UserError(f"{file.name}: {name} has shape {list(value.shape)}, but {net.name} with "
                            f"{net.num_class} classes wants {list(target.shape)}{_hint(name, value, target)}")
        check_values(file.name, name, value, target)
        pairs.append((target, value))
    return pairs


def check_values(where: str, name: str, value: Tensor, target: Tensor) -> None:
    """UserError, naming file and tensor, for values that ``target`` cannot take over or no network can have."""
    if target.is_floating_point() and value.dtype not in FLOATS or value.dtype is torch.bool:
        wanted = "floating-point numbers" if target.is_floating_point() else "whole numbers"
        raise UserError(f"{where}: {name} holds {str(value.dtype).removeprefix('torch.')} values, expected {wanted}")
    if not bool(torch.isfinite(value).all()):
        raise UserError(f"{where}: {name} holds values that are not finite")
    if not bool(torch.isfinite(value.to(target.dtype)).all()):
        raise UserError(f"{where}: {name} holds values that {str(target.dtype).removeprefix('torch.')} cannot hold, up "
                        f"to {value.abs().max().item():.3g}")
    if name.endswith(VARIANCE) and bool((value < 0).any()):
        raise UserError(f"{where}: {name} holds negative variances")


def _hint(name: str, value: Tensor, target: Tensor) -> str:
    """What may be behind two shapes of one name: input channels beside the colors, or another stem."""
    given, wanted = tuple(value.shape), tuple(target.shape)
    if given[1:2] + wanted[1:2] in ((3, 4), (4, 3)) and given[:1] + given[2:] == wanted[:1] + wanted[2:]:
        return f" (the file has {given[1]} input channels, the network {wanted[1]})"
    if name.removeprefix("pretrained.") == "conv1.weight" and given[2:] != wanted[2:]:
        return " (resnetN has a deep stem of 3x3 convolutions, resnetN_original one 7x7 convolution)"
    return ""


def _without_counters(names: Iterable[str]) -> list[str]:
    return [n for n in names if not n.endswith(COUNTER)]


def _some(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _log(net: nn.Module, file: WeightFile, what: str, report: LoadReport) -> None:
    order = {CAFFE_BGR: "BGR minus mean", IMAGENET_RGB: "RGB mean/std"}.get(net.preprocess, str(net.preprocess))
    lost = _without_counters(report.missing)
    log.info("%s (%s) from %s:\n    %d tensors matched, %d missing (%d of them batch counters), %d ignored%s; input is "
             "%s", net.name, what, file.name, len(report.matched), len(report.missing), len(report.missing) - len(lost),
             len(report.ignored), f" ({_some(report.ignored, 6)})" if report.ignored else "", order)
    if lost:
        log.warning("%s: %d tensors of the backbone keep their random values: %s", file.name, len(lost), _some(lost, 6))
