#!/usr/bin/env python3
"""Evaluate a trained segmentation network: per-class table, JSON, and pictures.

    python eval.py --model deeplabv3 --backbone resnet18 --dataset camvid --data DIR --pretrained FILE --split test
    torchrun --nproc_per_node 8 eval.py ...        (the same figures, to the last digit)
"""
from __future__ import annotations

import argparse
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import dataset as data
from models import get_segmentation_model
from utils.cli import ArgumentParser, number, run_main
from utils.distributed import Distributed, cleanup, init_distributed
from utils.errors import UserError
from utils.evaluate import check_options, evaluate
from utils.files import check_target, write_json
from utils.logger import setup_logging
from utils.score import SegmentationMetric
from utils.visualize import colour_mask, overlay, save_index, save_rgb

positive_int, natural = number(int, 1), number(int, 0)


def build_parser() -> ArgumentParser:
    """The parser of ``eval.py``; defaults are those of the reference where it has the option."""
    parser = ArgumentParser(prog="eval.py", description="Evaluate a trained segmentation network on a labelled split.")
    g = parser.add_argument_group("network")
    g.add_argument("--model", default="deeplabv3", help="architecture")
    g.add_argument("--backbone", default="resnet18", help="backbone")
    g.add_argument("--pretrained", metavar="FILE", help="weights of the whole network, a .pth file (required)")
    parser.boolean(g, "--aux", False, "load the auxiliary head too; it takes no part in the prediction")
    g.add_argument("--preprocess", choices=("bgr", "rgb"),
                   help="input of the network: BGR minus mean, or RGB mean/std (default: what the weights say)")
    g = parser.add_argument_group("data")
    g.add_argument("--dataset", default="citys", help=", ".join(data.list_datasets()))
    g.add_argument("--data", default="./dataset/cityscapes/", metavar="DIR", help="root folder of the data set")
    g.add_argument("--data-list", metavar="FILE", help="list file of the split (default: the split's own files)")
    g.add_argument("--split", help="train, val, test, ... (default: the data set's validation split)")
    g.add_argument("--limit", type=positive_int, metavar="N", help="only the first N images")
    g.add_argument("--ignore-label", type=int, default=-1, help="label value of pixels that do not count")
    g.add_argument("--workers", type=natural, default=8, help="loading processes, at most one per CPU")
    g.add_argument("--crop-size", type=positive_int, nargs="+", default=[1024, 2048], metavar="N",
                   help="no effect, as in the reference: images are evaluated whole (see --window)")
    g = parser.add_argument_group("prediction")
    g.add_argument("--scales", type=number(float, 0, open_low=True), nargs="+", default=[1.0], metavar="S",
                   help="average the logits over the image resized by these factors")
    parser.boolean(g, "--flip-eval", False, "average over the image and its mirror image")
    g.add_argument("--window", type=positive_int, nargs=2, metavar=("H", "W"), help="slide a window of this size")
    g.add_argument("--stride", type=positive_int, nargs=2, metavar=("H", "W"),
                   help="step of the window (default: two thirds of it)")
    g = parser.add_argument_group("output")
    g.add_argument("--json", type=Path, metavar="FILE", help="write all figures, as fractions")
    parser.boolean(g, "--reference-metric", True, "also what the reference prints as pixel accuracy: the arg max of "
                   "logits truncated to integers")
    g.add_argument("--save-dir", type=Path, default=Path("../runs/logs/"), metavar="DIR",
                   help="pictures go to DIR/<model>_<backbone>_<dataset>_<split>/")
    parser.boolean(g, "--save-pred", False, "write predictions: colour/ (palette PNG) and index/ (grey PNG)")
    parser.boolean(g, "--save-ids", False, "write predictions as the data set's own label values: ids/, for submission")
    parser.boolean(g, "--blend", False, "write the image with the predicted colours mixed in: overlay/")
    g = parser.add_argument_group("running")
    parser.boolean(g, "--no-cuda", False, "run on the CPU although there is a GPU")
    g.add_argument("--gpu-id", default="0", help="GPU of a single process; under torchrun each takes its own")
    g.add_argument("--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # torchrun's environment decides
    return parser


class PredictionWriter:
    """Writes the pictures of one split; an object of it is the ``on_prediction`` of ``evaluate``."""

    def __init__(self, dataset: data.SegmentationDataset, folder: Path, config: argparse.Namespace) -> None:
        self.spec, self.folder, self.config = dataset.spec, folder, config
        self.names = output_names([sample.image for sample in dataset.samples])

    def __call__(self, prediction: Tensor, item: dict[str, Any]) -> None:
        """prediction: int [H,W] train ids; item: of the data set."""
        name, index, palette = self.names[item["index"]], prediction.numpy(), self.spec.palette
        if self.config.save_pred and len(palette) < 256:
            save_index(self.folder / "colour" / name, index, palette)
            save_index(self.folder / "index" / name, index)
        elif self.config.save_pred:
            save_rgb(self.folder / "colour" / name, colour_mask(index, palette))
        if self.config.save_ids:
            save_index(self.folder / "ids" / name, self.spec.train_to_id[index])
        if self.config.blend:
            image = item["image"].permute(1, 2, 0).numpy()[..., ::-1]
            save_rgb(self.folder / "overlay" / name, overlay(image, index, palette))


def output_names(images: list[str]) -> list[str]:
    """One PNG name per image: its stem, or with its folders when two images share a stem."""
    stems = [Path(image).stem for image in images]
    if len(set(stems)) < len(stems):
        root = os.path.commonpath([os.path.dirname(image) for image in images])
        stems = [os.path.splitext(os.path.relpath(image, root))[0].replace(os.sep, "_") for image in images]
    return [f"{stem}.png" for stem in stems]


def check(config: argparse.Namespace) -> int:
    """Check settings that need neither data nor weights; returns the number of the GPU of a single process."""
    if config.pretrained in (None, "", "None", "none"):
        raise UserError("--pretrained is missing: expected the weights of a trained network, such as "
                        f"kd_{config.model}_{config.backbone}_{config.dataset}_best_model.pth")
    check_options(config.scales, config.window, config.stride)
    if config.json is not None:
        check_target(config.json, "--json", is_folder=False)
    if config.save_pred or config.save_ids or config.blend:
        check_target(config.save_dir, "--save-dir", is_folder=True)
    first = config.gpu_id.split(",")[0].strip()
    if not first.isdigit():
        raise UserError(f"--gpu-id: expected the number of a GPU, got {config.gpu_id!r}")
    return int(first)


def build(config: argparse.Namespace, distributed: Distributed) -> tuple[data.SegmentationDataset, nn.Module]:
    """The split and the network, on its device."""
    spec = data.get_dataset_spec(config.dataset, config.data)
    dataset = data.SegmentationDataset(spec, config.data, config.split or spec.selection_split, train=False,
                                       ignore_label=config.ignore_label, list_file=config.data_list,
                                       limit=config.limit)
    net = get_segmentation_model(model=config.model, backbone=config.backbone, num_class=spec.num_class,
                                 aux=config.aux, pretrained=config.pretrained, preprocess=config.preprocess)
    return dataset, net.to(distributed.device).eval()


def table(result: dict[str, Any], classes: tuple[str, ...]) -> str:
    """The figures in percent, as text."""
    width = max(24, *(len(name) for name in classes))
    lines = [f"{'class':{width}s} {'IoU %':>8s} {'acc %':>8s} {'pixels %':>9s}"]
    total = max(result["labelled_pixels"], 1)
    for name, iou, accuracy, pixels in zip(classes, result["iou_per_class"], result["acc_per_class"],
                                           result["label_pixels"], strict=True):
        shown = f"{100 * accuracy:8.2f}" if pixels else f"{'-':>8s}"  # no pixel of it: no accuracy
        lines.append(f"{name:{width}s} {100 * iou:8.2f} {shown} {100 * pixels / total:9.2f}")
    lines.append("-" * len(lines[0]))
    present = sum(pixels > 0 for pixels in result["label_pixels"])
    rows = [(f"mIoU, all {len(classes)} classes", "mIoU"), (f"mIoU, {present} present classes", "mIoU_present"),
            ("pixAcc", "pixAcc"), ("pixAcc of the reference", "pixAcc_reference"), ("mAcc", "mAcc")]
    lines += [f"{text:{width}s} {100 * result[key]:8.2f}" for text, key in rows if key in result]
    return "\n".join(lines)


def record(config: argparse.Namespace, dataset: data.SegmentationDataset, net: nn.Module,
           result: dict[str, Any]) -> dict[str, Any]:
    """What ``--json`` writes: the figures as fractions, and what they are figures of."""
    figures = {key: result[key] for key in ("mIoU", "pixAcc", "mAcc", "mIoU_present", "pixAcc_reference")
               if key in result}
    per_class = {f"{short}_per_class": dict(zip(dataset.spec.classes, result[f"{short}_per_class"], strict=True))
                 for short in ("iou", "acc")}
    with open(os.path.expanduser(config.pretrained), "rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        **figures, **per_class, "images": result["images"], "labelled_pixels": result["labelled_pixels"],
        "label_pixels": result["label_pixels"], "total_inter": result["total_inter"],
        "total_union": result["total_union"], "classes": list(dataset.spec.classes),
        "dataset": config.dataset, "split": dataset.split, "limit": config.limit, "model": config.model,
        "backbone": config.backbone, "pretrained": os.path.basename(config.pretrained), "pretrained_sha256": checksum,
        "preprocess": net.preprocess.to_dict(), "scales": config.scales, "flip": config.flip_eval,
        "window": config.window, "stride": config.stride,
    }


def run(config: argparse.Namespace, distributed: Distributed) -> None:
    """Evaluate; the main process prints the table and writes the JSON file, every process its pictures."""
    setup_logging(distributed.is_main)
    dataset, net = build(config, distributed)
    writer = None
    if config.save_pred or config.save_ids or config.blend:
        name = f"{config.model}_{config.backbone}_{config.dataset}_{dataset.split}"
        writer = PredictionWriter(dataset, config.save_dir / name, config)
    metric = SegmentationMetric(dataset.spec.num_class, config.reference_metric, ignore_label=config.ignore_label)
    result = evaluate(net, dataset, device=distributed.device, metric=metric, scales=config.scales,
                      flip=config.flip_eval, window=config.window, stride=config.stride, workers=config.workers,
                      on_prediction=writer)
    if not distributed.is_main:
        return
    if config.json is not None:
        write_json(config.json, record(config, dataset, net, result))
    print(f"{net.name} on {dataset.spec.title}, {dataset.split}: {result['images']} images, "
          f"{result['labelled_pixels']} labelled pixels")
    print(table(result, dataset.spec.classes) if result["labelled_pixels"] else "no labels, hence no figures")
    if writer is not None:
        print(f"pictures: {writer.folder}")


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, evaluate, report. Returns the exit code."""
    config = build_parser().parse_args(argv)
    gpu = check(config)
    distributed = init_distributed(config.no_cuda, gpu)
    run(config, distributed)
    cleanup()  # not after an error: the other processes may wait in a collective operation
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
