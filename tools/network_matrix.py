#!/usr/bin/env python3
"""Which networks learn from which: two real steps of every teacher, student and method, on a few toy streets.

    python tools/network_matrix.py --methods kd cwd afdcd dist cirkd

Prints a Markdown table: a cell says that it trains, or has a letter for the reason under the table. The networks have
random weights; so has the SegFormer, which is described for the occasion.
"""
from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from dataset import get_dataset_spec
from dataset.toy_streets import write_toy_streets
from engine.build import build_run
from engine.run import train_batch, training_batches
from engine.settings import parse_settings
from losses.core import methods
from models import get_segmentation_model, save_state_dict
from tools.markdown import table
from utils.cli import describe_error, parse_options, run_main
from utils.distributed import init_distributed
from utils.errors import UserError
from utils.options import OptionGroup, option

#: stands for a folder with the description of a small SegFormer
RANDOM_SEGFORMER = "hf:segformer"
NETWORKS = ("deeplabv3 resnet18_w0.25", "deeplabv3 timm:mobilenetv3_small_050", "smp:Unet:resnet18", RANDOM_SEGFORMER)
STEPS, BATCH, CROP = 2, 2, 128


@dataclass(frozen=True)
class Settings(OptionGroup):
    """The command line."""
    networks: tuple[str, ...] = option(NETWORKS, "MODEL BACKBONE in quotes, or SOURCE:NAME", metavar="NETWORK")
    methods: tuple[str, ...] = option(("kd", "cwd", "afdcd", "dist", "cirkd"), "which ones", metavar="NAME",
                                      choices=lambda: tuple(methods()))


@dataclass(frozen=True)
class Bench:
    """A folder with toy streets, weights and descriptions."""
    folder: Path

    @property
    def data(self) -> Path:
        """The toy streets, painted when they are first asked for."""
        if not (root := self.folder / "data").is_dir():
            write_toy_streets(root, train=4, val=1, test=1)
        return root

    def flags(self, role: str, network: str) -> list[str]:
        """--teacher-model … of a network."""
        model, _, backbone = network.partition(" ")
        if model == RANDOM_SEGFORMER:
            model = f"hf:{self.segformer()}"
        return [f"--{role}-model", model, *([f"--{role}-backbone", backbone] if backbone else [])]

    def segformer(self) -> Path:
        """The description of a SegFormer of 0.1 M parameters."""
        folder = self.folder / "segformer"
        if not folder.is_dir():
            from models.outside.library import library

            library("transformers", "hf").SegformerConfig(
                hidden_sizes=[16, 24, 32, 48], depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=32,
                num_labels=self.num_class).save_pretrained(folder)
        return folder

    @property
    def num_class(self) -> int:
        """Classes of the toy streets."""
        return get_dataset_spec("toy_streets", str(self.data)).num_class

    def weights(self, network: str) -> Path:
        """A weight file of a network, of random weights."""
        path = self.folder / f"{abs(hash(network))}.pth"
        if not path.exists():
            model, _, backbone = network.partition(" ")
            model = self.flags("student", network)[1]
            save_state_dict(get_segmentation_model(model, backbone, self.num_class), path)
        return path


def tried(bench: Bench, teacher: str, student: str, method: str) -> str:
    """'trains', or why not."""
    out = str(bench.folder / "run")
    argv = ["--dataset", "toy_streets", "--data", str(bench.data), "--method", method, "--crop-size", str(CROP),
            "--batch-size", str(BATCH), "--max-iterations", str(STEPS), "--workers", "0", "--skip-val", "--no-cuda",
            "--m-ocd", "4", "--pool-size", "2", "--patch-size", "2", "2", "--save-dir", out, "--log-dir", out,
            "--teacher-pretrained", str(bench.weights(teacher)),
            *bench.flags("teacher", teacher), *bench.flags("student", student)]
    try:
        run = build_run(parse_settings(argv), init_distributed(no_cuda=True))
        for batch in training_batches(run):
            result = train_batch(run, batch)
            run.step += 1
    except UserError as error:
        return describe_error(error)
    return "trains" if torch.isfinite(result.total) else "its loss is not finite"


def matrix(bench: Bench, networks: Sequence[str], names: Sequence[str]) -> str:
    """The table, with the reasons under it."""
    reasons: dict[str, str] = {}
    rows = []
    for teacher, student in product(networks, networks):
        cells = [tried(bench, teacher, student, name) for name in names]
        for cell in cells:
            if cell != "trains":
                reasons.setdefault(cell, chr(ord("a") + len(reasons)))
        rows.append([f"`{teacher}`", f"`{student}`", *(cell if cell == "trains" else reasons[cell] for cell in cells)])
    notes = [f"\n{letter}: {reason}" for reason, letter in reasons.items()]
    return "\n".join([table(["teacher", "student", *names], rows), *notes])


def main(argv: list[str] | None = None) -> int:
    """Try all of them and print the table."""
    settings = parse_options(Settings, argv, prog="network_matrix.py", description="Which networks learn from which.")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        text = matrix(Bench(Path(folder)), settings.networks, settings.methods)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
