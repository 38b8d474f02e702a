"""Pascal VOC 2012 with the annotations of SBD: labels from its .mat files, and the list of 10582 images to train on."""
from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from dataset.palette import bit_palette
from dataset.voc import VOC
from tools.preparing.archives import Archive
from tools.preparing.plan import Plan, Rule
from utils.errors import UserError

TAR, SBD = "VOCtrainval_11-May-2012.tar", "benchmark.tgz (SBD)"
IMAGES, LABELS, AUGMENTED = "JPEGImages", "SegmentationClass", "SegmentationClassAug"
LISTS = "ImageSets/Segmentation"
#: entries of the complete lists
COMPLETE = {"VOC train": 1464, "VOC val": 1449, "SBD train": 8498, "SBD val": 2857}


def plan(archives: Sequence[Archive]) -> Plan:
    """Trained on: what SBD or VOC train have, but VOC val does not. VOC's own labels are preferred where both exist."""
    if importlib.util.find_spec("scipy") is None:
        raise UserError("the .mat files of SBD are read with scipy, which is not installed: pip install -e '.[data]'")
    lists = _lists(archives)
    val = lists["VOC val"]
    train = (lists["VOC train"] | lists["SBD train"] | lists["SBD val"]) - val
    published = VOC.splits["train"].published
    if len(train) != published and {name: len(ids) for name, ids in lists.items()} == COMPLETE:
        raise UserError(f"--from: {len(train)} images to train on, from complete lists; expected {published}: these "
                        "lists are not the published ones")
    chosen = Plan(lists={f"{LISTS}/train_aug.txt": sorted(train), f"{LISTS}/val.txt": sorted(val)})
    of_voc = Rule(TAR, f"{LABELS}/*.png")
    for rule, ids in ((Rule(TAR, f"{IMAGES}/*.jpg"), train | val), (of_voc, val),
                      (Rule(TAR, of_voc.shape, AUGMENTED), lists["VOC train"] - val),
                      (Rule(SBD, "dataset/cls/*.mat", AUGMENTED, from_mat), train)):
        chosen.add({target: item for target, item in rule.find(archives).items() if PurePosixPath(target).stem in ids})
    return chosen


def _lists(archives: Sequence[Archive]) -> dict[str, set[str]]:
    """{as in COMPLETE: ids} of the lists inside the archives, each of which is read once."""
    items = {f"{owner} {split}": next(iter(Rule(distributed_as, f"{folder}/{split}.txt").find(archives).values()))
             for owner, distributed_as, folder in (("VOC", TAR, LISTS), ("SBD", SBD, "dataset"))
             for split in ("train", "val")}
    lists = {}
    for archive in archives:
        wanted = {item.name: list_name for list_name, item in items.items() if item.archive is archive}
        for name, content in archive.read(wanted.keys()):
            lists[wanted[name]] = set(content.decode("ascii", "replace").split())
    return lists


def from_mat(data: bytes, title: str) -> bytes:
    """The classes of one .mat file of SBD as an index PNG in VOC's colors."""
    from scipy.io import loadmat  # an optional extra

    try:
        label = np.asarray(loadmat(io.BytesIO(data))["GTcls"]["Segmentation"][0, 0])
    except Exception as error:  # scipy raises whatever a damaged file leads it into
        reason = " ".join(str(error).split())
        raise UserError(f"{title}: cannot be read ({reason}); expected GTcls.Segmentation of SBD") from error
    if label.ndim != 2 or not np.isin(label, range(VOC.num_class)).all():
        raise UserError(f"{title}: GTcls.Segmentation has the shape {list(label.shape)} and values up to "
                        f"{label.max(initial=0)}; expected [height, width] of 0..{VOC.num_class - 1}")
    picture, file = Image.fromarray(label.astype(np.uint8)), io.BytesIO()
    picture.putpalette(bit_palette(256).tobytes())
    picture.save(file, format="PNG")
    return file.getvalue()
