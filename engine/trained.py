"""A trained network and what is known of it, wherever it comes from: a run, a weights file, an exported folder, the
hub."""
from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from dataset import get_dataset_spec, list_datasets
from dataset.palette import bit_palette
from engine.log import LOG
from engine.run_folder import config_of, weights_of
from models import NetworkChoice, read_info
from models.hub import CONFIG, WEIGHTS, fetch, from_pretrained, read_config
from models.outside import check_said
from models.published import how_to_get
from utils.errors import UserError
from utils.options import OptionGroup, option

ENDINGS = (".pth", ".pt", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class Known(OptionGroup):
    """What the caller knows of a network. None: what its files say."""

    weights: str = option("best", "of a run: the best on its validation split, or the last", choices=("best", "last"))
    model: str | None = option(None, "architecture (default: what the JSON file beside the weights says)")
    backbone: str | None = option(None, "backbone (default: as --model)")
    num_class: int | None = option(None, "number of classes (default: as --model, or that of --dataset)", at_least=1)
    dataset: str | None = option(None, lambda: "data set that names the classes (default: that of the run): "
                                               f"{', '.join(list_datasets())}")
    data: str | None = option(None, "its root folder, which --dataset folder needs", metavar="DIR")
    preprocess: str | None = option(None, "input of the network: BGR minus mean, or RGB mean/std (default: what the "
                                          "weights say)", choices=("bgr", "rgb"))


@dataclass(frozen=True)
class Trained:
    """A trained network.

    net: in eval mode on the CPU. source: as it was named. file: its weights. classes, palette: names and RGB colors
    uint8 [K, 3] in the order of the logits, None where they are not known. run: the folder of the run that the file
    lies in, None for another file."""

    net: nn.Module
    source: str
    file: Path
    classes: tuple[str, ...] | None = None
    palette: np.ndarray | None = None
    run: Path | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names; "class 0", "class 1", ... where they are not known."""
        return self.classes or tuple(f"class {i}" for i in range(self.net.num_class))

    @property
    def colors(self) -> np.ndarray:
        """The palette; generated where it is not known."""
        return bit_palette(self.net.num_class, first=1) if self.palette is None else self.palette


def open_trained(source: str | os.PathLike, known: Known | None = None) -> Trained:
    """Find and load a trained network.

    source: the folder of a run (its ``--save-dir``), a weights file, a folder of ``tools/export.py``, or OWNER/NAME on
    the Hugging Face hub. The folder of a run is taken for the caller's own; the code of a model ``module:...`` that
    another source names is run only when ``known`` names it too. Raises UserError when it is none of these, when
    something is missing that neither the files nor ``known`` say, and for weights that do not fit."""
    known, path = known or Known(), Path(source).expanduser()
    if path.is_file() and not (path.name == WEIGHTS and (path.parent / CONFIG).is_file()):
        return _of_file(os.fspath(source), path, known)
    if path.is_dir() and not (path / CONFIG).is_file():
        config = config_of(path, instead=f", or a folder of tools/export.py, with its {CONFIG}")
        return _of_file(os.fspath(source), weights_of(config, known.weights), known, is_run=True)
    if not path.exists() and path.suffix in ENDINGS:
        raise UserError(f"{source}: no such weights file{how_to_get(path)}")
    return _of_folder(os.fspath(source), fetch(path.parent if path.is_file() else source), known)


def _of_folder(source: str, folder: Path, known: Known) -> Trained:
    """Of a folder with a ``config.json``, which says everything."""
    config = read_config(folder)
    said = [name for name in ("model", "backbone", "num_class", "preprocess") if getattr(known, name) is not None
            and (name != "model" or known.model != config["model"])]
    if said:
        raise UserError(f"{source}: its {CONFIG} says what it is", settings=said)
    net = from_pretrained(folder, known.model)
    labels = _Labels(tuple(config["classes"]) if config.get("classes") else None,
                     np.array(config["palette"], np.uint8) if config.get("palette") else None)
    if known.dataset is not None:
        labels = _labels(known.dataset, known.data)
    return _trained(net, source, folder / WEIGHTS, labels)


def _of_file(source: str, path: Path, known: Known, is_run: bool = False) -> Trained:
    """Of a weights file: described by the JSON file beside it, by the run that wrote it, or by the caller.

    is_run: the folder of the run was named, not the file."""
    config, info = read_run_config(path), read_info(path) or {}
    model, backbone = (next((value for value in (getattr(known, key), info.get(key), config.get(f"student_{key}"))
                             if value is not None), None) for key in ("model", "backbone"))
    check_said({"model": model, "architecture": info.get("architecture") if info.get("model") == model else None}, path,
               known.model or (config.get("student_model") if is_run else None))
    names = (info.get("trained_on") or {}).get("classes")
    labels = _Labels(tuple(names) if names else None)
    if known.dataset is not None:
        labels = _labels(known.dataset, known.data)
    elif config:
        try:
            found = _labels(config["dataset"], known.data or config["data"])
            if not names or found.classes == labels.classes:  # else other data lie there now
                labels = found
        except (KeyError, UserError) as error:
            LOG.warning("%s: the %s of its classes are not known: %s", path.name, "colors" if names else "names", error)
    num_class = known.num_class or info.get("num_class") or (len(labels.classes) if labels.classes else None)
    wanted = {"model": model, "backbone": backbone, "num_class": num_class}
    if missing := [name for name, value in wanted.items() if value is None]:
        raise UserError(f"{path}: no JSON file beside it says what network it is of: name it", settings=missing)
    net = NetworkChoice(model, backbone, str(path), preprocess=known.preprocess, aux=False).build(int(num_class))
    return _trained(net.eval(), source, path, labels, path.parent if config else None)


def read_run_config(weights: Path) -> dict[str, Any]:
    """{setting: value} of the run that wrote a weights file; {} when there is none beside it. UserError when it is not
    readable."""
    stem = re.sub(r"_(best_model|state|state_previous)$", "", weights.stem)
    path = weights.with_name(f"{stem}_config.json")
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a configuration of a run that can be read ({error})") from error


class _Labels(NamedTuple):
    """Names and colors of classes, where they are known."""

    classes: tuple[str, ...] | None = None
    palette: np.ndarray | None = None


def _labels(dataset: str, root: str | None) -> _Labels:
    spec = get_dataset_spec(dataset, root)
    return _Labels(spec.classes, spec.palette)


def _trained(net: nn.Module, source: str, file: Path, labels: _Labels, run: Path | None = None) -> Trained:
    for values in (labels.classes, labels.palette):
        if values is not None and len(values) != net.num_class:
            raise UserError(f"{source}: a network of {net.num_class} classes, but {len(values)} are named",
                            settings=["dataset", "num_class"])
    return Trained(net, source, file, labels.classes, labels.palette, run)
