"""CamVid in its 11-class form (367/101/233 images of 480 x 360): gray index labels, 11 = void."""
from __future__ import annotations

from dataset.spec import DatasetSpec, SplitSpec, id_tables, register_dataset

PUBLISHED = {"train": 367, "val": 101, "test": 233}

CAMVID = register_dataset(DatasetSpec(
    name="camvid", title="CamVid",
    classes=("sky", "building", "pole", "road", "pavement", "tree", "sign/symbol", "fence", "car", "pedestrian",
             "bicyclist"),
    palette=((128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
             (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192)),
    splits={name: SplitSpec(name, f"{name}annot", published=count) for name, count in PUBLISHED.items()},
    train_crop=(360, 360), report_splits=("test",), reference_selection_split="test",
    **id_tables({stored: stored for stored in range(11)}, ignore=[11]),
))
