"""Files that would be read to something else than what they show: named when loaded, and by tools/check_data.py."""
from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from dataset import SegmentationDataset, get_dataset_spec
from dataset.cache import use_cache
from dataset.io import image_size, read_image
from tools.check_data import main
from utils.cli import run_main
from utils.errors import UserError

SIZE = (8, 10)


def picture(size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))


def label(size: tuple[int, int] = SIZE, value: int | None = None) -> Image.Image:
    values = np.resize(np.array([0, 1, 255], np.uint8), size) if value is None else np.full(size, value, np.uint8)
    return Image.fromarray(values)


def write_turned(path: Path, orientation: int, size: tuple[int, int] = SIZE, kind: str = "JPEG") -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(size).save(path, kind, exif=exif)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes; a.png and b.jpg to train on, c.png to validate on."""
    for split, names in (("train", ("a.png", "b.jpg")), ("val", ("c.png",))):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).mkdir(parents=True)
        for name in names:
            picture().save(tmp_path / "images" / split / name)
            label().save(tmp_path / "labels" / split / f"{name[0]}.png")
    (tmp_path / "classes.txt").write_text("road\ncar\n")
    return tmp_path


def train_set(root: Path, **options) -> SegmentationDataset:
    return SegmentationDataset(get_dataset_spec("folder", root), root, "train", train=False, **options)


def deep_image(root: Path) -> None:
    cv2.imwrite(str(root / "images/train/a.png"), np.full((*SIZE, 3), 4000, np.uint16))


def deep_tiff(root: Path) -> None:
    (root / "images/train/a.png").unlink()
    cv2.imwrite(str(root / "images/train/a.tif"), np.full((*SIZE, 3), 4000, np.uint16))


def deep_label(root: Path) -> None:
    cv2.imwrite(str(root / "labels/train/a.png"), np.ones(SIZE, np.uint16))


def turned_label(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    label().save(root / "labels/train/a.png", exif=exif)


def long_side(root: Path) -> None:
    picture((1, 2**15)).save(root / "images/train/a.png")
    label((1, 2**15)).save(root / "labels/train/a.png")


def folder_as_image(root: Path) -> None:
    (root / "images/train/d.png").mkdir()


def folder_as_label(root: Path) -> None:
    (root / "labels/train/a.png").unlink()
    (root / "labels/train/a.png").mkdir()


def foreign_name(root: Path) -> None:
    os.rename(root / "images/train/a.png", os.fsencode(root / "images/train") + b"/stra\xdfe.png")


def endless_link(root: Path) -> None:
    (root / "images/train/again").symlink_to(root / "images")


def missing_label(root: Path) -> None:
    (root / "labels/train/a.png").unlink()


#: what is done to the folder, the file that is named, and what is said of it
FAULTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "16-bit image": (deep_image, "images/train/a.png", "more than 8 bits per color"),
    "16-bit TIFF": (deep_tiff, "images/train/a.tif", "more than 8 bits per color"),
    "16-bit label": (deep_label, "labels/train/a.png", "expected one 8-bit index per pixel"),
    "upside down": (lambda root: write_turned(root / "images/train/b.jpg", 3), "images/train/b.jpg", "orientation 3"),
    "mirrored PNG": (lambda root: write_turned(root / "images/train/a.png", 2, kind="PNG"), "images/train/a.png",
                     "orientation 2"),
    "turned, label as stored": (lambda root: write_turned(root / "images/train/b.jpg", 6), "images/train/b.jpg",
                                "nothing tells that its label is turned too"),
    "turned label": (turned_label, "labels/train/a.png", "turn or mirror this label"),
    "long side": (long_side, "images/train/a.png", "1x32768 pixels (height x width); expected sides of at most 32767"),
    "folder as image": (folder_as_image, "images/train/d.png", "a folder with the name of a picture"),
    "folder as label": (folder_as_label, "labels/train/a.png", "a folder; expected the label"),
    "foreign name": (foreign_name, "images/train/stra\\udcdfe.png", "a name that is not UTF-8"),
    "endless link": (endless_link, "images/train/again", "in which it lies itself"),
    "missing label": (missing_label, "labels/train/a.png", "label not found"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_loading_and_check_data_name_the_file(root, tmp_path, capsys, name):
    damage, file, said = FAULTS[name]
    damage(root)
    with pytest.raises(UserError) as error:
        data = train_set(root)
        [data[i] for i in range(len(data))]
    assert file in str(error.value) and said in str(error.value) and "\n" not in str(error.value)
    target = tmp_path / "report.json"
    argv = ["--dataset", "folder", "--data", str(root), "--all", "--split", "train", "--json", str(target)]
    assert run_main(main, argv, prog="check_data.py") == 2
    shown = capsys.readouterr()
    assert shown.err == f"check_data.py: error: {error.value}\n" and str(error.value) not in shown.out
    report = json.loads(target.read_text())
    (found,) = [problem for problem in report["problems"] if problem["level"] == "error"]
    assert file in found["file"] and found["message"] == str(error.value) and found["split"] == "train"
    assert report["errors"] == 1


def test_check_data_goes_on_after_a_fault(root, tmp_path, capsys):
    deep_image(root), turned_label(root)
    label(value=255).save(root / "labels/val/c.png")
    label().save(root / "labels/train/z.png")
    (root / "images/test").mkdir()
    target = tmp_path / "report.json"
    argv = ["--dataset", "folder", "--data", str(root), "--all", "--workers", "2", "--json", str(target)]
    assert run_main(main, argv, prog="check_data.py") == 2
    shown, report = capsys.readouterr(), json.loads(target.read_text())
    assert [(p["level"], p["split"]) for p in report["problems"]] == [
        ("error", "train"), ("error", "val"), ("error", "test"), ("warning", "train")]
    assert report["problems"][0]["file"].endswith("images/train/a.png")
    assert "val: every pixel of the 1 labels that were decoded (labels/val) is ignored" in shown.out
    assert report["problems"][2]["message"].startswith(f"{root}/images/test: no images")
    assert report["problems"][3]["message"] == (
        f"{root}/labels/train/z.png: a label without an image, which no training reads")
    assert report["splits"]["train"] == {
        "images": 2, "published": None, "labeled": True, "decoded": 2, "pixels_per_class": [27, 27],
        "ignored_pixels": 26, "labels_ignored_as_a_whole": 0}
    assert shown.err.startswith("check_data.py: error: 3 errors, the first: ") and shown.err.count("\n") == 1


def test_warnings_are_no_errors(root, capsys):
    label(value=255).save(root / "labels/train/a.png")
    label(value=1).save(root / "labels/train/b.png")
    argv = ["--dataset", "folder", "--data", str(root), "--all", "--split", "train"]
    assert run_main(main, argv, prog="check_data.py") == 0
    shown = capsys.readouterr()
    assert shown.err == "" and "warning: train: 1 of 2 labels (labels/train) are ignored as a whole" in shown.out
    assert "warning: train: mIoU counts 1 class that does not occur: road" in shown.out


class TestOrientation:
    """EXIF data of images; labels have none."""

    @pytest.mark.parametrize("orientation", [5, 6, 7, 8])
    def test_a_label_of_the_turned_size_fits(self, root, orientation):
        write_turned(root / "images/train/b.jpg", orientation, SIZE[::-1])
        item = train_set(root)[1]
        assert item["image"].shape[1:] == item["label"].shape == SIZE

    def test_squares_tell_nothing(self, root):
        write_turned(root / "images/train/b.jpg", 6, (8, 8))
        label((8, 8)).save(root / "labels/train/b.png")
        with pytest.raises(UserError, match="orientation 6"):
            train_set(root)[1]

    @pytest.mark.parametrize("orientation", [0, 1, 9])
    def test_what_turns_nothing(self, root, orientation):
        write_turned(root / "images/train/b.jpg", orientation)
        assert train_set(root)[1]["image"].shape[1:] == SIZE

    def test_a_cache_refuses_them_too(self, root, tmp_path):
        write_turned(root / "images/train/b.jpg", 3)
        with pytest.raises(UserError, match="b.jpg: its EXIF data turn or mirror"):
            use_cache([train_set(root)], tmp_path / "cache")

    def test_images_without_labels_are_turned(self, root):
        (root / "images/test").mkdir()
        write_turned(root / "images/test/x.jpg", 6)
        data = SegmentationDataset(get_dataset_spec("folder", root), root, "test", train=False)
        assert data[0]["image"].shape[1:] == SIZE[::-1]

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
    def test_the_head_tells_the_size(self, tmp_path, kind):
        for orientation in (1, 3, 6, 8):
            write_turned(path := tmp_path / f"{orientation}.{kind.lower()}", orientation, kind=kind)
            assert image_size(path) == read_image(path).shape[:2]
        assert image_size(path) == SIZE[::-1]

    def test_published_labels_fit_turned_images(self, tmp_path):
        """As the reference reads them."""
        for folder in ("images/validation", "annotations/validation"):
            (tmp_path / folder).mkdir(parents=True)
        write_turned(tmp_path / "images/validation/x.jpg", 3)
        label(value=1).save(tmp_path / "annotations/validation/x.png")
        data = SegmentationDataset(get_dataset_spec("ade20k"), tmp_path, "val", train=False)
        stored = cv2.imread(str(tmp_path / "images/validation/x.jpg"), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        assert np.array_equal(data[0]["image"].permute(1, 2, 0).numpy(), stored[::-1, ::-1])


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_small_gray_labels_keep_their_values(root, bits):
    """Pillow spreads them over 0..255."""
    values = np.resize(np.array([0, 1], np.uint8), SIZE)
    cv2.imwrite(str(root / "labels/train/a.png"), values)
    packed = np.packbits(np.unpackbits(values[..., None], axis=2)[..., 8 - bits:].reshape(SIZE[0], -1), axis=1)
    write_gray_png(root / "labels/train/a.png", SIZE, bits, packed)
    assert sorted(train_set(root)[0]["label"].unique().tolist()) == [0, 1]
    assert np.array_equal(train_set(root)[0]["label"].numpy(), values)


def write_gray_png(path: Path, size: tuple[int, int], bits: int, rows: np.ndarray) -> None:
    """rows: uint8 [H, N], packed pixels."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", size[1], size[0], bits, 0, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def test_folders_that_are_links_are_searched(root):
    (root / "elsewhere").mkdir()
    picture().save(root / "elsewhere/d.png")
    (root / "images/train/more").symlink_to(root / "elsewhere")
    (root / "labels/train/more").mkdir()
    label().save(root / "labels/train/more/d.png")
    assert [sample.name for sample in train_set(root).samples] == ["a", "b", "d"]


class TestLists:
    """What editors leave in list files."""

    def pairs(self, root: Path, content: bytes) -> list[str]:
        (root / "list.txt").write_bytes(content)
        return [Path(sample.image).name for sample in train_set(root, list_file=root / "list.txt").samples]

    def test_a_byte_order_mark_and_windows_lines(self, root):
        assert self.pairs(root, b"\xef\xbb\xbfimages/train/b.jpg labels/train/b.png  \r\n\r\n"
                                b"  images/train/a.png\t labels/train/a.png\t\r\n") == ["b.jpg", "a.png"]

    def test_spaces_in_paths(self, root):
        (root / "images/train/a.png").rename(root / "images/train/a b.png")
        assert self.pairs(root, b"images/train/a b.png\tlabels/train/a.png\n") == ["a b.png"]
        with pytest.raises(UserError, match="list.txt, line 1: 3 words; .*a tab between paths with spaces"):
            self.pairs(root, b"images/train/a b.png labels/train/a.png\n")

    def test_an_image_listed_twice_is_a_warning(self, root, capsys):
        line = b"images/train/a.png labels/train/a.png\n"
        self.pairs(root, line * 2)
        argv = ["--dataset", "folder", "--data", str(root), "--split", "train", "--list", f"train={root}/list.txt"]
        assert run_main(main, argv, prog="check_data.py") == 0
        assert f"warning: {root}/images/train/a.png: listed 2 times" in capsys.readouterr().out
