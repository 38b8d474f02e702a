"""tools/check_data.py as a user runs it."""
from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers import run_here
from PIL import Image
from reference import tiny_data

from tools.check_data import main

REPO = Path(__file__).parents[2]


@pytest.fixture
def check(capsys):
    """Run the program in this process."""
    return partial(run_here, capsys, main, prog="check_data.py")


def test_as_a_program(camvid_root):
    (camvid_root / "valannot/a.png").write_bytes(b"")
    got = subprocess.run([sys.executable, "tools/check_data.py", "--dataset", "camvid", "--data", str(camvid_root)],
                         cwd=REPO, text=True, capture_output=True, check=False)
    assert got.returncode == 2 and "valannot/a.png: truncated label" in got.stderr and got.stderr.count("\n") == 1
    assert got.stderr.startswith("check_data.py: error: ")


def test_report(check, camvid_root):
    Image.fromarray(np.full((60, 80), 3, np.uint8)).save(camvid_root / "trainannot/a.png")
    got = check("--dataset", "camvid", "--data", camvid_root, "--split", "train", "--all")
    assert got.returncode == 0 and got.stderr == ""
    lines = got.stdout.splitlines()
    assert lines[1] == "train: 2 images, PUBLISHED: 367; 2 decoded"
    label = tiny_data.label("camvid", "train", "b")
    road = 4800 + int((label == 3).sum())
    labeled = 4800 + int((label < 11).sum())
    assert lines[2 + 3].split() == ["3", "road", f"{100 * road / labeled:.3f}", "%"]
    assert lines[-1].split()[-2] == f"{100 * (label == 11).sum() / (4800 + label.size):.3f}"


def test_all_splits_and_lists(check, camvid_root):
    (camvid_root / "one.lst").write_text("val/a.png valannot/a.png\n")
    got = check("--dataset", "camvid", "--data", camvid_root, "--sample", 1, "--list", f"val={camvid_root / 'one.lst'}")
    assert got.returncode == 0
    assert [line.split(";")[0] for line in got.stdout.splitlines()[1:4]] == [
        "train: 2 images, PUBLISHED: 367", "val: 1 images, PUBLISHED: 101", "test: absent"]


@pytest.mark.parametrize("damage, expected", [
    (lambda root: (root / "valannot/b.png").unlink(), "valannot/b.png: label not found"),
    (lambda root: (root / "val/b.png").write_bytes(b"no"), "val/b.png: cannot decode"),
    (lambda root: (root / "val").rename(root / "other"), "val: folder not found"),
])
def test_damage(check, camvid_root, damage, expected):
    damage(camvid_root)
    got = check("--dataset", "camvid", "--data", camvid_root, "--all")
    assert got.returncode == 2 and expected in got.stderr and got.stderr.count("\n") == 1


def write_masks(root: Path, *masks: list[int], classes: str = "background\nvessel\n", split: str = "train") -> Path:
    """A `folder` data set of images of 4 pixels with these label values."""
    for kind in ("images", "labels"):
        (root / kind / split).mkdir(parents=True)
    for number, values in enumerate(masks):
        Image.new("RGB", (2, 2)).save(root / f"images/{split}/{number}.png")
        Image.fromarray(np.array(values, np.uint8).reshape(2, 2)).save(root / f"labels/{split}/{number}.png")
    (root / "classes.txt").write_text(classes)
    return root


@pytest.mark.parametrize("more", [(), ("--sample", 1)])
def test_binary_masks_of_0_and_255(check, tmp_path, more):
    got = check("--dataset", "folder", "--data", write_masks(tmp_path, [0, 0, 0, 255], [0, 255, 0, 0]), *more)
    assert got.returncode == 0 and (
        'warning: train: label value 255 (25 % of the pixels) is ignored; if it is a class, give each class its value '
        'as "id" in classes.json (data/README.md)') in got.stdout
    (tmp_path / "classes.json").write_text('{"classes": ["background", {"name": "vessel", "id": 255}]}')
    got = check("--dataset", "folder", "--data", tmp_path, *more)
    assert got.returncode == 0 and "25.000 %" in got.stdout and "warning" not in got.stdout


def test_ignored_values_are_no_riddle_where_every_class_occurs(check, tmp_path, camvid_root):
    got = check("--dataset", "folder", "--data", write_masks(tmp_path / "mine", [0, 1, 255, 255]))
    assert got.returncode == 0 and "is ignored" not in got.stdout
    for path in (camvid_root / "trainannot").iterdir():
        label = tiny_data.label("camvid", "train", path.stem)
        Image.fromarray(np.where(label == 11, 11, 3).astype(np.uint8)).save(path)
    got = check("--dataset", "camvid", "--data", camvid_root, "--all")
    assert "not occur" in got.stdout and "is ignored" not in got.stdout, "its values are published"


def test_labels_that_begin_at_1(check, tmp_path):
    root = write_masks(tmp_path, [1, 2, 255, 2])
    got = check("--dataset", "folder", "--data", root)
    assert got.returncode == 2 and got.stderr.endswith(
        f"label value 2; folder {root} expects 0..1, 255; if the labels begin at 1, give each class its value as "
        '"id" in classes.json (data/README.md)\n')
    for other in ([0, 1, 2, 2], [1, 1, 3, 2], [2, 2, 2, 2]):
        Image.fromarray(np.array(other, np.uint8).reshape(2, 2)).save(root / "labels/train/0.png")
        got = check("--dataset", "folder", "--data", root)
        assert got.returncode == 2 and "begin at 1" not in got.stderr


def test_a_set_without_val(check, tmp_path):
    root = write_masks(tmp_path, [0, 1, 1, 0])
    got = check("--dataset", "folder", "--data", root)
    assert got.returncode == 0
    assert "val: absent; train_kd.py needs --selection-split train or --skip-val" in got.stdout
    got = check("--dataset", "folder", "--data", root, "--split", "val")
    assert got.returncode == 2 and "images/val: folder not found" in got.stderr
    (root / "labels/val").mkdir()
    got = check("--dataset", "folder", "--data", root)
    assert got.returncode == 2 and "images/val: folder not found" in got.stderr


def test_nothing_need_be_decoded(check, camvid_root):
    (camvid_root / "val/b.png").write_bytes(b"no")
    got = check("--dataset", "camvid", "--data", camvid_root, "--sample", 0)
    assert got.returncode == 0 and "val: 2 images, PUBLISHED: 101; 0 decoded" in got.stdout


@pytest.mark.parametrize("args, expected", [
    (("--dataset", "camvod"), "unknown data set 'camvod'"), (("--dataset", "camvid", "--list", "val"), "SPLIT=FILE"),
    (("--dataset", "camvid", "--list", "dev=x"), "no split 'dev'"),
    (("--dataset", "camvid", "--sample", "-1"), "--sample: expected a whole number of at least 0, got '-1'"),
    (("--dataset", "camvid", "--sample", "few"), "--sample: expected a whole number of at least 0, got 'few'"),
    (("--dataset", "camvid", "--slpit", "val"), "did you mean --split?"), ((), "required: --dataset"),
])
def test_bad_arguments(check, camvid_root, args, expected):
    got = check(*args, "--data", camvid_root)
    assert got.returncode == 2 and expected in got.stderr and got.stderr.count("\n") == 1
