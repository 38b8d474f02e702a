"""Where networks of other libraries come from: one function per source, each of which imports its library."""
from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from models.outside import cirkd_segformer, mmsegmentation, segformer
from models.outside.huggingface import described_hf, hf
from models.outside.library import library, misfit
from models.outside.net import Outside, OutsideNet
from models.outside.trust import check_smp
from models.preprocess import CAFFE_BGR, IMAGENET_RGB, get_preprocess
from models.torchvision_compat import import_torchvision
from utils.errors import UserError
from utils.tensor_files import first_line

#: entry of an architecture of smp, as its own files have it
MODEL_CLASS = "_model_class"
#: of torchvision and mmsegmentation
BACKBONE: dict[str, Any] = {"backbone": ("backbone.",), "prefix": "backbone."}
SMP_ERRORS = (OSError, KeyError, ValueError, TypeError, RuntimeError)


def is_outside(model: str) -> bool:
    """Whether a model's name is that of a network elsewhere."""
    return ":" in model


def brings_weights(model: str) -> bool:
    """Whether a name stands for a network with its weights, so that a teacher needs no weight file."""
    return model.startswith("hf:") or model.startswith("smp:") and is_folder(model.removeprefix("smp:"))


def is_folder(name: str) -> bool:
    """Whether a name is that of a folder on this machine."""
    return Path(name).expanduser().is_dir()


def portable(model: str) -> str:
    """A model's name without the folders of this machine: 'hf:/home/me/net' -> 'hf:net'; others as they are."""
    source, _, name = model.partition(":")
    is_path = source in DESCRIBED and (is_folder(name) or Path(name).expanduser().is_absolute())
    return f"{source}:{Path(name).name}" if is_path else model


def build_outside(model: str, num_class: int, taps: Mapping[str, str] | None = None, aux: bool | None = None,
                  architecture: Mapping[str, Any] | None = None) -> OutsideNet:
    """The network that ``SOURCE:NAME`` names, with random weights but for those of :func:`brings_weights`.

    num_class: its classes. taps: in place of, or beside, those that the source knows. aux: with its auxiliary head, for
    torchvision. architecture: of such a network (``OutsideNet.architecture``), which is built of it with random
    weights; its name is then only a name. Raises UserError for an unknown source or name, a missing library, or
    another number of classes."""
    source, _, name = model.partition(":")
    if source not in SOURCES:
        raise UserError(f"model {model!r}: unknown source {source!r}, expected one of "
                        f"{', '.join(f'{known}:' for known in SOURCES)}")
    if architecture is None:
        outside = SOURCES[source](name, num_class, bool(aux))
    elif source in DESCRIBED and isinstance(architecture, Mapping):
        outside = DESCRIBED[source](name, num_class, architecture)
    else:
        raise UserError(f"model {model!r}: its description has an 'architecture' that is not usable; expected an "
                        f"object, of a model of {' or '.join(f'{known}:' for known in DESCRIBED)}")
    return OutsideNet(model, outside, num_class, taps)


def smp(name: str, num_class: int, aux: bool) -> Outside:
    """segmentation_models_pytorch: ARCHITECTURE:ENCODER, or a folder of its ``save_pretrained``."""
    architecture, _, encoder = name.partition(":")
    package = library("segmentation_models_pytorch", "smp")
    try:
        if is_folder(name):
            net = package.from_pretrained(Path(name).expanduser())
            return _smp(name, net, {**net.config, MODEL_CLASS: type(net).__name__, "encoder_weights": None})
        net = package.create_model(architecture, encoder or "resnet34", encoder_weights=None, classes=num_class)
    except SMP_ERRORS as error:
        raise UserError(f"smp:{name}: {first_line(error)} (expected smp:ARCHITECTURE:ENCODER, as smp:Unet:resnet34, or "
                        "a folder of its save_pretrained)") from error
    return _smp(name, net, None)


def described_smp(name: str, num_class: int, architecture: Mapping[str, Any]) -> Outside:
    """Of what :func:`smp` has said of a folder."""
    package = library("segmentation_models_pytorch", "smp")
    try:
        kind = getattr(package, str(architecture[MODEL_CLASS]), None)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise ValueError(f"no architecture {architecture[MODEL_CLASS]!r} in this version")
        given = {key: value for key, value in architecture.items() if key != MODEL_CLASS}
        named = inspect.signature(kind).parameters.items()
        check_smp(given, [key for key, one in named if one.kind != one.VAR_KEYWORD])
        return _smp(name, kind(**{**given, "encoder_weights": None}), architecture)
    except UserError:
        raise
    except Exception as error:  # of any kind: a library's, of a file that may be a stranger's
        raise misfit(f"smp:{name}", error) from error


def _smp(name: str, net: nn.Module, architecture: Mapping[str, Any] | None) -> Outside:
    stages = len(net.encoder.out_channels)
    taps = {f"c{4 - i}": f"encoder[{stages - 1 - i}]" for i in range(min(4, stages - 1))}
    last = [m for m in net.segmentation_head.modules() if not any(m.children())][-1]
    if type(last).__module__.startswith("torch.nn") and not isinstance(last, (nn.Identity, nn.Conv2d, nn.Upsample)):
        raise UserError(f"smp:{name}: ends in {type(last).__name__}, expected class scores without an activation")
    if isinstance(net.segmentation_head, nn.Sequential):
        taps["head"] = "segmentation_head.0:in"
    return Outside(net, taps, IMAGENET_RGB, net.encoder.output_stride, architecture=architecture,
                   backbone=("encoder.",), prefix="encoder.")


def tv(name: str, num_class: int, aux: bool) -> Outside:
    """torchvision.models.segmentation."""
    import_torchvision()
    from torchvision.models import get_model, list_models, segmentation  # after the compatibility step

    known = list_models(module=segmentation)
    if name not in known:
        raise UserError(f"tv:{name}: expected one of {', '.join(known)}")
    more = {} if name.startswith("lraspp") else {"aux_loss": aux}
    net = get_model(name, weights=None, weights_backbone=None, num_classes=num_class, **more)
    if name.startswith("lraspp"):
        return Outside(net, {"c3": "backbone[0]", "c4": "backbone[1]", "head": "classifier.cbr"}, **BACKBONE)
    stages = [stage for stage in ("layer1", "layer2", "layer3", "layer4") if hasattr(net.backbone, stage)]
    taps = {f"c{i}": f"backbone.{stage}" for i, stage in enumerate(stages, start=1)} or {"c4": "backbone[0]"}
    taps["head"] = f"classifier.{len(net.classifier) - 1}:in"
    if aux:
        taps["aux"] = "aux_classifier"
    return Outside(net, taps, optional=() if aux else ("aux_classifier.",), **BACKBONE)


def module(name: str, num_class: int, aux: bool) -> Outside:
    """PACKAGE.FILE:CALLABLE. Called with num_class or num_classes if it takes one. What it returns may have the
    attributes taps, preprocess ('bgr', 'rgb' or a Preprocess) and multiple, see :class:`Outside`."""
    path, _, attribute = name.rpartition(":")
    if not path or not attribute:
        raise UserError(f"module:{name}: expected module:PACKAGE.FILE:CALLABLE")
    add_here()
    try:
        build = getattr(importlib.import_module(path), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"module:{name}: {first_line(error)} (modules are looked for from {Path.cwd()})") from error
    net = call(build, num_class, name)
    if not isinstance(net, nn.Module):
        raise UserError(f"module:{name}: returned a {type(net).__name__}, expected an nn.Module")
    return Outside(net, dict(getattr(net, "taps", {})), get_preprocess(getattr(net, "preprocess", IMAGENET_RGB)),
                   int(getattr(net, "multiple", 1)))


def module_file(model: str) -> Path | None:
    """The file of a network that ``module:`` names; None for other networks, and where there is none."""
    source, _, name = model.partition(":")
    path = name.rpartition(":")[0]
    if source != "module" or not path:
        return None
    add_here()
    try:
        found = importlib.util.find_spec(path)
    except (ImportError, ValueError):
        return None
    return Path(found.origin).resolve() if found is not None and found.origin is not None else None


def add_here() -> None:
    """Look for modules in the current folder too."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)


def call(build: Callable[..., Any], num_class: int, name: str) -> Any:
    """Call with the number of classes under the name that it has, or without."""
    try:
        wanted = inspect.signature(build).parameters
    except (TypeError, ValueError):
        wanted = {}
    given = {key: num_class for key in ("num_class", "num_classes") if key in wanted}
    try:
        return build(**given)
    except Exception as error:  # of any kind: somebody else's code
        raise UserError(f"module:{name}: {type(error).__name__}: {first_line(error)}") from error


def mmseg(name: str, num_class: int, aux: bool) -> Outside:
    """mmsegmentation's DeepLabV3, PSPNet and SegFormer, which need nothing installed."""
    if (size := segformer.size_of(name)) is not None:
        return Outside(segformer.Segformer(size, num_class), segformer.TAPS, **BACKBONE)
    net = mmsegmentation.MMSegNet(mmsegmentation.parse(name), num_class, aux)
    return Outside(net, mmsegmentation.taps(aux), optional=() if aux else ("auxiliary_head.",), **BACKBONE)


def cirkd(name: str, num_class: int, aux: bool) -> Outside:
    """CIRKD's SegFormer, which needs nothing installed."""
    return Outside(cirkd_segformer.Segformer(cirkd_segformer.parse(name), num_class), cirkd_segformer.TAPS, CAFFE_BGR,
                   backbone=("patch_embed", "block", "norm"))


def suggestion(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the network that an mmsegmentation file looks like, '' where it is none of these; None when it is no
    file of mmsegmentation."""
    return segformer.suggestion(tensors) or mmsegmentation.suggestion(tensors)


SOURCES: dict[str, Callable[[str, int, bool], Outside]] = {"smp": smp, "tv": tv, "hf": hf, "mmseg": mmseg,
                                                           "cirkd": cirkd, "module": module}
#: those whose names may be folders of this machine: from (name, classes, architecture) to the network
DESCRIBED: dict[str, Callable[[str, int, Mapping[str, Any]], Outside]] = {"smp": described_smp, "hf": described_hf}
