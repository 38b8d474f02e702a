"""Weight files on disk (or at torchvision's servers): reading them safely, and writing them.

A written file is a plain state dict with the names of the released checkpoints. What the names cannot say, first of
all the preprocessing, stands in a small JSON file beside it (``student.pth`` -> ``student.pth.json``).
"""
from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.preprocess import Preprocess
from models.published import how_to_get, local, place
from models.torchvision_compat import import_torchvision
from utils.errors import UserError
from utils.extras import need
from utils.files import write_json
from utils.tensor_files import first_line, load_tensors, save_tensors

TORCHVISION = "torchvision:"  # before one of torchvision's weight names: torchvision:ResNet50_Weights.IMAGENET1K_V2
NESTING = ("state_dict", "model", "net")  # keys under which programs nest the tensors; 'model' in this repository
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # what DataParallel and torch.compile put before every name
INFO_KEY = "net_info"  # key of a training checkpoint under which :func:`describe` may be stored


@dataclass(frozen=True)
class WeightFile:
    """What a source holds. name: for messages; tensors: by unwrapped name; info: as :func:`describe`, if known."""

    name: str
    tensors: dict[str, Tensor]
    info: dict[str, Any] | None = None

    @property
    def from_torchvision(self) -> bool:
        """Whether the source was one of torchvision's weight names."""
        return self.name.startswith(TORCHVISION)

    def channels_into(self, convolution: str) -> int | None:
        """Input channels of the convolution with this weight; None when the file has no such weight."""
        weight = self.tensors.get(convolution)
        return weight.shape[1] if weight is not None and weight.dim() == 4 else None


def is_given(source: str | os.PathLike | None) -> bool:
    """False for None, False, '' and 'None' (in any case): nothing to load."""
    return source is not None and source is not False and str(source).strip().lower() not in ("", "none")


def open_weights(source: str | os.PathLike) -> WeightFile:
    """Read a path, a torchvision weight name, or what ``get:NAME`` names (see ``published.py``). Raises UserError, in
    one line, for whatever is no set of tensors."""
    if not isinstance(source, (str, os.PathLike)):
        raise UserError(f"weights must be given as a path, got {source!r}")
    name = os.fspath(local(source))
    if name.startswith(TORCHVISION):
        return WeightFile(name, _tensors(name, _download(name)))
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(f"{path}: no such weights file{how_to_get(path)}")
    content = read_safetensors(path) if path.suffix == ".safetensors" else load_tensors(path, "weights file")
    info = read_info(path)
    nested = content.get(INFO_KEY) if isinstance(content, Mapping) else None
    return WeightFile(name, _tensors(name, content), _checked_info(name, nested) if info is None else info)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file. Raises UserError when it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    try:
        return need("safetensors.torch", "export").load_file(path)
    except (OSError, ValueError, need("safetensors", "export").SafetensorError) as error:
        raise UserError(f"{path}: not a weights file that can be loaded ({first_line(error)})") from error


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a weight file (of a training checkpoint: the student's) by unwrapped name. Raises UserError."""
    return open_weights(path).tensors


def read_info(path: str | os.PathLike) -> dict[str, Any] | None:
    """The JSON file beside ``path`` (see :func:`describe`), or None. A ``get:NAME`` is not fetched for it. Raises
    UserError when it is not readable."""
    beside = _info_path(Path(place(path)).expanduser())
    if not beside.is_file():
        return None
    try:
        content = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{beside}: not readable as JSON ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{beside}: expected a JSON object")
    return _checked_info(str(beside), content)


def describe(net: nn.Module) -> dict[str, Any]:
    """What a plain state dict does not say, as JSON values: model, backbone, num_class, aux, preprocess and, if known,
    what it was trained on, if it is not the usual one, the width of its head, and, of a network of another library
    whose name may be a folder of this machine, its architecture."""
    more = {"head_width": getattr(net, "head_width", None), "trained_on": net.trained_on,
            "architecture": getattr(net, "architecture", None)}
    return {"model": net.model, "backbone": net.backbone, "num_class": net.num_class, "aux": net.aux,
            "preprocess": net.preprocess.to_dict(), **{k: v for k, v in more.items() if v is not None}}


def save_state_dict(net: nn.Module, path: str | os.PathLike) -> None:
    """Write the weights of a network, wrapped or not, as a plain state dict, and ``<path>.json``, each atomically.

    Folders are created. Raises UserError when a file cannot be written."""
    net, path = unwrap(net), Path(path).expanduser()
    save_tensors(path, OrderedDict((k, v.detach().cpu().contiguous()) for k, v in net.state_dict().items()))
    try:
        write_json(_info_path(path), describe(net))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({first_line(error)})") from error


def unwrap(net: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel and torch.compile."""
    while isinstance(inner := getattr(net, "module", None) or getattr(net, "_orig_mod", None), nn.Module):
        net = inner
    return net


def _info_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _checked_info(name: str, info: Any) -> dict[str, Any] | None:
    """A copy of ``info`` whose 'preprocess' is a Preprocess (absent when it says nothing) and whose 'trained_on', if
    any, names classes; None stays None."""
    if info is None:
        return None
    if not isinstance(info, Mapping):
        raise UserError(f"{name}: the network's description should be a mapping, got {type(info).__name__}")
    info = {key: value for key, value in info.items() if key != "preprocess" or value is not None}
    try:
        if "preprocess" in info:
            info["preprocess"] = Preprocess.from_dict(info["preprocess"])
    except (ValueError, TypeError) as error:
        raise UserError(f"{name}: 'preprocess' is not usable ({first_line(error)})") from error
    if "trained_on" in info and not _is_trained_on(info["trained_on"]):
        raise UserError(f"{name}: 'trained_on' is not usable (expected an object with a list of names as \"classes\")")
    return info


def _is_trained_on(value: Any) -> bool:
    names = value.get("classes") if isinstance(value, Mapping) else None
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def _download(name: str) -> Any:
    """The state dict of a torchvision weight name; from torchvision's cache folder when it is there already."""
    import_torchvision()
    from torchvision.models import get_weight  # after the compatibility step

    try:
        weight = get_weight(name.removeprefix(TORCHVISION))
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{name}: torchvision knows no such weights (expected e.g. "
                        f"{TORCHVISION}ResNet50_Weights.IMAGENET1K_V2)") from error
    try:
        return weight.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{name}: download from {weight.url} failed ({first_line(error)})") from error


def _tensors(name: str, content: Any) -> dict[str, Tensor]:
    """Unwrap the nesting, check that every entry is a plain tensor, strip wrapper prefixes."""
    for _ in range(4):  # deeper than any program nests
        nested = [key for key in NESTING if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)]
        if nested:
            content = content[nested[0]]
    if not isinstance(content, Mapping) or not content:
        what = "empty" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise UserError(f"{name}: expected a dict of named tensors, its content is {what}")
    tensors: dict[str, Tensor] = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.is_meta or value.is_complex() \
                or value.layout is not torch.strided or value.is_quantized:
            raise UserError(f"{name}: expected a dict of named tensors, entry {key!r} is a {type(value).__name__}"
                            f"{' of an unsupported kind' if isinstance(value, Tensor) else ''}")
        short = WRAPPERS.sub("", key)
        if short in tensors:
            raise UserError(f"{name}: tensor {short!r} occurs twice, with and without a wrapper prefix")
        tensors[short] = value.detach()
    return tensors
