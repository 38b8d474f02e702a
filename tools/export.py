#!/usr/bin/env python3
"""A trained network as a folder for others: weights, a description, a model card; as ONNX or .pt2 if wanted.

    python tools/export.py work_dir/student --out leaving
    python tools/export.py work_dir/student --to safetensors onnx --with-preprocessing --with-argmax --out leaving

The first argument is the folder of a run, a weights file, or a folder of this tool. ONNX and .pt2 files take any batch
and any size, and are compared with PyTorch on two sizes before they are written.
"""
from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.trained import Known, Trained, open_trained
from models.hub import CONFIG, WEIGHTS, build_config, push_to_hub, read_config, save_pretrained
from tools.exporting.card import model_card, read_record
from tools.exporting.check import check, load_onnx, load_pt2
from tools.exporting.graph import Form, describe_form, input_divisor, trace, write_onnx, write_pt2
from tools.markdown import table
from utils.cli import ArgumentParser, read_options, run_main
from utils.errors import UserError
from utils.extras import need
from utils.files import check_target, sha256, write_atomically, write_json, write_text
from utils.options import OptionGroup, option

#: form: its file
FILES = {"safetensors": WEIGHTS, "onnx": "model.onnx", "torch-export": "model.pt2"}
PACKAGES = {"safetensors": ("safetensors",), "onnx": ("onnx", "onnxscript", "onnxruntime"), "torch-export": ()}


@dataclass(frozen=True, kw_only=True)
class Export(OptionGroup):
    """What is written."""

    to: tuple[str, ...] = option(("safetensors",), "safetensors: weights alone; onnx, torch-export: the network as a "
                                                   "graph", choices=tuple(FILES))
    out: str | None = option(None, "folder to write (default: exported, beside the weights)", metavar="DIR")
    with_preprocessing: bool = option(False, "graphs take uint8 RGB pictures [batch, height, width, 3] and normalize "
                                             "them")
    with_argmax: bool = option(False, "graphs return the class of every pixel [batch, height, width] in place of "
                                      "logits at the network's stride")
    size: tuple[int, int] | None = option(None, "graphs take pictures of this size only", at_least=8,
                                          metavar=("H", "W"))
    push_to: str | None = option(None, "then upload the folder to the Hugging Face hub, as a private repository",
                                 metavar="OWNER/NAME")


def previous_config(folder: Path, digest: str) -> dict[str, Any]:
    """The ``config.json`` that is in the folder already, {} for none. UserError when it is of other weights."""
    if not (folder / CONFIG).is_file():
        return {}
    config = read_config(folder)
    if config.get("source", {}).get("sha256") != digest:
        raise UserError(f"--out {folder}: holds another network; choose another folder, or remove it")
    return config


def origin(trained: Trained) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the file that the weights come from, what is known of their training), as ``config.json`` has them. A folder of
    this tool says it itself."""
    if trained.file.name == WEIGHTS and (trained.file.parent / CONFIG).is_file():
        config = read_config(trained.file.parent)
        if "source" in config:
            return config["source"], config["training"]
    return {"file": trained.file.name, "sha256": sha256(trained.file)}, read_record(trained)


def target(source: str, trained: Trained, out: str | None) -> Path:
    """The folder to write. UserError when it cannot be written."""
    if out is None and not Path(source).expanduser().exists():
        raise UserError("--out is missing: expected the folder to write what comes from the hub into")
    is_exported = trained.file.name == WEIGHTS
    beside = trained.file.parent if is_exported else trained.file.parent / "exported"
    folder = beside if out is None else Path(out).expanduser()
    check_target(folder, "--out", is_folder=True)
    return folder


def write_graphs(trained: Trained, options: Export, folder: Path, divisor: int) -> dict[str, Any]:
    """Write the graphs that are asked for; {form: what ``config.json`` says of it}."""
    wanted = [name for name in dict.fromkeys(options.to) if name != "safetensors"]
    if not wanted:
        return {}
    form, net, entries = Form(options.with_preprocessing, options.with_argmax, options.size), trained.net, {}
    program, least = trace(net, form, divisor)
    for name in wanted:
        path, said = folder / FILES[name], {}

        def write(temporary: Path, name: str = name, path: Path = path, said: dict[str, Any] = said) -> None:
            if name == "onnx":
                said["opset"] = write_onnx(program, form, temporary)
                graph = load_onnx(temporary)
            else:
                write_pt2(program, temporary)
                graph = load_pt2(temporary)
            said["check"] = check(net, form, graph, divisor, str(path)).to_dict()

        write_atomically(path, write)
        entries[name] = {"file": path.name, **describe_form(net, form, least), **said}
    return entries


def report(folder: Path, config: dict[str, Any], names: list[str]) -> str:
    """A table of the written files."""
    rows = []
    for name in names:
        one = config["exports"].get(name, {}).get("check")
        size = (folder / FILES[name]).stat().st_size / 1e6
        checked = [f"{one['max_difference']:.2e}", f"{100 * one['agreement']:.3f}"] if one else ["-", "-"]
        rows.append([FILES[name], f"{size:.2f}", *checked])
    return table(["file", "MB", "largest difference", "same class %"], rows)


def parse(argv: list[str] | None) -> tuple[str, Export, Known]:
    """(network, what is written, what is known of the network)."""
    parser = ArgumentParser(prog="export.py", description=__doc__.split("\n")[0],
                            usage="%(prog)s RUN_OR_WEIGHTS [options]")
    parser.add_argument("source", metavar="RUN_OR_WEIGHTS",
                        help="folder of a run, weights file, folder of this tool, or OWNER/NAME on the Hugging Face "
                             "hub")
    parser.add_options(parser.add_argument_group("output"), Export)
    parser.add_options(parser.add_argument_group("network", "What the files of the network do not say."), Known)
    parsed = parser.parse_args(argv)
    return parsed.source, read_options(vars(parsed), Export), read_options(vars(parsed), Known)


def main(argv: list[str] | None = None) -> int:
    """Write the folder, say what was measured, upload it where asked. Returns the exit code."""
    source, options, known = parse(argv)
    names = list(dict.fromkeys(options.to))
    for package in (package for name in names for package in PACKAGES[name]):
        need(package, "export")
    trained = open_trained(source, known)
    folder, divisor = target(source, trained, options.out), input_divisor(trained.net)
    weights, training = origin(trained)
    before = previous_config(folder, weights["sha256"])
    graphs = write_graphs(trained, options, folder, divisor)
    more = {"input_divisor": divisor, "source": weights, "training": training,
            "exports": {**before.get("exports", {}), **graphs}}
    palette = None if trained.palette is None else trained.palette.tolist()
    if "safetensors" in names:
        save_pretrained(trained.net, folder, classes=trained.classes, palette=palette, more=more)
    else:
        write_json(folder / CONFIG, build_config(trained.net, trained.classes, palette) | more)
    config = read_config(folder)
    write_text(folder / "README.md", model_card(config))
    print(f"{trained.net.name}, {trained.net.num_class} classes: {folder}\n\n{report(folder, config, names)}")
    if options.push_to is not None:
        print(f"\n{push_to_hub(folder, options.push_to)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
