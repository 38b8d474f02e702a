"""Pascal VOC 2012 with the SBD extra annotations ("aug", 10582/1449 images): 21 classes, 255 = ignore."""
from __future__ import annotations

from dataset.palette import bit_palette
from dataset.spec import DatasetSpec, SplitSpec, id_tables, register_dataset

LISTS = "ImageSets/Segmentation"


def _split(labels: str, lists: tuple[str, ...], published: int) -> SplitSpec:
    return SplitSpec("JPEGImages", labels, (".jpg",), lists=tuple(f"{LISTS}/{name}" for name in lists), id_list=True,
                     by_label=True, published=published)


VOC = register_dataset(DatasetSpec(
    name="voc",
    title="Pascal VOC (aug)",
    classes=(
        "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
        "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
    ),
    palette=bit_palette(21),
    splits={
        "train": _split("SegmentationClassAug", ("train_aug.txt", "trainaug.txt"), 10582),
        "val": _split("SegmentationClass", ("val.txt",), 1449),
    },
    train_crop=(512, 512),
    **id_tables({stored: stored for stored in range(21)}, ignore=[255]),
))
