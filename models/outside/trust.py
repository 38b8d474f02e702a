"""What a description of a network may ask for. It comes with weights, perhaps a stranger's: what would run code or be
fetched is refused, unless the caller names it too."""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError

#: entries of a configuration of transformers, at any depth, that lead to code, or to files elsewhere
UNSAFE = ("auto_map", "trust_remote_code", "custom_pipelines", "quantization_config", "kernel_config", "use_kernels",
          "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "model_args", "architecture")
IMPLEMENTATION = "implementation"  # of attention and the like: may be a kernel of the hub
KWARGS, PRETRAINED = "backbone_kwargs", "use_pretrained_backbone"
SAFE_KWARGS = {"out_indices", "out_features"}
#: parameters of smp's encoders, beside those of its architectures
SAFE_ENCODER = {"img_size", "dynamic_img_size", "drop_rate", "drop_path_rate"}
ORIGIN = "_name_or_path"  # may be a folder of this machine
PLAIN = re.compile(r"[\w.-]+")  # a name of a library's own table: no folder, no repository


def check_said(said: Mapping[str, Any], where: object, named: str | None = None, setting: str = "model") -> None:
    """UserError for a description whose model is code to run, or something to fetch that it does not describe.

    where: names it. named: the model that the caller has asked for, which may be that. setting: that would name it, ""
    where there is none."""
    model = said.get("model")
    if not isinstance(model, str) or model == named:
        return
    source, _, name = model.partition(":")
    settings = [setting] if setting else []
    if source == "module":
        raise UserError(f"{where}: its model is {model}, code that would be run here: look at it, then name the model "
                        f"yourself, {model}", settings=settings)
    fetched = source == "hf" or source == "smp" and (Path(name).expanduser().is_dir() or not _is_plain(name))
    if fetched and said.get("architecture") is None:
        raise UserError(f"{where}: its model is {model}, which would be fetched or read from elsewhere, since no "
                        f"'architecture' describes it: name the model yourself, {model}", settings=settings)


def _is_plain(name: str) -> bool:
    """Whether a name of smp, ARCHITECTURE:ENCODER, is of its tables alone."""
    return all(PLAIN.fullmatch(part) for part in name.split(":")) and name.count(":") <= 1


def check_hf(value: Any) -> None:
    """ValueError, naming the entry, for a configuration of transformers that leads to code or to files elsewhere."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if inner not in (None, False, "", {}) and _is_unsafe(key, inner, value):
                raise ValueError(f"the entry {key!r} is refused: it can lead to code or files elsewhere")
    for inner in _inside(value):
        check_hf(inner)


def without_unsafe(value: Any) -> Any:
    """A configuration of transformers without what :func:`check_hf` refuses, and without the folder that it is of."""
    if isinstance(value, Mapping):
        kept = {}
        for key, inner in value.items():
            if key == PRETRAINED:  # left out, it would be true for some
                kept[key] = False
            elif key == KWARGS and isinstance(inner, Mapping):
                kept[key] = {name: entry for name, entry in inner.items() if name in SAFE_KWARGS}
            elif key != ORIGIN and not _is_unsafe(key, inner, value):
                kept[key] = without_unsafe(inner)
        return kept
    return [without_unsafe(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, (list, tuple)) else ()


def _is_unsafe(key: str, value: Any, around: Mapping[str, Any]) -> bool:
    if key == "backbone":
        of_timm = around.get("use_timm_backbone") is True or around.get("model_type") == "timm_backbone"
        return value is not None and not (of_timm and isinstance(value, str) and bool(PLAIN.fullmatch(value)))
    if key == KWARGS:
        return value is not None and not (isinstance(value, Mapping) and value.keys() <= SAFE_KWARGS)
    return key == PRETRAINED and value is not False and value is not None or key in UNSAFE or IMPLEMENTATION in key


def check_smp(architecture: Mapping[str, Any], known: Iterable[str]) -> None:
    """ValueError for entries that are no parameters of the architecture, and for an encoder of elsewhere.

    known: the parameters."""
    if strange := sorted(map(str, set(architecture) - set(known) - SAFE_ENCODER)):
        raise ValueError(f"refused, since they are no parameters of the architecture: {', '.join(strange)}")
    encoder = architecture.get("encoder_name", "")
    if not isinstance(encoder, str) or encoder and not PLAIN.fullmatch(encoder):
        raise ValueError(f"the encoder {encoder!r} is refused: expected a name of its table")
