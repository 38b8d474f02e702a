#!/usr/bin/env python3
"""Evaluate a trained segmentation network: per-class table, JSON, and pictures.

    python eval.py --dataset camvid --data DIR --pretrained FILE --split test
    torchrun --nproc_per_node 8 eval.py ...        (the same figures, to the last digit)
"""
from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import dataset as data
from engine.evaluate import evaluate
from engine.log import LOG, setup_logging
from engine.predict import check_options
from models import (
    NetworkChoice,
    backbone_help,
    brings_weights,
    check_classes,
    check_described,
    described_network,
    model_help,
    network_name,
)
from models.prepare import HALF_PRECISIONS, check_precision
from models.published import local
from models.weight_files import is_given
from utils.allocator import keep_freed_memory
from utils.cli import ArgumentParser, read_options, run_main
from utils.distributed import Distributed, cleanup, init_distributed
from utils.errors import UserError
from utils.files import check_target, sha256, write_json
from utils.options import OptionGroup, option
from utils.score import SegmentationMetric, table
from utils.visualize import color_mask, overlay, save_index, save_rgb


@dataclass(frozen=True)
class Network(OptionGroup):
    """What is evaluated. Defaults are those of the reference where it has the option, here and below."""

    model: str = option("deeplabv3", lambda: f"{model_help()} (default: what the weights' JSON file says, else "
                                             "deeplabv3)")
    backbone: str = option("resnet18", lambda: f"{backbone_help()} (default: what the weights' JSON file says, else "
                                               "resnet18)")
    pretrained: str | None = option(None, "weights of the whole network, a .pth or .safetensors file, or get:NAME "
                                          "(required)", metavar="FILE")
    head_width: int | None = option(None, "channels of its main head (default: as in the weights)", at_least=1,
                                    metavar="N")
    aux: bool = option(False, "load the auxiliary head too; it takes no part in the prediction")
    preprocess: str | None = option(None, "input of the network: BGR minus mean, or RGB mean/std (default: what the "
                                          "weights say)", choices=("bgr", "rgb"))

    @property
    def choice(self) -> NetworkChoice:
        """The network, with its weights."""
        return NetworkChoice(self.model, self.backbone, self.pretrained, preprocess=self.preprocess, aux=self.aux,
                             head_width=self.head_width)


@dataclass(frozen=True)
class Data(OptionGroup):
    """What it is evaluated on."""

    dataset: str = option("citys", lambda: ", ".join(data.list_datasets()))
    data: str = option("./dataset/cityscapes/", "root folder of the data set", metavar="DIR")
    data_list: str | None = option(None, "list file of the split (default: the split's own files)", metavar="FILE")
    cache: str | None = option(None, "folder that keeps the decoded images, as in train_kd.py", metavar="DIR")
    split: str | None = option(None, "train, val, test, ... (default: the data set's validation split)")
    limit: int | None = option(None, "only the first N images", at_least=1, metavar="N")
    ignore_label: int = option(-1, "label value of pixels that do not count")
    workers: int = option(8, "loading processes, at most one per CPU", at_least=0)
    crop_size: tuple[int, ...] = option((1024, 2048), "no effect, as in the reference: images are evaluated whole (see "
                                                      "--window)", at_least=1, metavar="N")


@dataclass(frozen=True)
class Prediction(OptionGroup):
    """How the network is asked."""

    scales: tuple[float, ...] = option((1.0,), "average the logits over the image resized by these factors", above=0,
                                       metavar="S")
    flip_eval: bool = option(False, "average over the image and its mirror image")
    window: tuple[int, int] | None = option(None, "slide a window of this size", at_least=1, metavar=("H", "W"))
    stride: tuple[int, int] | None = option(None, "step of the window (default: two thirds of it)", at_least=1,
                                            metavar=("H", "W"))


@dataclass(frozen=True)
class Speed(OptionGroup):
    """What makes it faster, and changes nothing but rounding unless its help says so."""

    batch_size: int = option(1, "images that go through the network together, as far as neighbors have one size",
                             at_least=1, metavar="N")
    amp: str = option("off", "half precision of the network: figures change in the last digits",
                      choices=("off", *HALF_PRECISIONS))
    fast: bool = option(True, "a prepared copy of the network, no logits at full size and, on a CPU, freed memory is "
                              "kept; off: the plain twin, with the same results up to rounding")
    channels_last: bool | None = option(None, "weights of the prepared copy in the order of memory [H, W, C] (default: "
                                              "with --fast)")


@dataclass(frozen=True)
class Output(OptionGroup):
    """What is written."""

    json: Path | None = option(None, "write all figures, as fractions", metavar="FILE")
    reference_metric: bool = option(False, "also what the reference prints as pixel accuracy: the arg max of logits "
                                           "truncated to integers (takes more time and memory)")
    save_dir: Path = option(Path("runs"), "pictures go to DIR/<model>_<backbone>_<dataset>_<split>/",
                            metavar="DIR")
    save_pred: bool = option(False, "write predictions: colour/ (palette PNG) and index/ (grey PNG)")
    save_ids: bool = option(False, "write predictions as the data set's own label values: ids/, for submission")
    blend: bool = option(False, "write the image with the predicted colours mixed in: overlay/")

    @property
    def pictures(self) -> bool:
        """Whether any picture is written."""
        return self.save_pred or self.save_ids or self.blend


@dataclass(frozen=True)
class Running(OptionGroup):
    """Where it runs."""

    no_cuda: bool = option(False, "run on the CPU although there is a GPU")
    gpu_id: str = option("0", "GPU of a single process; under torchrun each takes its own")
    local_rank: int = option(0, hidden=True)  # torchrun's environment decides


@dataclass(frozen=True)
class EvalSettings:
    """Everything that ``eval.py`` was asked for."""

    network: Network
    data: Data
    prediction: Prediction
    speed: Speed
    output: Output
    running: Running


GROUPS = (("network", Network), ("data", Data), ("prediction", Prediction), ("speed", Speed), ("output", Output),
          ("running", Running))


def build_parser() -> ArgumentParser:
    """The parser of ``eval.py``."""
    parser = ArgumentParser(prog="eval.py", description="Evaluate a trained segmentation network on a labelled split.")
    for title, group in GROUPS:
        parser.add_options(parser.add_argument_group(title), group)
    return parser


def parse_settings(argv: Sequence[str] | None) -> EvalSettings:
    """Parse the command line; it ends here. Flags win over what the weights' JSON file says, which wins over defaults;
    UserError when flag and file name different networks."""
    parser = build_parser()
    said = described_network(parser.parse_args(argv).pretrained)
    parser.set_defaults(**said)
    parsed = vars(parser.parse_args(argv))
    settings = EvalSettings(*(read_options(parsed, group) for _, group in GROUPS))
    check_described(settings.network.choice, said)
    return replace(settings, network=replace(settings.network, pretrained=local(settings.network.pretrained)))


class PredictionWriter:
    """Writes the pictures of one split; an object of it is the ``on_prediction`` of ``evaluate``."""

    def __init__(self, dataset: data.SegmentationDataset, folder: Path, output: Output) -> None:
        self.spec, self.folder, self.output = dataset.spec, folder, output
        self.names = output_names([sample.image for sample in dataset.samples])

    def __call__(self, prediction: Tensor, item: dict[str, Any]) -> None:
        """prediction: int [H,W] train ids; item: of the data set."""
        name, index, palette = self.names[item["index"]], prediction.numpy(), self.spec.palette
        if self.output.save_pred and len(palette) < 256:
            save_index(self.folder / "colour" / name, index, palette)
            save_index(self.folder / "index" / name, index)
        elif self.output.save_pred:
            save_rgb(self.folder / "colour" / name, color_mask(index, palette))
        if self.output.save_ids:
            save_index(self.folder / "ids" / name, self.spec.train_to_id[index])
        if self.output.blend:
            image = item["image"].permute(1, 2, 0).numpy()[..., ::-1]
            save_rgb(self.folder / "overlay" / name, overlay(image, index, palette))


def pictures_folder(settings: EvalSettings, split: str) -> Path:
    """Where the pictures of a split go."""
    network = settings.network
    return settings.output.save_dir / f"{network_name(network.model, network.backbone)}_{settings.data.dataset}_{split}"


def output_names(images: list[str]) -> list[str]:
    """One PNG name per image: its stem, or with its folders when two images share a stem."""
    stems = [Path(image).stem for image in images]
    if len(set(stems)) < len(stems):
        root = os.path.commonpath([os.path.dirname(image) for image in images])
        stems = [os.path.splitext(os.path.relpath(image, root))[0].replace(os.sep, "_") for image in images]
    return [f"{stem}.png" for stem in stems]


def check(settings: EvalSettings) -> int:
    """Check settings that need neither data nor weights; returns the number of the GPU of a single process."""
    network, output = settings.network, settings.output
    if not is_given(network.pretrained) and not brings_weights(network.model):
        raise UserError("--pretrained is missing: expected the weights of a trained network, such as "
                        f"kd_{network_name(network.model, network.backbone)}_{settings.data.dataset}_best_model.pth")
    prediction, speed = settings.prediction, settings.speed
    if speed.channels_last and not speed.fast:
        raise UserError("--channels-last: expected with --fast, whose copy of the network it lays out")
    check_options(prediction.scales, prediction.window, prediction.stride)
    if output.json is not None:
        check_target(output.json, "--json", is_folder=False)
    if output.pictures:
        check_target(output.save_dir, "--save-dir", is_folder=True)
    first = settings.running.gpu_id.split(",")[0].strip()
    if not first.isdigit():
        raise UserError(f"--gpu-id: expected the number of a GPU, got {settings.running.gpu_id!r}")
    return int(first)


def build(settings: EvalSettings, distributed: Distributed) -> tuple[data.SegmentationDataset, nn.Module]:
    """The split and the network, on its device."""
    d, n = settings.data, settings.network
    spec = data.get_dataset_spec(d.dataset, d.data)
    dataset = data.SegmentationDataset(spec, d.data, d.split or spec.selection_split, train=False,
                                       ignore_label=d.ignore_label, list_file=d.data_list, limit=d.limit)
    if d.cache is not None:
        data.use_cache([dataset], d.cache, LOG.info)
    net = n.choice.build(spec.num_class)
    if note := check_classes(net, n.pretrained, spec.classes):
        LOG.warning("%s", note)
    return dataset, net.to(distributed.device).eval()


def record(settings: EvalSettings, dataset: data.SegmentationDataset, net: nn.Module,
           result: dict[str, Any]) -> dict[str, Any]:
    """What ``--json`` writes: the figures as fractions, and what they are figures of."""
    network, prediction = settings.network, settings.prediction
    weights = Path(network.pretrained).expanduser() if is_given(network.pretrained) else None
    figures = {key: result[key] for key in ("mIoU", "pixAcc", "mAcc", "mIoU_present", "pixAcc_reference")
               if key in result}
    per_class = {f"{short}_per_class": dict(zip(dataset.spec.classes, result[f"{short}_per_class"], strict=True))
                 for short in ("iou", "acc")}
    return {
        **figures, **per_class, "images": result["images"], "labelled_pixels": result["labelled_pixels"],
        "label_pixels": result["label_pixels"], "total_inter": result["total_inter"],
        "total_union": result["total_union"], "classes": list(dataset.spec.classes),
        "dataset": settings.data.dataset, "split": dataset.split, "limit": settings.data.limit,
        "model": network.model, "backbone": network.backbone, "pretrained": weights and weights.name,
        "pretrained_sha256": weights and sha256(weights), "preprocess": net.preprocess.to_dict(),
        "scales": prediction.scales, "flip": prediction.flip_eval, "window": prediction.window,
        "stride": prediction.stride, "amp": settings.speed.amp,
    }


def run(settings: EvalSettings, distributed: Distributed) -> None:
    """Evaluate; the main process prints the table and writes the JSON file, every process its pictures."""
    setup_logging(distributed.is_main_process)
    dataset, net = build(settings, distributed)
    prediction, speed, output = settings.prediction, settings.speed, settings.output
    writer = None
    if output.pictures:
        writer = PredictionWriter(dataset, pictures_folder(settings, dataset.split), output)
    metric = SegmentationMetric(dataset.spec.num_class, output.reference_metric,
                                ignore_label=settings.data.ignore_label)
    result = evaluate(net, dataset, device=distributed.device, metric=metric, scales=prediction.scales,
                      flip=prediction.flip_eval, window=prediction.window, stride=prediction.stride,
                      workers=settings.data.workers, batch_size=speed.batch_size, fast=speed.fast,
                      amp=HALF_PRECISIONS.get(speed.amp), channels_last=speed.channels_last, on_prediction=writer)
    if not distributed.is_main_process:
        return
    if output.json is not None:
        write_json(output.json, record(settings, dataset, net, result))
    print(f"{net.name} on {dataset.spec.title}, {dataset.split}: {result['images']} images, "
          f"{result['labelled_pixels']} labelled pixels")
    print(table(result, dataset.spec.classes) if result["labelled_pixels"] else "no labels, hence no figures")
    if writer is not None:
        print(f"pictures: {writer.folder}")


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, evaluate, report. Returns the exit code."""
    execute(parse_settings(argv))
    return 0


def execute(settings: EvalSettings) -> None:
    """Check the settings, evaluate in all processes, and leave their group."""
    gpu = check(settings)
    distributed = init_distributed(settings.running.no_cuda, gpu)
    check_precision([HALF_PRECISIONS.get(settings.speed.amp)], distributed.device)
    if settings.speed.fast and distributed.device.type == "cpu":
        keep_freed_memory()
    run(settings, distributed)
    cleanup()  # not after an error: the other processes may wait in a collective operation


if __name__ == "__main__":
    sys.exit(run_main(main))
