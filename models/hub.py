"""Networks that leave: a folder with weights and a description, on this machine or on the Hugging Face hub.

    save_pretrained(net, "student", classes=("road", "car"))
    net = from_pretrained("student")                    # or from_pretrained("owner/name"), from the hub

The folder holds ``model.safetensors``, whose names are those of the released checkpoints, and ``config.json``.
"""
from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from models.outside import check_said, portable
from models.preprocess import Preprocess
from models.registry import get_segmentation_model
from models.weight_files import describe, unwrap
from models.weights import load_weights
from utils.errors import UserError
from utils.extras import need
from utils.files import write_atomically, write_json
from utils.tensor_files import first_line

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = "afdcd-1"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
#: what is sent to the hub, and nothing else that may lie in the folder
PUBLISHED = (CONFIG, "README.md", "*.safetensors", "*.onnx", "*.pt2")
#: fields of ``config.json`` that a network cannot be made without
REQUIRED = ("model", "backbone", "num_class", "aux", "preprocess")


def save_pretrained(net: nn.Module, folder: str | os.PathLike, *, classes: Sequence[str] | None = None,
                    palette: Sequence[Sequence[int]] | None = None, more: Mapping[str, Any] | None = None) -> None:
    """Write the weights of a network, and what they are weights of, into a folder. Each file is written atomically.

    classes: names in the order of the logits. palette: RGB 0..255 of each. more: further entries of ``config.json``.
    Raises UserError when safetensors is not installed, a count does not fit, or a file cannot be written."""
    safetensors, net, folder = need("safetensors.torch", "export"), unwrap(net), Path(folder).expanduser()
    config = build_config(net, classes, palette) | dict(more or {})
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in net.state_dict().items()}
    try:
        content = safetensors.save(tensors, metadata={"format": "pt"})  # its own file could be read by nobody else
        write_atomically(folder / WEIGHTS, lambda p: p.write_bytes(content))
        write_json(folder / CONFIG, config)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({first_line(error)})") from error


def build_config(net: nn.Module, classes: Sequence[str] | None = None,
                 palette: Sequence[Sequence[int]] | None = None) -> dict[str, Any]:
    """The content of ``config.json``, as JSON values. UserError when classes or colors are not one per logit."""
    for what, values in (("class names", classes), ("colors", palette)):
        if values is not None and len(values) != net.num_class:
            raise UserError(f"{net.name}: {len(values)} {what} for {net.num_class} classes")
    return {"format": FORMAT, **describe(net), "model": portable(net.model), "output_stride": net.output_stride,
            "classes": None if classes is None else list(classes),
            "palette": None if palette is None else [[int(value) for value in color] for color in palette]}


def from_pretrained(source: str | os.PathLike, model: str | None = None) -> nn.Module:
    """The network of a folder of :func:`save_pretrained`, or of a repository of the hub, in eval mode on the CPU.

    model: what ``config.json`` names as its model, where that is ``module:...``, whose code is run. Raises UserError
    when there is none, when it cannot be fetched, for files that do not fit together, and for a model of that kind that
    was not named."""
    folder = fetch(source)
    config = read_config(folder)
    check_said(config, source, model)
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder}: no {WEIGHTS}; expected a folder of tools/export.py --to safetensors")
    net = get_segmentation_model(config["model"], config["backbone"], config["num_class"], config["aux"],
                                 head_width=config.get("head_width"), architecture=config.get("architecture"))
    load_weights(net, folder / WEIGHTS, preprocess=config["preprocess"])
    if "trained_on" in config:
        net.trained_on = config["trained_on"]
    return net.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a folder; 'preprocess' is a Preprocess. UserError when it is missing or no such file."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); expected that of tools/export.py") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT or not config.keys() >= set(REQUIRED):
        raise UserError(f"{path}: expected a file of tools/export.py, with format {FORMAT} and "
                        f"{', '.join(REQUIRED)}")
    try:
        return {**config, "preprocess": Preprocess.from_dict(config["preprocess"])}
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: 'preprocess' is not usable ({first_line(error)})") from error


def fetch(source: str | os.PathLike) -> Path:
    """The folder itself where it is one; else that of a repository of the hub, ``owner/name``, downloaded once.

    UserError when there is none."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    name = os.fspath(source)
    if folder.exists() or not HUB_ID.fullmatch(name):
        raise UserError(f"{name}: no such folder; expected one of tools/export.py, or OWNER/NAME on the Hugging Face "
                        "hub")
    hub = need("huggingface_hub", "hub")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # the hub's own errors, those of three HTTP libraries, OSError, ValueError
        raise UserError(f"{name}: no such folder here, and the Hugging Face hub gives none of that name "
                        f"({first_line(error)})") from error


def push_to_hub(folder: str | os.PathLike, repo: str, *, private: bool = True, token: str | None = None) -> str:
    """Upload a folder of :func:`save_pretrained` or ``tools/export.py``; the address of its page.

    repo: OWNER/NAME, created when it is not there. token: default the one that ``hf auth login`` has stored. Raises
    UserError for a folder that holds no network, a malformed name, and when the hub refuses."""
    folder = Path(folder).expanduser()
    read_config(folder)
    if not HUB_ID.fullmatch(repo):
        raise UserError(f"{repo}: expected OWNER/NAME on the Hugging Face hub")
    api = need("huggingface_hub", "hub").HfApi(token=token)
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=list(PUBLISHED))
    except Exception as error:  # see fetch
        raise UserError(f"{repo}: the Hugging Face hub did not take {folder} ({first_line(error)})") from error
    return str(address)
