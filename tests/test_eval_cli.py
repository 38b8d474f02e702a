"""``eval.py`` from the outside: figures, files, several processes, and every kind of wrong input."""
from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_here
from PIL import Image
from reference import fill, tiny_data
from torch import nn

import eval as program
from dataset import SegmentationDataset, get_dataset_spec
from engine.eval_settings import build_parser
from engine.pictures import output_names
from engine.predict import predict
from models import get_segmentation_model
from utils.cli import BooleanAction, run_main
from utils.score import SegmentationMetric
from utils.visualize import color_mask

ROOT = Path(__file__).parents[1]
NETWORK = ["--model", "deeplab_mobile", "--backbone", "mobilenetv2_w0.25"]


def network(num_class: int) -> nn.Module:
    net = get_segmentation_model("deeplab_mobile", "mobilenetv2_w0.25", num_class)
    return fill.fill_module(net, 3).eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with CamVid (3 images in val, so that two processes get different numbers), Cityscapes and weights."""
    folder = tmp_path_factory.mktemp("eval")
    for kind, count in (("camvid", 11), ("citys", 19)):
        tiny_data.write(folder / kind, kind)
        torch.save(network(count).state_dict(), folder / f"{kind}.pth")
    for kind in ("val", "valannot"):
        shutil.copy(folder / "camvid" / kind / "b.png", folder / "camvid" / kind / "c.png")
    (folder / "bad.pth").write_bytes(b"this is no checkpoint")
    (folder / "nothing").mkdir()
    return folder


def arguments(place: Path, *more: str, dataset: str = "camvid") -> list[str]:
    return [*NETWORK, "--dataset", dataset, "--data", str(place / dataset), "--pretrained",
            str(place / f"{dataset}.pth"), "--no-cuda", "--workers", "0", *more]


def direct(place: Path, **options) -> dict:
    """The figures computed without the program."""
    spec = get_dataset_spec("camvid")
    metric, net = SegmentationMetric(spec.num_class, reference_pixacc=True), network(spec.num_class)
    data = SegmentationDataset(spec, place / "camvid", "val", train=False)
    with torch.no_grad():
        for i in range(len(data)):
            logits = predict(net, data[i]["image"][None], data[i]["valid"][None], **options)
            metric.update(logits, data[i]["label"][None])
    return metric.result()


@pytest.mark.parametrize(("flags", "options"), [
    ([], {}),
    (["--scales", "0.5", "1", "1.5", "--flip_eval"], {"scales": (0.5, 1.0, 1.5), "flip": True}),
    (["--window", "40", "40", "--stride", "24", "32"], {"window": (40, 40), "stride": (24, 32)}),
    (["--window", "60", "80"], {}),
    (["--scales", "1", "1.0"], {}),
    (["--batch-size", "2"], {}),
    (["--no-fast", "--flip-eval"], {"flip": True}),
])
def test_json_equals_a_direct_computation(place: Path, tmp_path: Path, flags: list[str], options: dict) -> None:
    target = tmp_path / "new" / "r.json"
    assert run_main(program.main, arguments(place, "--json", str(target), "--reference-metric", *flags)) == 0
    got, expected = json.loads(target.read_text()), direct(place, **options)
    classes = list(get_dataset_spec("camvid").classes)
    assert got["amp"] == "off"
    for key in ("mIoU", "pixAcc", "mAcc", "mIoU_present", "pixAcc_reference", "labelled_pixels", "total_inter"):
        assert got[key] == expected[key], key
    assert 0 < got["mIoU"] < got["pixAcc"] < 1
    assert got["iou_per_class"] == dict(zip(classes, expected["iou_per_class"], strict=True))
    assert got["classes"] == classes and got["images"] == 3 and got["split"] == "val"
    assert got["pretrained"] == "camvid.pth"
    assert got["pretrained_sha256"] == hashlib.sha256((place / "camvid.pth").read_bytes()).hexdigest()
    assert [p.name for p in tmp_path.rglob("*")] == ["new", "r.json"]


def test_without_labels_there_are_no_figures(place: Path, tmp_path: Path, capsys) -> None:
    data = shutil.copytree(place / "camvid", tmp_path / "camvid")
    for path in (data / "valannot").glob("*.png"):
        with Image.open(path) as label:
            Image.new(label.mode, label.size, 11).save(path)  # void
    assert run_main(program.main, arguments(place, "--data", str(data), "--json", str(tmp_path / "r.json"))) == 0
    got = json.loads((tmp_path / "r.json").read_text())
    assert got["labelled_pixels"] == 0 and got["images"] == 3
    assert all(got[key] is None for key in ("mIoU", "pixAcc", "mAcc", "mIoU_present", "iou_per_class", "acc_per_class"))
    assert "no labels, hence no figures" in capsys.readouterr().out


def test_weights_that_are_no_file_here_have_no_hash(place: Path, tmp_path: Path, monkeypatch) -> None:
    """Those that torchvision knows by name."""
    build = program.build

    def with_the_file(settings, distributed):
        named = replace(settings.network, pretrained=str(place / "camvid.pth"))
        return build(replace(settings, network=named), distributed)

    monkeypatch.setattr(program, "build", with_the_file)
    name = "torchvision:ResNet18_Weights.IMAGENET1K_V1"
    assert run_main(program.main, arguments(place, "--pretrained", name, "--json", str(tmp_path / "r.json"))) == 0
    got = json.loads((tmp_path / "r.json").read_text())
    assert (got["pretrained"], got["pretrained_sha256"]) == (name, None) and got["mIoU"] > 0


def test_table_shows_percent(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(program.main, arguments(place, "--reference_metric", "--save-dir", str(tmp_path))) == 0
    captured, expected = capsys.readouterr(), direct(place)
    shown = {line.rsplit(maxsplit=1)[0]: float(line.split()[-1]) for line in captured.out.splitlines()[1:]
             if line and line[-1].isdigit()}
    for text, key in (("mIoU, all 11 classes", "mIoU"), ("pixAcc", "pixAcc"), ("mAcc", "mAcc"),
                      ("pixAcc of the reference", "pixAcc_reference")):
        assert shown[text] == pytest.approx(100 * expected[key], abs=0.006)
    road = next(line.split() for line in captured.out.splitlines() if line.startswith("road "))
    assert float(road[1]) == pytest.approx(100 * expected["iou_per_class"][3], abs=0.006)
    assert captured.err == ""
    assert list(tmp_path.iterdir()) == [], "nothing is written unless asked for"


def launched(processes: int, argv: list[str], folder: Path) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run([sys.executable, *(launcher if processes else []), str(ROOT / "eval.py"), *argv], cwd=folder,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)


def test_two_processes_equal_one(place: Path, tmp_path: Path) -> None:
    flags = ["--flip-eval", "--batch-size", "2", "--save-pred", "--save-dir"]
    alone = arguments(place, "--json", str(tmp_path / "one.json"), *flags, str(tmp_path / "p1"))
    both = arguments(place, "--json", str(tmp_path / "two.json"), *flags, str(tmp_path / "p2"))
    assert run_main(program.main, alone) == 0
    run = launched(2, both, tmp_path)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "one.json").read_text() == (tmp_path / "two.json").read_text()
    assert run.stdout.count("mIoU, all 11 classes") == 1
    one, two = ({p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*.png")}
                for name in ("p1", "p2"))
    assert one == two and len(one) == 6


def test_an_error_that_one_of_two_processes_finds_is_told(place: Path, tmp_path: Path) -> None:
    data = tmp_path / "camvid"
    shutil.copytree(place / "camvid", data)
    (data / "val" / "b.png").write_bytes((data / "val" / "b.png").read_bytes()[:200])  # the first of process 1
    run = launched(2, arguments(place, "--data", str(data), "--json", str(tmp_path / "r.json")), tmp_path)
    assert run.returncode != 0 and not (tmp_path / "r.json").exists()
    told = [line for line in run.stderr.splitlines() if line.startswith("eval.py: error: ")]
    own = [line for line in told if "another process failed" not in line]
    assert len(own) == 1 and "b.png" in own[0] and len(told) <= 2, run.stderr


def test_pictures(place: Path, tmp_path: Path) -> None:
    argv = arguments(place, "--save-pred", "--blend", "--save_ids", "--save_dir", str(tmp_path), "--limit", "2")
    assert run_main(program.main, argv) == 0
    folder = tmp_path / (place / "camvid").relative_to("/") / "camvid_val"
    names = {str(p.relative_to(folder)) for p in tmp_path.rglob("*.png")}
    assert names == {f"{kind}/{key}.png" for kind in ("colour", "index", "ids", "overlay") for key in "ab"}
    with torch.no_grad():
        data = SegmentationDataset(get_dataset_spec("camvid"), place / "camvid", "val", train=False)
        expected = predict(network(11), data[1]["image"][None]).argmax(1)[0].numpy()
    for kind in ("colour", "index", "ids"):        # CamVid's own label values are the train ids
        np.testing.assert_array_equal(np.asarray(Image.open(folder / kind / "b.png")), expected)
    colours = np.asarray(Image.open(folder / "colour" / "b.png").convert("RGB"))
    np.testing.assert_array_equal(colours, color_mask(expected, data.spec.palette))
    mixed = np.asarray(Image.open(folder / "overlay" / "b.png")).astype(float)
    image = data[1]["image"].permute(1, 2, 0).numpy()[..., ::-1]
    assert np.abs(mixed - (image / 2 + colours / 2)).max() <= 1


def test_pictures_of_two_runs_are_kept_apart(place: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/plain/net.pth", "runs/student/net.pth", "files/net.pth"):
        Path(name).parent.mkdir(parents=True)
        shutil.copy(place / "camvid.pth", name)
        assert run_main(program.main, arguments(place, "--save-pred", "--limit", "1", "--pretrained", name)) == 0
        folder = f"runs/{name.removeprefix('runs/').removesuffix('.pth')}/camvid_val"
        assert capsys.readouterr().out.endswith(f"\npictures: {folder}\n") and Path(folder, "colour/a.png").is_file()


def test_cityscapes_ids_and_names_are_those_of_a_submission(place: Path, tmp_path: Path) -> None:
    argv = arguments(place, "--save-ids", "--save-pred", "--save-dir", str(tmp_path), "--json",
                     str(tmp_path / "r.json"), dataset="citys")
    assert run_main(program.main, argv) == 0
    folder = tmp_path / (place / "citys").relative_to("/") / "citys_val"
    name = "town_00000a_000019_leftImg8bit.png"
    ids, trained = (np.asarray(Image.open(folder / kind / name)) for kind in ("ids", "index"))
    spec = get_dataset_spec("citys")
    np.testing.assert_array_equal(spec.id_to_train[ids], trained)
    assert set(np.unique(ids)) <= {7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33}
    assert json.loads((tmp_path / "r.json").read_text())["iou_per_class"].keys() == set(spec.classes)


def test_the_figures_of_the_reference_are_there_on_request_only(place: Path, tmp_path: Path) -> None:
    for name, flags in (("a", []), ("b", ["--reference-metric"])):
        assert run_main(program.main, arguments(place, "--json", str(tmp_path / name), *flags)) == 0
    without, with_it = (json.loads((tmp_path / name).read_text()) for name in "ab")
    assert with_it.pop("pixAcc_reference") == direct(place)["pixAcc_reference"]
    assert with_it == without


def test_half_precision_is_written_down(place: Path, tmp_path: Path) -> None:
    assert run_main(program.main, arguments(place, "--amp", "bf16", "--json", str(tmp_path / "r.json"))) == 0
    got = json.loads((tmp_path / "r.json").read_text())
    assert got["amp"] == "bf16" and got["pixAcc"] == pytest.approx(direct(place)["pixAcc"], abs=0.05)


def test_another_ignore_label_gives_the_same_figures(place: Path, tmp_path: Path) -> None:
    for name, flags in (("a", []), ("b", ["--ignore-label", "255"])):
        assert run_main(program.main, arguments(place, "--json", str(tmp_path / name), *flags)) == 0
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()


def test_images_that_share_a_name_do_not_overwrite_each_other() -> None:
    assert output_names(["/d/x/a.png", "/d/x/b.jpg"]) == ["a.png", "b.png"]
    assert output_names(["/d/x/a.png", "/d/y/a.jpg"]) == ["x_a.png", "y_a.png"]


@pytest.mark.parametrize("option", [a.option_strings[0] for a in build_parser()._actions
                                    if a.option_strings[0].startswith("--")])
def test_reference_flags_exist_in_both_spellings(option: str) -> None:
    parser = build_parser()
    action = parser._option_string_actions[option]
    choice = {"preprocess": ["bgr"], "amp": ["bf16"]}
    value = choice.get(action.dest, ["2"] * (action.nargs if isinstance(action.nargs, int) else 1))
    values = [] if isinstance(action, BooleanAction) else value
    dashed = parser.parse_args([option, *values])
    assert dashed == parser.parse_args(["--" + option[2:].replace("-", "_"), *values])


def test_reference_defaults() -> None:
    got = vars(build_parser().parse_args([]))
    expected = {
        "model": "deeplabv3", "backbone": "resnet18", "dataset": "citys", "data": "./dataset/cityscapes/",
        "crop_size": [1024, 2048], "workers": 8, "aux": False, "blend": False, "gpu_id": "0", "no_cuda": False,
        "local_rank": 0, "save_dir": Path("runs"), "save_pred": False, "ignore_label": -1, "scales": [1.0],
        "flip_eval": False,
    }
    assert {key: got[key] for key in expected} == expected
    assert got["pretrained"] is None and got["data_list"] is None


#: flags after good ones, and what the message must say; {place} is the folder of the fixture
WRONG = {
    "no weights": (["--pretrained", "None"], "--pretrained is missing: expected the weights"),
    "missing weights": (["--pretrained", "{place}/x.pth"], "x.pth"),
    "unreadable weights": (["--pretrained", "{place}/bad.pth"], "bad.pth"),
    "weights of other classes": (["--pretrained", "{place}/citys.pth"], "citys.pth"),
    "weights of another network": (["--model", "psp_mobile"], "camvid.pth"),
    "unknown model": (["--model", "deeplabv4"], "unknown model 'deeplabv4'"),
    "unknown backbone": (["--backbone", "vgg"], "vgg"),
    "unknown data set": (["--dataset", "kitti"], "unknown data set 'kitti'"),
    "missing data": (["--data", "{place}/x"], "folder not found"),
    "empty data": (["--data", "{place}/nothing"], "folder not found"),
    "data without the default split": (["--data", "{place}/nothing"], "(--split: another split)"),
    "unknown split": (["--split", "holiday"], "no split 'holiday'"),
    "missing list": (["--data-list", "{place}/x.lst"], "x.lst"),
    "ignore label is a class": (["--ignore-label", "3"], "ignore label 3"),
    "scale of zero": (["--scales", "0"], "--scales: expected a number above 0"),
    "scale too small": (["--scales", "0.001"], "--scales: 0.001 leaves nothing"),
    "stride alone": (["--stride", "8", "8"], "--stride: expected together with --window"),
    "stride above window": (["--window", "8", "8", "--stride", "9", "8"], "--stride"),
    "window of one number": (["--window", "8"], "--window: expected 2 arguments"),
    "no images": (["--limit", "0"], "--limit: expected a whole number of at least 1"),
    "gpu": (["--gpu-id", "first"], "--gpu-id: expected the number of a GPU"),
    "json is a folder": (["--json", "{place}"], "--json"),
    "json below a file": (["--json", "{place}/bad.pth/r.json"], "--json"),
    "save-dir is a file": (["--save-pred", "--save-dir", "{place}/bad.pth"], "--save-dir"),
    "half precision of another kind": (["--amp", "int8"], "--amp"),
    "batch of none": (["--batch-size", "0"], "--batch-size: expected a whole number of at least 1"),
    "channels last of no copy": (["--no-fast", "--channels-last"], "--channels-last: expected with --fast"),
    "unknown flag": (["--flip"], "unrecognized arguments: --flip"),
    "misspelt flag": (["--save-perd"], "did you mean --save-pred?"),
    "bad boolean": (["--blend", "perhaps"], "--blend"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(place: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags, said = WRONG[name]
    flags = [flag.format(place=place) for flag in flags]
    good = arguments(place, "--json", str(tmp_path / "r.json"), "--save-dir", str(tmp_path / "pictures"))
    done = run_here(capsys, program.main, *good, *flags, prog="eval.py")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("eval.py: error: "), done.stderr
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_broken_files_found_by_a_loading_process_are_one_line(place: Path, tmp_path: Path) -> None:
    data = tmp_path / "camvid"
    shutil.copytree(place / "camvid", data)
    (data / "val" / "b.png").write_bytes((data / "val" / "b.png").read_bytes()[:200])
    run = launched(0, arguments(place, "--data", str(data), "--workers", "1", "--json", str(tmp_path / "r.json")),
                   tmp_path)
    assert run.returncode == 2, run.stderr
    assert run.stderr.count("\n") == 1 and run.stderr.startswith("eval.py: error: "), run.stderr
    assert "b.png" in run.stderr
    assert not (tmp_path / "r.json").exists()
