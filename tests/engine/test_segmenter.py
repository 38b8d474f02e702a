"""``Segmenter``: the classes that ``eval.py`` would find, from whatever a picture comes in and a network lies in."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import CLASSES, write_folder_dataset
from PIL import Image

from engine.predict import predict
from engine.segmenter import Segmenter
from engine.trained import Known, open_trained
from models import get_segmentation_model, save_state_dict
from models.hub import save_pretrained
from utils.errors import UserError

NAME, BACKBONE = "deeplabv3", "resnet18_w0.125"
STEM = f"kd_{NAME}_{BACKBONE}_folder"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run with other weights in its two files; beside it its data, ``data``."""
    root = tmp_path_factory.mktemp("segmenter")
    write_folder_dataset(root / "data", train=1, val=2, size=(64, 96))
    (root / "run").mkdir()
    for seed, name in enumerate((f"{STEM}.pth", f"{STEM}_best_model.pth")):
        torch.manual_seed(seed)
        save_state_dict(get_segmentation_model(NAME, BACKBONE, CLASSES, preprocess="rgb"), root / "run" / name)
    config = {"config": {"dataset": "folder", "data": str(root / "data"), "student_model": NAME}}
    (root / "run" / f"{STEM}_config.json").write_text(json.dumps(config))
    return root / "run"


@pytest.fixture(scope="module")
def image(run) -> Path:
    return run.parent / "data" / "images" / "val" / "0.png"


@torch.no_grad()
def logits(run: Path, image: Path, which: str = "_best_model") -> torch.Tensor:
    net = get_segmentation_model(NAME, BACKBONE, CLASSES, pretrained=str(run / f"{STEM}{which}.pth")).eval()
    return predict(net, torch.from_numpy(cv2.imread(str(image))).permute(2, 0, 1)[None])[0]


def test_classes_are_those_of_predict(run, image) -> None:
    segmenter, expected = Segmenter.from_pretrained(run, device="cpu"), logits(run, image)
    index = segmenter(image)
    assert index.dtype == np.uint8 and len(np.unique(index)) > 1
    np.testing.assert_array_equal(index, expected.argmax(0).numpy())
    share = segmenter.probabilities(str(image))
    assert share.dtype == np.float32
    np.testing.assert_allclose(share, expected.softmax(0).numpy(), atol=1e-6)
    assert segmenter.classes == tuple(f"class{i}" for i in range(CLASSES)) and segmenter.palette.shape == (CLASSES, 3)


def test_a_picture_is_a_path_or_pil_or_an_rgb_array_and_many_are_a_list(run, image) -> None:
    segmenter = Segmenter.from_pretrained(run, device="cpu")
    index, rgb = segmenter(image), np.asarray(Image.open(image))
    turned = Image.fromarray(np.rot90(rgb))
    turned.getexif()[0x0112] = 6  # to be shown turned clockwise
    small = rgb[:40, :50]
    many = segmenter([image, Image.open(image), rgb, small, turned], batch_size=2)
    for one in (*many[:3], many[4]):
        np.testing.assert_array_equal(one, index)
    np.testing.assert_array_equal(many[3], segmenter(small))
    assert [one.shape for one in segmenter.probabilities([small, rgb])] == [(CLASSES, 40, 50), (CLASSES, 64, 96)]
    assert segmenter([]) == []
    for wrong, message in ((rgb[..., 0], r"uint8 \[64, 96\]"), (rgb / 255, "float64"), (None, "got NoneType"),
                           ("x.png", "x.png: cannot read")):
        with pytest.raises(UserError, match=message):
            segmenter(wrong)


def test_a_network_is_found_wherever_it_lies(run, image, tmp_path) -> None:
    pytest.importorskip("safetensors")
    best, last = (open_trained(run, Known(weights=which)) for which in ("best", "last"))
    assert (best.file.name, last.file.name) == (f"{STEM}_best_model.pth", f"{STEM}.pth") and best.run == run
    alone = tmp_path / "alone.pth"
    torch.save(best.net.state_dict(), alone)
    save_pretrained(best.net, tmp_path / "left", classes=best.classes, palette=best.palette)
    known = Known(model=NAME, backbone=BACKBONE, dataset="folder", data=str(run.parent / "data"), preprocess="rgb")
    expected = Segmenter.from_pretrained(run, device="cpu")
    for source, said in ((run / f"{STEM}_best_model.pth", None), (alone, known), (tmp_path / "left", None),
                         (tmp_path / "left" / "model.safetensors", None)):
        found = Segmenter.from_pretrained(source, device="cpu", known=said)
        assert found.classes == expected.classes and np.array_equal(found.palette, expected.palette), source
        np.testing.assert_array_equal(found(image), expected(image))
    assert not np.array_equal(Segmenter.from_pretrained(run, known=Known(weights="last"))(image), expected(image))
    with pytest.raises(UserError, match="its config.json says what it is") as refused:
        open_trained(tmp_path / "left", Known(model="psp"))
    assert refused.value.settings == ("model",)


def test_half_precision_changes_little(run, image) -> None:
    full, half = (Segmenter.from_pretrained(run, device="cpu", amp=amp) for amp in ("off", "bf16"))
    assert next(half.net.parameters()).dtype == torch.bfloat16 and half(image).dtype == np.uint8
    assert 0 < np.abs(half.probabilities(image) - full.probabilities(image)).max() < 0.05
    with pytest.raises(UserError, match="amp 'int8': expected one of off, bf16, fp16"):
        Segmenter.from_pretrained(run, amp="int8")


def test_the_weights_own_names_count_more_than_data_that_were_exchanged(run, tmp_path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    beside = copy / f"{STEM}_best_model.pth.json"
    names = [f"name{i}" for i in range(CLASSES)]
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"trained_on": {"classes": names}}))
    trained = open_trained(copy)
    assert trained.classes == tuple(names) and trained.palette is None
    assert open_trained(run).classes == tuple(f"class{i}" for i in range(CLASSES))


def test_names_that_are_not_known_are_numbers(run, caplog) -> None:
    trained = open_trained(run, Known(data=str(run / "moved")))
    assert trained.classes is None and trained.class_names[1] == "class 1" and trained.colors.shape == (CLASSES, 3)
    assert "the names of its classes are not known" in caplog.text and "no class file" in caplog.text


def test_what_cannot_be_opened_is_named(run, tmp_path) -> None:
    bare = tmp_path / "bare.pth"
    torch.save(open_trained(run).net.state_dict(), bare)
    (tmp_path / "empty").mkdir()
    for source, known, message in (
            (tmp_path / "empty", None, "expected the --save-dir of one run"),
            (tmp_path / "no.pth", None, "no such weights file"),
            ("not here", None, "no such folder; expected"),
            (bare, None, "no JSON file beside it says what network"),
            (bare, Known(model=NAME, backbone=BACKBONE, num_class=4), "with 4 classes wants"),
            (run, Known(dataset="camvid"), "a network of 5 classes, but 11 are named")):
        with pytest.raises(UserError, match=message):
            open_trained(source, known)
    with pytest.raises(UserError, match="device 'gpu' cannot be used"):
        Segmenter.from_pretrained(run, device="gpu")
