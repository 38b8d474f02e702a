"""Pascal VOC 2012 with the SBD extra annotations ("aug", 10582/1449 images): 21 classes, 255 = ignore."""
from __future__ import annotations

from functools import partial

from dataset.palette import bit_palette
from dataset.spec import DatasetSpec, SplitSpec, id_tables, register_dataset

_split = partial(SplitSpec, "JPEGImages", image_suffix=(".jpg",), id_list=True, by_label=True)
VOC = register_dataset(DatasetSpec(
    name="voc", title="Pascal VOC (aug)",
    classes=("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
             "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
             "tvmonitor"),
    palette=bit_palette(21),
    splits={
        "train": _split("SegmentationClassAug", published=10582, lists=(
            "ImageSets/Segmentation/train_aug.txt", "ImageSets/Segmentation/trainaug.txt")),
        "val": _split("SegmentationClass", published=1449, lists=("ImageSets/Segmentation/val.txt",)),
    },
    train_crop=(512, 512), upright_labels=True,
    **id_tables({stored: stored for stored in range(21)}, ignore=[255]),
))
