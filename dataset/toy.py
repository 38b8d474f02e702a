"""Toy streets: painted road scenes in CamVid's layout, classes and colors (``dataset/toy_streets/`` paints them)."""
from __future__ import annotations

from dataclasses import replace

from dataset.camvid import CAMVID
from dataset.spec import SplitSpec, register_dataset

TOY_STREETS = register_dataset(replace(
    CAMVID, name="toy_streets", title="Toy streets",
    splits={name: SplitSpec(name, f"{name}annot") for name in ("train", "val", "test")},
    train_crop=(120, 120), reference_selection_split="val"))
