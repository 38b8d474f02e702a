"""tools/predict.py: pictures, folders and a video in; masks, overlays and indices out, the same as ``Segmenter``'s."""
from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import assert_refused
from PIL import Image

from engine.segmenter import Segmenter
from engine.trained import Known
from models import get_segmentation_model, save_state_dict
from tools import predict as program
from tools.video import VideoReader, VideoWriter
from utils.visualize import color_mask, overlay


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Weights of 11 classes, ``pictures/`` of two sizes, and a video of 5 frames."""
    root = tmp_path_factory.mktemp("predict")
    torch.manual_seed(1)
    save_state_dict(get_segmentation_model("deeplabv3", "resnet18_w0.125", 11), root / "net.pth")
    rng = np.random.default_rng(0)
    (root / "pictures" / "deep").mkdir(parents=True)
    for name, side in (("a.png", 48), ("a.jpg", 48), ("deep/b.png", 40)):
        picture = cv2.resize(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8), (64, side))
        cv2.imwrite(str(root / "pictures" / name), picture)
    (root / "pictures" / "note.txt").write_text("no picture")
    film = VideoWriter(root / "film.avi", 12)
    for shift in range(5):
        film.add(np.roll(np.asarray(Image.open(root / "pictures" / "a.png")), 3 * shift, axis=1))
    film.finish()
    return root


def test_everything_that_is_asked_for_is_written(place, tmp_path, capsys) -> None:
    out = tmp_path / "new" / "out"
    argv = [str(place / "net.pth"), str(place / "pictures"), str(place / "film.avi"), "--out", str(out), "--dataset",
            "camvid", "--device", "cpu", "--batch-size", "2", "--frames", "3"]
    assert program.main(argv) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "deeplabv3-resnet18_w0.125: 3 pictures, 1 video of 3 frames"
    assert said[1:] == [f"{out}/colors: 3 PNG files, 1 video", f"{out}/overlay: 3 PNG files, 1 video",
                        f"{out}/ids: 6 PNG files"]
    names = {"a.png.png", "a.jpg.png", "deep/b.png"}
    written = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert written == {f"{kind}/{name}" for kind in ("colors", "overlay", "ids") for name in names} | {
        "colors/film.mp4", "overlay/film.mp4", *(f"ids/film/00000{i}.png" for i in range(3))}
    segmenter = Segmenter.from_pretrained(place / "net.pth", device="cpu", known=Known(dataset="camvid"))
    source = place / "pictures" / "deep" / "b.png"
    index, image = segmenter(source), np.asarray(Image.open(source))
    np.testing.assert_array_equal(np.asarray(Image.open(out / "ids" / "deep" / "b.png")), index)
    np.testing.assert_array_equal(np.asarray(Image.open(out / "colors" / "deep" / "b.png")),
                                  color_mask(index, segmenter.palette))
    shown = np.asarray(Image.open(out / "overlay" / "deep" / "b.png"))
    np.testing.assert_array_equal(shown[:40], overlay(image, index, segmenter.palette))
    assert shown.shape[1] == 64 and shown.shape[0] > 50, "the legend stands below"
    with VideoReader(out / "overlay" / "film.mp4") as film, VideoReader(place / "film.avi") as source:
        frames, originals = list(film.frames()), list(source.frames(3))
    assert len(frames) == 3 and film.rate == 12 and frames[0].shape[0] > 48
    for i, original in enumerate(originals):
        found = np.asarray(Image.open(out / "ids" / "film" / f"00000{i}.png"))
        np.testing.assert_array_equal(found, segmenter(original))


def test_only_what_is_asked_for_is_written(place, tmp_path) -> None:
    argv = [str(place / "net.pth"), str(place / "pictures" / "a.png"), "--out", str(tmp_path), "--device", "cpu"]
    assert program.main([*argv, "--write", "overlay", "--no-legend", "--alpha", "0"]) == 0
    (file,) = (p for p in tmp_path.rglob("*") if p.is_file())
    assert file == tmp_path / "overlay" / "a.png"
    np.testing.assert_array_equal(np.asarray(Image.open(file)), np.asarray(Image.open(place / "pictures" / "a.png")))


def test_a_legend_names_the_classes_that_occur(place) -> None:
    segmenter = Segmenter.from_pretrained(place / "net.pth", device="cpu", known=Known(dataset="camvid"))
    writer = program.Writer(segmenter, program.Output(out="x", write=("overlay",)))
    image, index = np.zeros((60, 400, 3), np.uint8), np.zeros((60, 400), np.uint8)
    index[:, 200:] = 8
    strips = {moves: writer.pictures(image, index, moves)["overlay"][60:].reshape(-1, 3) for moves in (False, True)}
    for moves, strip in strips.items():
        colors = set(map(tuple, strip.tolist()))
        shown = {k for k, color in enumerate(segmenter.palette.tolist()) if tuple(color) in colors}
        assert shown == (set(range(11)) if moves else {0, 8}), "a video has always the same legend"


def test_bad_input_is_named(place, tmp_path, capsys) -> None:
    net, out = str(place / "net.pth"), ["--out", str(tmp_path / "out"), "--device", "cpu"]
    (tmp_path / "film.mp4").write_bytes(b"no video")
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.png").write_bytes(b"no picture")
    for given, words in ((["nothing.png"], ["nothing.png: no such picture"]),
                         ([str(tmp_path / "empty")], ["no picture or video in this folder"]),
                         ([str(tmp_path / "film.mp4")], ["film.mp4: cannot be opened", "OpenCV can decode"]),
                         ([str(tmp_path / "x.png")], ["x.png", "cannot decode this image"]),
                         (["77"], ["camera 77: cannot be opened"]),
                         ([str(place / "pictures" / "a.png")] * 2, ["would both become a.png"])):
        assert_refused(capsys, program.main, [net, *given, *out], *words)
    assert not [p for p in tmp_path.rglob("*") if ".tmp" in p.name]


@pytest.mark.parametrize("breaks", [False, True])
def test_a_camera_ends_with_ctrl_c_and_its_files_stay(breaks, place, tmp_path, monkeypatch, capsys) -> None:
    """Also when it is unplugged, which is said."""
    frames = iter([np.zeros((48, 64, 3), np.uint8)] * 2)

    class Camera:
        def __init__(self, source):
            assert source == 0

        def isOpened(self):
            return True

        def get(self, what):
            return 0.0

        def read(self):
            frame = next(frames, None)
            if frame is None and not breaks:
                raise KeyboardInterrupt
            return frame is not None, frame

        def release(self):
            pass

    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    argv = [str(place / "net.pth"), "0", "--out", str(tmp_path), "--device", "cpu", "--write", "ids", "colors"]
    assert program.main(argv) == breaks
    said = "camera 0: gives no more frames after 2; what came until then is written\n"
    assert capsys.readouterr().err == said * breaks
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()} == {
        "ids/camera0/000000.png", "ids/camera0/000001.png", "colors/camera0.mp4"}


@pytest.mark.parametrize("name, code, said", [
    ("film.avi", 1, "breaks off, {} of its 40 frames can be read"),
    ("film.mkv", 0, "ends after {} frames but lasts for 40: it breaks off, or its sound is longer")])
def test_a_video_that_is_cut_off_is_noticed(place, tmp_path, capsys, name, code, said) -> None:
    whole = VideoWriter(tmp_path / name, 12)
    for value in range(40):
        whole.add(np.random.default_rng(value).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    whole.finish()
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:len(data) // 2])
    argv = [str(place / "net.pth"), str(tmp_path / name), "--device", "cpu", "--write", "ids"]
    assert program.main([*argv, "--out", str(tmp_path / "out")]) == code
    done = len(list((tmp_path / "out").rglob("*.png")))
    assert 0 < done < 38 and capsys.readouterr().err == (
        f"{tmp_path}/{name}: {said.format(done)}; what came until then is written\n")
    assert program.main([*argv, "--frames", "5", "--out", str(tmp_path / "few")]) == 0
    assert capsys.readouterr().err == ""
