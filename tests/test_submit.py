"""tools/submit.py: the zip of each server, from a network and from files; the same bytes again; refused input."""
from __future__ import annotations

import shutil
import sys
import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import assert_refused
from PIL import Image

import eval as evaluation
from dataset import get_dataset_spec
from engine.eval_settings import parse_settings
from models import get_segmentation_model
from models.weights import save_state_dict
from tools import submit
from utils.errors import UserError

NETWORK = ["--model", "deeplab_mobile", "--backbone", "mobilenetv2_w0.25", "--no-cuda", "--workers", "0"]
#: data set -> its test images with their sizes (height, width)
IMAGES = {
    "citys": {f"leftImg8bit/test/{city}/{city}_00000{i}_000019_leftImg8bit.png": (64, 128)
              for city, i in (("mainz", 0), ("berlin", 0), ("berlin", 1))},
    "ade20k": {"images/testing/ADE_test_00000002.jpg": (48, 65), "images/testing/ADE_test_00000001.jpg": (64, 48)}}
NAMES = {"citys": ["berlin_000000_000019_leftImg8bit.png", "berlin_000001_000019_leftImg8bit.png",
                   "mainz_000000_000019_leftImg8bit.png"],
         "ade20k": ["ADE_test_00000001.png", "ADE_test_00000002.png"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Test images of both data sets, and for each random weights and predictions of ``eval.py`` in both forms."""
    folder = tmp_path_factory.mktemp("submit")
    for name, images in IMAGES.items():
        for i, (path, size) in enumerate(images.items()):
            (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
            picture = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
            assert cv2.imwrite(str(folder / name / path), picture)
        spec = get_dataset_spec(name)
        net = get_segmentation_model("deeplab_mobile", "mobilenetv2_w0.25", spec.num_class)
        save_state_dict(net, folder / f"{name}.pth")
        argv = [*NETWORK, "--dataset", name, "--data", str(folder / name), "--pretrained", str(folder / f"{name}.pth"),
                "--split", "test", "--save-ids", "--save-pred", "--save-dir", str(folder / "pictures")]
        assert evaluation.main(argv) == 0
    return folder


def pictures(place: Path, name: str, kind: str) -> Path:
    return place / "pictures" / (place / name).relative_to("/") / f"{name}_test" / kind


def arguments(place: Path, name: str, out: Path, *more: str) -> list[str]:
    return ["--out", str(out), "--dataset", name, "--data", str(place / name), *more]


def read_zip(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {name: np.asarray(Image.open(BytesIO(archive.read(name)))) for name in archive.namelist()}


@pytest.mark.parametrize("name", IMAGES)
def test_the_zip_holds_what_the_server_wants(place, tmp_path, capsys, name) -> None:
    out = tmp_path / "new" / "a.zip"
    assert submit.main(arguments(place, name, out, *NETWORK, "--pretrained", str(place / f"{name}.pth"))) == 0
    found, said = read_zip(out), capsys.readouterr().out
    assert list(found) == NAMES[name]
    sizes = {f"{Path(path).stem}.png": size for path, size in IMAGES[name].items()}
    spec = get_dataset_spec(name)
    for file, values in found.items():
        assert values.dtype == np.uint8 and values.shape == sizes[file]
        trained = np.asarray(Image.open(pictures(place, name, "index") / file))
        np.testing.assert_array_equal(values, {"citys": spec.train_to_id, "ade20k": np.arange(1, 151)}[name][trained])
    assert f"{len(found)} files of {spec.title}, test" in said and "PUBLISHED: " in said
    assert ("cityscapesscripts" in said) == (name == "citys")


@pytest.mark.parametrize("named", ["file", "folder"])
def test_the_network_is_what_the_weights_say_as_in_eval(place, tmp_path, named) -> None:
    """With no word about the network, of a file and of the folder of a run; other values of flags stay behind them."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(place / "citys.pth", run / "kd_net_citys_best_model.pth")
    shutil.copy(place / "citys.pth.json", run / "kd_net_citys_best_model.pth.json")
    (run / "kd_net_citys_config.json").write_text("{}")
    pretrained = str({"file": place / "citys.pth", "folder": run}[named])
    options, settings = submit.parse(arguments(place, "citys", tmp_path / "a.zip", "--scales", "0.5", "1",
                                               "--pretrained", pretrained, "--ignore_label", "-1", "--flip-eval"))
    wanted = parse_settings(["--dataset", "citys", "--data", str(place / "citys"), "--split", "test", "--scales", "0.5",
                             "1", "--pretrained", pretrained, "--flip-eval"])
    assert replace(settings, output=wanted.output) == wanted and wanted.network.model == "deeplab_mobile"
    assert options.out == str(tmp_path / "a.zip") and settings.output.save_ids
    out = tmp_path / "a.zip"
    argv = arguments(place, "citys", out, "--no-cuda", "--workers", "0", "--pretrained", pretrained)
    assert submit.main(argv) == 0 and list(read_zip(out)) == NAMES["citys"]


@pytest.mark.parametrize("name", IMAGES)
def test_files_that_are_there_give_the_same_zip(place, tmp_path, name) -> None:
    made = []
    for kind in ("ids", "index"):
        given = tmp_path / f"{kind}-renamed"  # in another order and with other times
        given.mkdir()
        for file in reversed(NAMES[name]):
            (given / file).write_bytes((pictures(place, name, kind) / file).read_bytes())
        for folder, more in ((pictures(place, name, kind), []), (given, ["--values", kind])):
            out = tmp_path / f"{len(made)}.zip"
            assert submit.main(arguments(place, name, out, "--predictions", str(folder), *more)) == 0
            made.append(out.read_bytes())
    assert len(made) == 4 and len(set(made)) == 1
    with zipfile.ZipFile(BytesIO(made[0])) as archive:
        assert {info.date_time for info in archive.infolist()} == {submit.TIME}


def test_cityscapes_own_evaluation_is_asked(place, monkeypatch) -> None:
    pytest.importorskip("cityscapesscripts")
    spec, images = get_dataset_spec("citys"), list(IMAGES["citys"])
    files = [submit.Expected(f"{Path(image).stem}.png", image) for image in images]
    assert submit.check_officially(files, spec).startswith("cityscapesscripts finds one prediction for each of the 3 ")
    twice = [*files, submit.Expected("berlin_000000_000019_again.png", images[1])]
    with pytest.raises(UserError, match="Found multiple predictions"):
        submit.check_officially(twice, spec)
    other = [files[0], submit.Expected("bonn_000000_000019.png", images[1])]
    with pytest.raises(UserError, match="berlin_000000_000019.*Found no prediction"):
        submit.check_officially(other, spec)
    with pytest.raises(UserError, match="does not evaluate id 1 as class 0"):
        submit.check_officially(files, get_dataset_spec("ade20k"))
    monkeypatch.setitem(sys.modules, "cityscapesscripts.evaluation", None)
    assert "its own check was skipped" in submit.check_officially(files, spec)


def spoiled(place: Path, target: Path, change) -> Path:
    """A copy of the Cityscapes ids with one file changed."""
    folder = target / "ids"
    shutil.copytree(pictures(place, "citys", "ids"), folder)
    change(folder / NAMES["citys"][1])
    return folder


def write(values: np.ndarray):
    return lambda path: Image.fromarray(values).save(path)


BAD = {
    "missing": (Path.unlink, "no prediction (1 of 3 images have none)"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:60]), "truncated"),
    "size": (write(np.full((128, 64), 7, np.uint8)), "128x64 pixels; expected 64x128"),
    "train ids": (write(np.zeros((64, 128), np.uint8)), "value 0 is no class of Cityscapes"),
    "ignored": (write(np.full((64, 128), 255, np.uint8)), "value 255 is no class of Cityscapes"),
    "color": (write(np.zeros((64, 128, 3), np.uint8)), "picture mode RGB"),
}


@pytest.mark.parametrize("name", BAD)
def test_the_first_bad_file_is_named_and_nothing_written(place, tmp_path, capsys, name) -> None:
    change, said = BAD[name]
    folder, out = spoiled(place, tmp_path, change), tmp_path / "out" / "a.zip"
    argv = arguments(place, "citys", out, "--predictions", str(folder))
    assert_refused(capsys, submit.main, argv, NAMES["citys"][1], said)
    assert not list(tmp_path.glob("out/*"))


def test_what_is_refused(place, tmp_path, capsys) -> None:
    def refused(*words: str, dataset: str = "citys", out: str = "a.zip", more: tuple[str, ...] = ()) -> None:
        assert_refused(capsys, submit.main, arguments(place, dataset, tmp_path / out, *more), *words)
        assert not list(tmp_path.glob("*.zip"))

    ids = str(pictures(place, "citys", "ids"))
    refused("--pretrained is missing")
    refused("--dataset camvid", "citys, ade20k", dataset="camvid")
    refused("--out", ".zip", out="a.tar")
    refused("--limit 1", more=("--limit", "1"))
    refused("--values", "--predictions", more=("--values", "ids"))
    refused("submit.py: error: unrecognized arguments: --json", more=("--json", "a.json"))
    refused("backbone mobilenetv2 was asked for", "citys.pth.json says mobilenetv2_w0.25", "--backbone",
            more=("--pretrained", str(place / "citys.pth"), "--backbone", "mobilenetv2"))
    refused("expected a folder called ids or index", more=("--predictions", str(tmp_path)))
    refused("no such folder", more=("--predictions", str(tmp_path / "ids")))
    refused("no split 'holiday'", more=("--predictions", ids, "--split", "holiday"))
    extra = tmp_path / "ids"
    shutil.copytree(ids, extra)
    shutil.copy(extra / NAMES["citys"][0], extra / "berlin_000009_000019.png")
    refused("berlin_000009_000019.png: belongs to no image", "exactly 3 files", more=("--predictions", str(extra)))
