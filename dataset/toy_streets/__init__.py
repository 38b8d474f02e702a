"""Toy streets, the embedded data set: our own painted road scenes in CamVid's layout, classes and colours.

`python -m dataset.toy_streets --data FOLDER` writes them (see `writer.py`); `scene.py` plans and paints one street.
"""

from __future__ import annotations

from dataclasses import replace

from dataset.camvid import CAMVID
from dataset.spec import SplitSpec, register_dataset
from dataset.toy_streets.scene import paint_scene
from dataset.toy_streets.writer import toy_street, write_toy_streets

__all__ = ["TOY_STREETS", "paint_scene", "toy_street", "write_toy_streets"]

TOY_STREETS = register_dataset(
    replace(
        CAMVID,
        name="toy_streets",
        title="Toy streets",
        splits={name: SplitSpec(name, f"{name}annot") for name in ("train", "val", "test")},
        train_crop=(120, 120),
        reference_selection_split="val",
    )
)
