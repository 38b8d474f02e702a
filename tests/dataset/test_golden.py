"""Samples equal those recorded from the reference implementation, for every data set, in val and in train."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import fill, tiny_data

from dataset import SegmentationDataset, get_dataset_spec
from dataset.transforms import Augmentation
from models.preprocess import CAFFE_BGR

GOLDEN = json.loads((Path(__file__).parents[1] / "reference" / "dataset.json").read_text())["datasets"]
CROP = (48, 64)


@pytest.fixture(scope="module", params=sorted(GOLDEN))
def tiny(request, tmp_path_factory) -> tuple[str, str, dict[str, str]]:
    """(name, root, list files by split)"""
    root = str(tmp_path_factory.mktemp(request.param))
    return request.param, root, tiny_data.write(root, request.param)


def matches(item: dict, row: dict) -> None:
    image = CAFFE_BGR(item["image"][None], item["valid"][None])[0]
    assert fill.compare(fill.digest(image), row["image"]) < 1e-6
    assert fill.compare(fill.digest(item["label"]), row["label"]) < 1e-6
    if "label_histogram" in row:
        ids, counts = np.unique(item["label"].numpy(), return_counts=True)
        assert {str(i): int(n) for i, n in zip(ids, counts, strict=True)} == row["label_histogram"]


def image_name(row: dict) -> str:
    """The name that the reference gives; in training on ADE20K it is a file name, elsewhere a stem."""
    third = row["third_item"]
    return (third if isinstance(third, str) else third[1]).removesuffix(".jpg")


@pytest.mark.parametrize("by_list", [False, True])
def test_val(tiny, by_list):
    name, root, lists = tiny
    data = SegmentationDataset(get_dataset_spec(name), root, "val", train=False,
                               list_file=lists.get("val") if by_list else None)
    rows = GOLDEN[name]["golden"]["val"]
    assert len(data) == len(rows) == 2
    for index, row in enumerate(rows):
        item = data[index]
        assert data.samples[index].image == f"{root}/{row['image_file']}"
        assert item["name"] == image_name(row) and item["index"] == index
        assert item["image"].dtype == torch.uint8 and item["label"].dtype == torch.int16
        matches(item, row)


@pytest.mark.parametrize("by_list", [False, True])
def test_train(tiny, by_list):
    name, root, lists = tiny
    data = SegmentationDataset(get_dataset_spec(name), root, "train", train=True, crop_size=CROP,
                               list_file=lists.get("train") if by_list else None)
    rows = GOLDEN[name]["golden"]["train"]
    assert len(rows) == 6
    for row in rows:
        index = row["seed"] % 2
        assert data.samples[index].image == f"{root}/{row['image_file']}"
        how = Augmentation(row["scale"], tuple(row["offset"]), row["mirrored"])
        item = data.augmented(index, *data.read(index), how)
        assert item["name"] == image_name(row)
        matches(item, row)


def test_cityscapes_val_during_training(tmp_path):
    """The reference validates with the training pipeline and a crop that may be larger than the image."""
    tiny_data.write(str(tmp_path), "citys")
    row = GOLDEN["citys"]["golden"]["val_during_training"]
    data = SegmentationDataset(get_dataset_spec("citys"), tmp_path, "val", train=True, crop_size=row["crop"],
                               scale=False, mirror=False)
    matches(data[0, 0], row)


def test_class_counts_and_crops():
    for name, facts in GOLDEN.items():
        spec = get_dataset_spec(name)
        assert spec.num_class == facts["num_class"]
        assert list(spec.train_crop) == facts["train_crop"]


@pytest.mark.parametrize("name, lists", [
    ("citys", {"train": "train.lst", "val": "val.lst", "test": "test.lst"}),
    ("camvid", {split: f"camvid_{split}_list.txt" for split in ("train", "val", "test")}),
    ("voc", {"train": "train_aug.txt", "val": "val.txt"}),
    ("coco_stuff_164k", {split: f"coco_stuff_164k_{split}.txt" for split in ("train", "val")}),
])
def test_published_sizes(name, lists):
    entries = {Path(entry["file"]).name: entry["entries"] for entry in GOLDEN[name]["lists"]}
    assert {split: part.published for split, part in get_dataset_spec(name).splits.items()} == {
        split: entries[file] for split, file in lists.items()}


def test_published_sizes_of_ade20k():
    spec = get_dataset_spec("ade20k")
    assert {split: spec.splits[split].published for split in spec.eval_splits} == GOLDEN["ade20k"]["split_sizes"]


def test_cityscapes_ids():
    table = get_dataset_spec("citys").id_to_train
    recorded = GOLDEN["citys"]["label_map"]["id_to_trainid"]
    assert {key: int(table[int(key)]) for key in recorded if key != "-1"} == {
        key: train for key, train in recorded.items() if key != "-1"}
    assert (table[34:] == -1).all()


def test_coco_absent_classes():
    spec = get_dataset_spec("coco_stuff_164k")
    facts = GOLDEN["coco_stuff_164k"]
    assert list(spec.absent_classes) == facts["ids_never_present"]
    assert ", ".join(spec.classes[train] for train in spec.absent_classes) in facts["ids_note"]
