"""The `folder` data set: class files, splits, and what can be wrong with them."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import SegmentationDataset, get_dataset_spec
from utils.errors import UserError


def write_pair(root: Path, split: str, stem: str, values: list[int], suffix: str = ".png") -> None:
    """An image of 8 x 10 pixels whose mask cycles through `values`."""
    image, label = root / "images" / split / f"{stem}{suffix}", root / "labels" / split / f"{stem}.png"
    for path in (image, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 10, 3), 90, np.uint8)).save(image)
    Image.fromarray(np.resize(np.array(values, np.uint8), (8, 10))).save(label)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_pair(tmp_path, "train", "x", [0, 1, 2, 255], ".JPG")
    write_pair(tmp_path, "train", "a.b", [2])
    write_pair(tmp_path, "val", "sub/y", [0, 255], ".jpeg")
    (tmp_path / "classes.txt").write_text("# my classes\nroad 1 2 3\n\ntall tree\nroute 66, 7,8,9\n")
    return tmp_path


def test_text_file(root):
    spec = get_dataset_spec("folder", root)
    assert spec.classes == ("road", "tall tree", "route 66") and spec.num_class == 3
    assert spec.palette[[0, 2]].tolist() == [[1, 2, 3], [7, 8, 9]]
    assert spec.allowed_ids() == "0..2, 255"
    assert spec.report_splits == () and list(spec.splits) == ["train", "val"]


def test_items(root):
    spec = get_dataset_spec("folder", root)
    train = SegmentationDataset(spec, root, "train", train=True, crop_size=(6, 6))
    assert [sample.name for sample in train.samples] == ["a.b", "x"]
    assert train[1]["label"][0, :4].tolist() == [0, 1, 2, -1]
    assert train[0, 3]["image"].shape == (3, 6, 6)
    val = SegmentationDataset(spec, root, "val", train=False)
    assert len(val) == 1 and val[0]["name"] == "y" and sorted(val[0]["label"].unique().tolist()) == [-1, 0]


def test_a_label_with_its_ending_in_capitals(root):
    (root / "labels/train/x.png").rename(root / "labels/train/x.PNG")
    train = SegmentationDataset(get_dataset_spec("folder", root), root, "train", train=False)
    assert train.samples[1].label == str(root / "labels/train/x.PNG") and train[1]["label"][0, :3].tolist() == [0, 1, 2]


def test_an_image_is_no_label_of_another_format(tmp_path):
    (tmp_path / "a.jpg").touch()
    (tmp_path / "list.lst").write_text("a.jpg a.png\n")
    with pytest.raises(UserError, match="a.png: label not found; expected one for every entry of the split$"):
        SegmentationDataset(get_dataset_spec("citys", tmp_path), tmp_path, "train", list_file=tmp_path / "list.lst",
                            train=False)


def test_a_label_of_another_format(root):
    (root / "labels/train/x.png").rename(root / "labels/train/x.bmp")
    with pytest.raises(UserError, match=r"train/x.png: label not found; .* \(there is x.bmp; labels are PNG files\)$"):
        SegmentationDataset(get_dataset_spec("folder", root), root, "train", train=False)


def test_mask_value_that_is_no_class(root):
    write_pair(root, "train", "x", [3], ".JPG")
    with pytest.raises(UserError, match=r"labels/train/x.png: label value 3; folder .* expects 0\.\.2, 255"):
        SegmentationDataset(get_dataset_spec("folder", root), root, "train", train=False)[1]


def test_ignore_line(root):
    (root / "classes.txt").write_text("a\nb\nIgnore: 2, 200\n")
    spec = get_dataset_spec("folder", root)
    assert spec.allowed_ids() == "0..2, 200" and spec.id_to_train[[0, 1, 2, 200]].tolist() == [0, 1, -1, -1]


def test_json_file_with_ids_for_two_value_masks(root):
    (root / "classes.json").write_text(json.dumps({
        "classes": [{"name": "background", "id": 0}, {"name": "vessel", "id": 255, "color": [255, 0, 0]}],
        "train_crop": [32, 48]}))
    spec = get_dataset_spec("folder", root)
    assert spec.classes == ("background", "vessel") and spec.allowed_ids() == "0, 255"
    assert spec.id_to_train[255] == 1 and spec.train_to_id.tolist() == [0, 255]
    assert spec.palette[1].tolist() == [255, 0, 0] and spec.train_crop == (32, 48)


def test_further_splits(root):
    write_pair(root, "test", "z", [1])
    assert get_dataset_spec("folder", root).report_splits == ("test",)
    (root / "labels/test/z.png").unlink()
    (root / "labels/test").rmdir()
    spec = get_dataset_spec("folder", root)
    assert spec.report_splits == () and spec.eval_splits == ("train", "val")
    assert (SegmentationDataset(spec, root, "test", train=False)[0]["label"] == -1).all()


def test_two_images_of_one_name(root):
    write_pair(root, "train", "x", [0], ".png")
    with pytest.raises(UserError, match="a second image called 'x'"):
        SegmentationDataset(get_dataset_spec("folder", root), root, "train", train=False)


@pytest.mark.parametrize("text, expected", [
    ("", "no classes"), ("# nothing\n", "no classes"), ("a\na\n", "'a' is empty or given twice"),
    ("a 1 2 300\n", "line 1: 300; expected a whole number in 0..255"), ("a\nignore: x\n", "line 2: 'x'"),
    ("a\nb\nignore: 1\n", "mask value 1 of class 'b'"), ("\n".join(map(str, range(257))), "mask value 255"),
])
def test_bad_text(root, text, expected):
    (root / "classes.txt").write_text(text)
    with pytest.raises(UserError) as error:
        get_dataset_spec("folder", root)
    assert f"{root / 'classes.txt'}" in str(error.value) and expected in str(error.value)


@pytest.mark.parametrize("content, expected", [
    ("{", "not JSON"), ("[" * 100000, "not JSON"), ("[]", "list \"classes\""), ('{"classes": {}}', "list \"classes\""),
    ('{"classes": [1]}', "class 0: expected a name"), ('{"classes": [""]}', "is empty"),
    ('{"classes": [{"name": "a", "color": [1, 2]}]}', "color [1, 2]"),
    ('{"classes": [{"name": "a", "color": [1, 2, 256]}]}', "256; expected a whole number"),
    ('{"classes": [{"name": "a", "id": true}]}', "True; expected a whole number"),
    ('{"classes": ["a"], "ignore": 3}', "\"ignore\" is 3"), ('{"classes": ["a"], "ignore": [-1]}', "-1; expected"),
    ('{"classes": ["a"], "train_crop": [0, 5]}', "\"train_crop\" is [0, 5]"),
    ('{"classes": [{"name": "a", "id": 1}, "b"]}', "mask value 1 of class 'b'"),
])
def test_bad_json(root, content, expected):
    (root / "classes.json").write_text(content)
    with pytest.raises(UserError) as error:
        get_dataset_spec("folder", root)
    assert f"{root / 'classes.json'}" in str(error.value) and expected in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_class_file(tmp_path):
    with pytest.raises(UserError, match="no class file; expected classes.json or classes.txt"):
        get_dataset_spec("folder", tmp_path)
    with pytest.raises(UserError, match="needs its root"):
        get_dataset_spec("folder")


def test_class_file_that_is_not_text(root):
    (root / "classes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="classes.txt: cannot read this class file"):
        get_dataset_spec("folder", root)


def test_the_digest_tells_training_sets_apart_but_not_folders(tmp_path):
    from helpers import write_folder_dataset

    roots = [write_folder_dataset(tmp_path / name) for name in ("a", "b", "c", "d")]
    (roots[2] / "images/train/7.png").unlink(), (roots[2] / "labels/train/7.png").unlink()
    (roots[3] / "classes.txt").write_text("one\ntwo\n")

    def digest(root, **more):
        spec = get_dataset_spec("folder", str(root))
        return SegmentationDataset(spec, root, "train", **{"train": True, "crop_size": (64, 64), **more}).digest()

    first = digest(roots[0])
    assert digest(roots[1]) == first
    others = [digest(roots[2]), digest(roots[3]), digest(roots[0], crop_size=(64, 96)),
              digest(roots[0], ignore_label=255), digest(roots[0], limit=3)]
    assert len({first, *others}) == 6
