#!/usr/bin/env python3
"""Evaluate a trained segmentation network: per-class table, JSON, and pictures.

    python eval.py --dataset camvid --data DIR --pretrained FILE --split test
    torchrun --nproc_per_node 8 eval.py ...        (the same figures, to the last digit)
"""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import nn

import dataset as data
from engine.eval_settings import EvalSettings, check, parse_settings
from engine.evaluate import evaluate
from engine.log import LOG, setup_logging
from engine.pictures import PredictionWriter, pictures_folder
from models import check_classes
from models.prepare import HALF_PRECISIONS, check_precision
from models.weight_files import is_given
from utils.cli import run_main
from utils.cpu import prepare_cpu
from utils.distributed import Distributed, cleanup, init_distributed
from utils.errors import UserError
from utils.files import sha256, write_json
from utils.score import SegmentationMetric, table
from utils.watchdog import MARGIN, Watchdog, no_step, time_limit


def build(settings: EvalSettings, distributed: Distributed) -> tuple[data.SegmentationDataset, nn.Module]:
    """The split and the network, on its device."""
    d, n = settings.data, settings.network
    spec = data.get_dataset_spec(d.dataset, d.data)
    split = d.split or spec.selection_split
    try:
        dataset = data.SegmentationDataset(spec, d.data, split, train=False, ignore_label=d.ignore_label,
                                           list_file=d.data_list, limit=d.limit)
    except UserError as error:
        if d.split or not Path(d.data).is_dir() or Path(d.data, spec.split(split).image_dir).is_dir():
            raise
        raise UserError(f"{error} (--split: another split)", settings=error.settings) from error
    if d.cache is not None:
        data.use_cache([dataset], d.cache, LOG.info)
    net = n.choice.build(spec.num_class)
    if note := check_classes(net, n.pretrained, spec.classes):
        LOG.warning("%s", note)
    return dataset, net.to(distributed.device).eval()


def record(settings: EvalSettings, dataset: data.SegmentationDataset, net: nn.Module,
           result: dict[str, Any]) -> dict[str, Any]:
    """What ``--json`` writes: the figures as fractions, None on images without labels, and what they are figures of.
    """
    network, prediction = settings.network, settings.prediction
    weights = Path(network.pretrained).expanduser() if is_given(network.pretrained) else None
    labeled = result["labelled_pixels"] > 0
    figures = {key: result[key] if labeled else None
               for key in ("mIoU", "pixAcc", "mAcc", "mIoU_present", "pixAcc_reference") if key in result}
    per_class = {f"{short}_per_class": dict(zip(dataset.spec.classes, result[f"{short}_per_class"], strict=True))
                 if labeled else None for short in ("iou", "acc")}
    return {
        **figures, **per_class, "images": result["images"], "labelled_pixels": result["labelled_pixels"],
        "label_pixels": result["label_pixels"], "total_inter": result["total_inter"],
        "total_union": result["total_union"], "classes": list(dataset.spec.classes),
        "dataset": settings.data.dataset, "split": dataset.split, "limit": settings.data.limit,
        "model": network.model, "backbone": network.backbone, "pretrained": weights and weights.name,
        "pretrained_sha256": sha256(weights) if weights and weights.is_file() else None,
        "preprocess": net.preprocess.to_dict(),
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
    print(f"{net.name} on {dataset.spec.title}, {dataset.split}: {result['images']} images, "
          f"{result['labelled_pixels']} labelled pixels")
    print(table(result, dataset.spec.classes) if result["labelled_pixels"] else "no labels, hence no figures")
    if writer is not None:
        print(f"pictures: {writer.folder}")
    if output.json is not None:
        write_json(output.json, record(settings, dataset, net, result))


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, evaluate, report. Returns the exit code."""
    execute(parse_settings(argv))
    return 0


def execute(settings: EvalSettings) -> None:
    """Check the settings, evaluate in all processes, and leave their group."""
    gpu, timeout = check(settings), settings.running.timeout
    distributed = init_distributed(settings.running.no_cuda, gpu, timeout + MARGIN)
    check_precision([HALF_PRECISIONS.get(settings.speed.amp)], distributed.device)
    if distributed.device.type == "cpu":
        prepare_cpu(settings.speed.fast)
    with Watchdog(timeout, "start again"):
        run(settings, distributed)
        with time_limit(no_step):
            cleanup()  # not after an error: the other processes may wait in a collective operation


if __name__ == "__main__":
    sys.exit(run_main(main))
