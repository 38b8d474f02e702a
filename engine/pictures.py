"""The pictures that an evaluation writes of its predictions."""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from dataset import SegmentationDataset
from engine.eval_settings import EvalSettings, Output
from models import network_name
from models.weight_files import is_given
from utils.visualize import color_mask, overlay, save_index, save_rgb


class PredictionWriter:
    """Writes the pictures of one split; an object of it is the ``on_prediction`` of ``evaluate``."""

    def __init__(self, dataset: SegmentationDataset, folder: Path, output: Output) -> None:
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
    """Where the pictures of a split go: below ``--save-dir`` it has the path of the weights without their ending, from
    there or else from the present folder, so that two runs do not share it."""
    top, network = settings.output.save_dir, settings.network
    source = Path(network_name(network.model, network.backbone))
    if is_given(network.pretrained):
        weights = Path(os.path.abspath(Path(network.pretrained).expanduser())).with_suffix("")
        bases = (Path(os.path.abspath(top)), Path.cwd(), Path(weights.anchor))
        source = next(weights.relative_to(base) for base in bases if weights.is_relative_to(base))
    return top / source / f"{settings.data.dataset}_{split}"


def output_names(images: list[str]) -> list[str]:
    """One PNG name per image: its stem, or with its folders when two images share a stem."""
    stems = [Path(image).stem for image in images]
    if len(set(stems)) < len(stems):
        root = os.path.commonpath([os.path.dirname(image) for image in images])
        stems = [os.path.splitext(os.path.relpath(image, root))[0].replace(os.sep, "_") for image in images]
    return [f"{stem}.png" for stem in stems]
