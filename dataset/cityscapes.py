"""Cityscapes, fine annotations: 2975/500/1525 images of 2048 x 1024, 19 of 34 label ids are evaluated."""
from __future__ import annotations

import numpy as np

from dataset.spec import IGNORE, DatasetSpec, SplitSpec, register_dataset

#: (label id, class, color) in the order of the train ids
EVALUATED = (
    (7, "road", (128, 64, 128)), (8, "sidewalk", (244, 35, 232)), (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)), (13, "fence", (190, 153, 153)), (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)), (20, "traffic sign", (220, 220, 0)), (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)), (23, "sky", (70, 130, 180)), (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)), (26, "car", (0, 0, 142)), (27, "truck", (0, 0, 70)), (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)), (32, "motorcycle", (0, 0, 230)), (33, "bicycle", (119, 11, 32)))
# every other value is ignored: the 15 ids that are not evaluated, 255 (= -1, license plate) and unknown ones
ID_TO_TRAIN = np.full(256, IGNORE, dtype=np.int16)
ID_TO_TRAIN[[stored for stored, _, _ in EVALUATED]] = range(len(EVALUATED))


def _split(name: str, published: int, labeled: bool = True) -> SplitSpec:
    return SplitSpec(f"leftImg8bit/{name}", f"gtFine/{name}" if labeled else None, ("_leftImg8bit.png",),
                     "_gtFine_labelIds.png", nested=True, published=published)


CITYSCAPES = register_dataset(DatasetSpec(
    name="citys", title="Cityscapes",
    classes=tuple(name for _, name, _ in EVALUATED),
    palette=[color for _, _, color in EVALUATED],
    id_to_train=ID_TO_TRAIN,
    splits={"train": _split("train", 2975), "val": _split("val", 500), "test": _split("test", 1525, labeled=False)},
    train_crop=(512, 1024),
))
