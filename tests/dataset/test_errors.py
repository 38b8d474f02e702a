"""Bad data: one line that names the file and what was expected."""
from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from reference import tiny_data

from dataset import SegmentationDataset, get_dataset_spec
from utils.errors import UserError


def camvid(root: Path, split: str = "val", **options) -> SegmentationDataset:
    return SegmentationDataset(get_dataset_spec("camvid"), root, split, train=False, **options)


def message(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and len(text) > 20
    return text


def says(call, *parts: object) -> None:
    text = message(call)
    for part in parts:
        assert str(part) in text


class TestConstruction:
    """Everything that can be seen without decoding a picture."""

    def test_missing_root(self, tmp_path):
        says(lambda: camvid(tmp_path / "none"), tmp_path / "none", "expected the root of CamVid")

    @pytest.mark.parametrize("folder", ["val", "valannot"])
    def test_missing_split_folder(self, camvid_root, folder):
        (camvid_root / folder).rename(camvid_root / "elsewhere")
        says(lambda: camvid(camvid_root), f"{camvid_root / folder}: folder not found", "split 'val' of CamVid")

    def test_unknown_split(self, camvid_root):
        says(lambda: camvid(camvid_root, "vall"), "'vall'", "expected one of train, val, test")

    def test_empty_split(self, camvid_root):
        for path in (camvid_root / "val").iterdir():
            path.unlink()
        says(lambda: camvid(camvid_root), camvid_root / "val", "no images (*.png)")

    def test_image_without_label(self, camvid_root):
        (camvid_root / "valannot/b.png").unlink()
        says(lambda: camvid(camvid_root), f"{camvid_root / 'valannot/b.png'}: label not found")

    def test_label_without_image_is_no_concern(self, camvid_root):
        (camvid_root / "val/b.png").unlink()
        assert len(camvid(camvid_root)) == 1

    @pytest.mark.parametrize("crop", [(0, 4), (4,)])
    def test_crop_size(self, camvid_root, crop):
        says(lambda: camvid(camvid_root, crop_size=crop), "crop size", "height and width")

    def test_negative_seed(self, camvid_root):
        says(lambda: camvid(camvid_root, seed=-1), "seed -1")


class TestLists:
    """List files"""

    def test_missing(self, camvid_root):
        says(lambda: camvid(camvid_root, list_file=camvid_root / "no.lst"), camvid_root / "no.lst", "No such file")

    def test_not_text(self, camvid_root):
        says(lambda: camvid(camvid_root, list_file=camvid_root / "val/a.png"), camvid_root / "val/a.png", "list file")

    def test_empty(self, camvid_root):
        (camvid_root / "val.lst").write_text("\n")
        says(lambda: camvid(camvid_root, list_file=camvid_root / "val.lst"), camvid_root / "val.lst", "no entries")

    def test_malformed_line(self, camvid_root):
        (camvid_root / "val.lst").write_text("val/a.png valannot/a.png\n\nval/b.png\n")
        says(lambda: camvid(camvid_root, list_file=camvid_root / "val.lst"),
             f"{camvid_root / 'val.lst'}, line 3", "expected 'image label' per line")

    def test_malformed_id(self, tmp_path):
        lists = tiny_data.write(str(tmp_path), "voc")
        Path(lists["val"]).write_text("val_a val_b\n")
        says(lambda: SegmentationDataset(get_dataset_spec("voc"), tmp_path, "val", train=False, list_file=lists["val"]),
             "line 1", "expected one id per line")

    @pytest.mark.parametrize("line, missing", [("val/x.png valannot/a.png", "val/x.png: image not found"),
                                               ("val/a.png valannot/x.png", "valannot/x.png: label not found")])
    def test_entry_without_file(self, camvid_root, line, missing):
        (camvid_root / "val.lst").write_text(line)
        says(lambda: camvid(camvid_root, list_file=camvid_root / "val.lst"), missing)

    def test_list_decides_order_and_content(self, camvid_root):
        (camvid_root / "val.lst").write_text("val/b.png valannot/b.png\ntrain/a.png\ttrainannot/a.png\n")
        data = camvid(camvid_root, list_file=camvid_root / "val.lst")
        assert [Path(s.image).relative_to(camvid_root).as_posix() for s in data.samples] == ["val/b.png", "train/a.png"]

    def test_voc_uses_the_list_in_its_usual_place(self, tmp_path):
        lists = tiny_data.write(str(tmp_path), "voc")
        folder = tmp_path / "ImageSets/Segmentation"
        folder.mkdir(parents=True)
        Path(lists["train"]).rename(folder / "train_aug.txt")
        (folder / "train_aug.txt").write_text("train_b\n")
        spec = get_dataset_spec("voc")
        assert [s.name for s in SegmentationDataset(spec, tmp_path, "train", train=True).samples] == ["train_b"]
        assert len(SegmentationDataset(spec, tmp_path, "val", train=False)) == 2

    def test_voc_without_lists_refuses_to_train_on_val(self, tmp_path):
        """In the published folders the augmented labels include those of the validation images."""
        tiny_data.write(str(tmp_path), "voc")
        for path in (tmp_path / "SegmentationClass").iterdir():
            (tmp_path / "SegmentationClassAug" / path.name).write_bytes(path.read_bytes())
        says(lambda: SegmentationDataset(get_dataset_spec("voc"), tmp_path, "train", train=True),
             "2 labels also belong to split 'val'", "train_aug.txt")


class TestReading:
    """Files that turn out to be bad when they are read."""

    def test_truncated_png(self, camvid_root):
        path = camvid_root / "val/a.png"
        path.write_bytes(path.read_bytes()[:-400])
        says(lambda: camvid(camvid_root)[0], path, "truncated image")

    @pytest.mark.parametrize("part", [0.3, 0.9])
    def test_truncated_jpeg(self, tmp_path, part):
        """OpenCV decodes such a file to a picture whose lower part is gray."""
        tiny_data.write(str(tmp_path), "ade20k")
        path = tmp_path / "images/validation/val_a.jpg"
        data = cv2.imencode(".jpg", cv2.imread(str(path)))[1].tobytes()
        ade = SegmentationDataset(get_dataset_spec("ade20k"), tmp_path, "val", train=False)
        path.write_bytes(data)
        assert ade[0]["image"].shape == (3, 60, 80)
        path.write_bytes(data[:int(len(data) * part)])
        says(lambda: ade[0], path, "truncated image")

    @pytest.mark.parametrize("content", [b"", b"not a picture", b"\xff\xd8\xff\xe0"])
    def test_not_an_image(self, camvid_root, content):
        path = camvid_root / "val/a.png"
        path.write_bytes(content)
        says(lambda: camvid(camvid_root)[0], path, "expected a")

    def test_file_that_vanished(self, camvid_root):
        data = camvid(camvid_root)
        (camvid_root / "val/a.png").unlink()
        says(lambda: data[0], camvid_root / "val/a.png", "No such file")
        (camvid_root / "valannot/b.png").unlink()
        says(lambda: data[1], camvid_root / "valannot/b.png", "No such file")

    @pytest.mark.parametrize("keep", [0, 30, 60, -20])
    def test_truncated_label(self, camvid_root, keep):
        path = camvid_root / "valannot/a.png"
        path.write_bytes(path.read_bytes()[:keep])
        says(lambda: camvid(camvid_root)[0], path, "label")

    def test_color_label(self, camvid_root):
        path = camvid_root / "valannot/a.png"
        Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(path)
        says(lambda: camvid(camvid_root)[0], path, "mode RGB", "8-bit index")

    def test_sizes_differ(self, camvid_root):
        path = camvid_root / "valannot/a.png"
        path.write_bytes((camvid_root / "valannot/b.png").read_bytes())
        says(lambda: camvid(camvid_root)[0], path, "45x50", "60x80", camvid_root / "val/a.png")

    @pytest.mark.parametrize("kind, value, allowed", [
        ("camvid", 12, "0..11"), ("voc", 21, "0..20, 255"), ("ade20k", 151, "0..150"), ("ade20k", 255, "0..150"),
        ("coco_stuff_164k", 182, "0..181, 255"),
    ])
    def test_label_value_out_of_range(self, tmp_path, kind, value, allowed):
        tiny_data.write(str(tmp_path), kind)
        data = SegmentationDataset(get_dataset_spec(kind), tmp_path, "train", train=True, crop_size=(8, 8))
        label = tiny_data.label(kind, "train", "a")
        label[59, 79] = value
        Image.fromarray(label).save(data.samples[0].label)
        for key in (0, *((0, ordinal) for ordinal in range(5))):        # also when the crop does not show that pixel
            says(lambda key=key: data[key], data.samples[0].label, f"label value {value};", f"expects {allowed}")
