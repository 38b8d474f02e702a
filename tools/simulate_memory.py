#!/usr/bin/env python3
"""Peak memory and operations of a training step on a GPU, without a GPU and without data.

    python tools/simulate_memory.py                                    # the published rows of Af-DCD
    python tools/simulate_memory.py --rows citys-r18 --batch 16 --method kd cirkd mgd --json memory.json
    python tools/simulate_memory.py --variants plain fast --variant 'parts=--amp bf16 --grad-accumulation 4'

The step runs on tensors that have a size but no values (``utils/simulated_gpu.py``) while ``utils/memory.py`` follows
their storages: weights, gradients, momentum, activations and what they become in the second step. Not in the figures:
workspaces of cuDNN, gaps between blocks, the CUDA context; together often one to three GB.
"""
from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import engine.build
from engine.ready import get_ready
from engine.run import Run, train_batch
from engine.settings import Settings, parse_settings
from engine.unlabelled import images_without_labels
from losses.core import methods
from models.preprocess import _per_channel
from utils.cli import parse_options, run_main
from utils.distributed import Distributed
from utils.errors import UserError
from utils.files import check_target, write_json
from utils.flops import FlopCounter
from utils.memory import MemoryTracker
from utils.options import OptionGroup, option
from utils.simulated_gpu import simulated_gpu

R18, MBV2 = ("deeplabv3", "resnet18"), ("deeplab_mobile", "mobilenetv2")
#: name -> (data set, crop, (model, backbone) of the student); the teacher is always DeepLabV3-ResNet101
ROWS: Mapping[str, tuple[str, tuple[int, int], tuple[str, str]]] = {
    "citys-r18": ("citys", (512, 1024), R18), "citys-mbv2": ("citys", (512, 1024), MBV2),
    "citys-psp-r18": ("citys", (512, 1024), ("psp", "resnet18")), "ade20k-r18": ("ade20k", (512, 512), R18),
    "coco-r18": ("coco_stuff_164k", (512, 512), R18), "voc-r18": ("voc", (512, 512), R18),
    "camvid-r18": ("camvid", (360, 360), R18)}
VARIANTS = {"plain": "--no-fast", "fast": "--fast", "bf16": "--fast --amp bf16 --channels-last"}
SMALL = {"resnet101": "resnet18_w0.5", "resnet18": "resnet18_w0.25", "mobilenetv2": "mobilenetv2_w0.25"}


@dataclass(frozen=True)
class Options(OptionGroup):
    """The command line."""

    rows: tuple[str, ...] = option(("citys-r18", "citys-mbv2", "ade20k-r18", "voc-r18", "camvid-r18"),
                                   "published configurations", choices=lambda: tuple(ROWS), metavar="ROW")
    method: tuple[str, ...] = option(("afdcd",), "presets", choices=lambda: ("none", *methods()), metavar="NAME")
    batch: tuple[int, ...] = option((16, 2), "images per GPU", at_least=2, metavar="N")
    variants: tuple[str, ...] = option(tuple(VARIANTS), "the first is what the others are compared with",
                                       choices=lambda: tuple(VARIANTS), metavar="NAME")
    variant: tuple[str, ...] = option((), "one more variant and its flags, may be repeated", nargs="append",
                                      metavar="NAME=FLAGS")
    flags: str = option("", "flags of train_kd.py for every variant, in one word", metavar="FLAGS")
    json: str | None = option(None, "write all figures there too", metavar="FILE")
    short: bool = option(False, "a few seconds with narrow networks: shows that it runs")


def settings_of(row: str, method: str, batch: int, flags: list[str], short: bool, folder: str) -> Settings:
    """The settings of one figure: those of the published row, then ``flags``."""
    dataset, crop, student = ROWS[row]
    nets = [student, ("deeplabv3", "resnet101")]
    if short:
        nets = [(model, SMALL[backbone]) for model, backbone in nets]
    words = [word for role, net in zip(("student", "teacher"), nets, strict=True)
             for word in (f"--{role}-model", net[0], f"--{role}-backbone", net[1])]
    settings = parse_settings([
        *words, "--method", method, "--dataset", dataset, "--crop-size", *map(str, crop), "--batch-size", str(batch),
        "--teacher-pretrained", "random", "--skip-val", "--no-tensorboard", "--save-dir", folder, "--log-dir", folder,
        *flags])
    return replace(settings, networks=replace(settings.networks, teacher_pretrained=None))


def build(settings: Settings, device: torch.device) -> Run:
    """The run as the program builds it, without data, hence with the teacher itself where its scores are stored; its
    weights have no values. Stages before training change no size."""
    settings = replace(settings, networks=replace(settings.networks, teacher_scores=None))
    with mock.patch.object(engine.build, "build_dataset", lambda *args, **kwargs: None), \
            mock.patch.object(engine.build, "build_unlabeled", lambda *args: None), \
            mock.patch.object(engine.build, "weights_digest", lambda tensors: ""), \
            mock.patch.object(engine.build.data, "fingerprint", lambda splits: None):
        run = engine.build.build_run(settings, Distributed(0, 1, 0, device))
    get_ready(run)
    run.model.train()
    return run


def loader_batch(settings: Settings) -> dict[str, torch.Tensor]:
    """What the loader delivers, on the CPU."""
    images, crop = settings.optimization.batch_size + images_without_labels(settings), settings.data.crop_size
    return {"image": torch.zeros((images, 3, *crop), dtype=torch.uint8),
            "valid": torch.zeros((images, 4), dtype=torch.int32), "label": torch.zeros((images, *crop),
                                                                                     dtype=torch.int16)}


def simulate(settings: Settings) -> dict[str, float]:
    """Bytes of a step: ``peak``, and ``kept`` between two steps (weights, momentum, queues); ``flop`` per image in
    convolutions and matrix products, forward and backward."""
    _per_channel.cache_clear()
    with simulated_gpu() as device, MemoryTracker(device.type) as memory:
        run, batch = build(settings, device), loader_batch(settings)
        with FlopCounter() as flops:
            train_batch(run, batch)
        run.step, kept = 1, memory.now
        memory.reset_peak()
        train_batch(run, batch)
        figures = {"peak": memory.peak, "kept": kept,
                   "flop": flops.total / settings.optimization.batch_size}
    _per_channel.cache_clear()
    return figures


def variants(options: Options) -> dict[str, list[str]]:
    """{variant: its flags}."""
    chosen = {name: VARIANTS[name] for name in options.variants}
    for text in options.variant:
        name, equals, flags = text.partition("=")
        if not (name and equals):
            raise UserError(f"--variant {text}: expected NAME=FLAGS, for example 'half=--amp bf16'")
        chosen[name] = flags
    return {name: [*shlex.split(options.flags), *shlex.split(flags)] for name, flags in chosen.items()}


def figures(options: Options) -> Iterator[dict[str, Any]]:
    """One record per row, method, batch and variant; "refused" in place of figures that cannot be."""
    with tempfile.TemporaryDirectory() as folder:
        for row in options.rows:
            for method in options.method:
                for batch in options.batch:
                    for name, flags in variants(options).items():
                        record = {"row": row, "method": method, "batch": batch, "variant": name}
                        settings = settings_of(row, method, batch, flags, options.short, folder)
                        try:
                            yield {**record, **simulate(settings)}
                        except UserError as error:
                            yield {**record, "refused": str(error)}


def line(record: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """A row of the table. base: the record that it is compared with."""
    cells = [record["row"], record["method"], str(record["batch"]), record["variant"]]
    if "refused" in record:
        return f"| {' | '.join([*cells, record['refused'], '', '', ''])} |"
    ratio = f"{record['peak'] / base['peak']:.2f}" if "peak" in base else "-"
    cells += [f"{record['kept'] / 1e9:.2f}", f"{record['peak'] / 1e9:.2f}", ratio, f"{record['flop'] / 1e12:.3f}"]
    return f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> int:
    """Print one Markdown table, row by row. Returns the exit code."""
    options = parse_options(Options, argv, prog="simulate_memory.py", description=__doc__.split("\n")[0])
    if options.json:
        check_target(Path(options.json), "--json", is_folder=False)
    print("| row | method | batch | variant | kept (GB) | peak (GB) | x first | TFLOP per image |\n"
          "|---|---|---:|---|---:|---:|---:|---:|")
    records, base = [], {}
    for record in figures(options):
        if record["variant"] == next(iter(variants(options))):
            base = record
        records.append(record)
        print(line(record, base), flush=True)
    if options.json:
        write_json(Path(options.json), {"torch": torch.__version__, "options": asdict(options), "results": records})
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
