"""tools/cache_teacher.py and runs with --teacher-scores: equal to the teacher, or refused."""
from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import cv2
import pytest
import torch
from helpers import CLASSES, ROOT, STEM, TEACHER, assert_refused, assert_same, records, run_here, train_arguments
from method_cases import Case

import train_kd
from dataset.scores import Scores
from engine.build import build_run
from engine.checkpoint import resume, save_state
from engine.log import LOG
from engine.results import differences
from engine.run_files import plain
from engine.settings import parse_settings
from losses.core import methods
from models import get_segmentation_model, save_state_dict
from models.output import CLASS_TAPS
from tools import cache_teacher, diagnose, replay
from utils.distributed import Distributed

PAGE = (ROOT / "docs/unlabelled.md").read_text(encoding="utf-8")
DIST = ("--method", "dist")
WHOLE = ("--no-random-scale", "--crop-size", "136", "144")  # of images of 128x128: padded


@pytest.fixture(scope="module")
def material(few_images, tmp_path_factory) -> tuple[Path, Path]:
    """(data set of four images, teacher whose scores differ from place to place as those of a trained one)."""
    torch.manual_seed(0)
    net = get_segmentation_model(model="deeplab_mobile", backbone=TEACHER, num_class=CLASSES)
    with torch.no_grad():
        [layer for layer in net.head.modules() if isinstance(layer, torch.nn.Conv2d)][-1].weight.mul_(50)
    path = tmp_path_factory.mktemp("stored") / "teacher.pth"
    save_state_dict(net, path)
    return few_images, path


def arguments(material: tuple[Path, Path], save: Path, *more: str) -> list[str]:
    return train_arguments(
        material[0], save, "--teacher-model", "deeplab_mobile", "--teacher-backbone", TEACHER, "--teacher-pretrained",
        str(material[1]), "--max-iterations", "2", "--batch-size", "2", "--skip-val", "--sampling", "epoch",
        *(() if "--method" in more else DIST), *WHOLE, "--unlabelled", str(material[0] / "images/val"), *more)


def scored(folder: Path) -> tuple[str, str]:
    return "--teacher-scores", str(folder)


@pytest.fixture(scope="module")
def stored(material, tmp_path_factory) -> dict[str, Path]:
    """{dtype: folder that the tool has filled}."""
    base = tmp_path_factory.mktemp("scores")
    flags = re.search(r'^flags="(.*?)"$', PAGE.replace("\\\n", ""), re.MULTILINE)[1].split()
    for dtype in ("float16", "float32"):
        names = dict(zip(("mydata", "teacher.pth", "scores"), map(str, (*material, base / dtype)), strict=True))
        documented = [names.get(word, word) for word in flags]
        assert {"--teacher-scores", *names.values()} < set(documented)
        assert cache_teacher.main([*documented, *arguments(material, base), "--dtype", dtype]) == 0
    return {dtype: base / dtype for dtype in ("float16", "float32")}


def test_runs_equal_those_with_the_teacher(material, stored, tmp_path) -> None:
    """Exactly with float32; images are mirrored and padded, and some have no labels."""
    assert train_kd.main(arguments(material, tmp_path / "live")) == 0
    state = torch.load(tmp_path / f"live/{STEM}_state.pth", weights_only=True)
    for dtype, folder in stored.items():
        steps = "1" if dtype == "float16" else "2"
        assert train_kd.main(arguments(material, tmp_path / dtype, *scored(folder), "--max-iterations", steps)) == 0
        found = torch.load(tmp_path / dtype / f"{STEM}_state.pth", weights_only=True)
        logged = [[r["raw"] for r in records(tmp_path / name)] for name in ("live", dtype)]
        if dtype == "float32":
            assert_same(found["model"], state["model"])
            assert logged[0] == logged[1]
        else:
            assert logged[0][0] != logged[1][0] == pytest.approx(logged[0][0], rel=1e-3)


def test_a_run_says_how_its_scores_are_stored(material, stored, tmp_path, monkeypatch) -> None:
    """And a resumed one that they are others, even of the same passes."""
    about = json.loads((stored["float32"] / "train.json").read_text())
    whole = Scores(stored["float32"], "train", about)
    top = Scores(tmp_path, "train", {**about, "dtype": "float16", "top_k": 1})
    (tmp_path / "train.json").write_text(json.dumps(top.about))
    top.reserve()
    top.write(range(top.count), torch.stack([whole.read(i, bool(m)) for i in range(top.count // 2) for m in (0, 1)]))
    said: dict[str, list[str]] = {"info": [], "warning": []}
    for level, lines in said.items():
        monkeypatch.setattr(LOG, level, lambda text, *values, lines=lines: lines.append(text % values))
    (tmp_path / "run").mkdir()
    runs = []
    for folder, more in ((stored["float32"], ()), (tmp_path, ("--resume", "auto"))):
        argv = arguments(material, tmp_path / "run", *scored(folder), *more)
        first = argv.index("--unlabelled")
        settings = parse_settings([*argv[:first], *argv[first + 2:]])
        runs.append(build_run(settings, Distributed(0, 1, 0, torch.device("cpu"))))
        assert f"scores of the teacher from {folder}: {runs[-1].settings.networks.stored_scores}" in said["info"]
        assert not differences(plain(runs[-1].settings), plain(settings))  # which has not looked into the folder
        if not more:
            save_state(runs[0])
    assert resume(runs[1])
    assert [line.split(" (")[0] for line in said["warning"]] == [
        "--top-k 1 of stored scores: these classes have the teacher's probabilities at temperature 1, and nothing else "
        "is the teacher's", "--resume: stored_scores: float32 -> float16, top 1"]
    assert differences(*(plain(run.settings) for run in runs))[0] == "stored_scores: float32 -> float16, top 1"


def test_tools_read_the_stored_scores(material, stored, tmp_path, capsys) -> None:
    """tools/replay.py those of the batch, tools/diagnose.py those that have moved."""
    gone, moved = (Path(shutil.copytree(stored["float16"], tmp_path / name)) for name in ("gone", "moved"))
    argv = arguments(material, tmp_path / "run", *scored(gone), "--save-per-iters", "1", "--lr", "1e30")
    assert run_here(capsys, train_kd.main, *argv).returncode == 2
    shutil.rmtree(gone)
    assert_refused(capsys, diagnose.main, [str(tmp_path / "run"), "--batches", "1"], "gone/train.json: not found")
    found = run_here(capsys, diagnose.main, tmp_path / "run", "--batches", "1", "--teacher-scores", moved)
    assert found.returncode == 0 and "| dist |" in found.stdout

    path = tmp_path / f"run/{STEM}_replay.pth"
    content = torch.load(path, weights_only=True)
    content["batch"]["scores"].fill_(torch.nan)
    torch.save(content, path)
    found = run_here(capsys, replay.main, path)
    assert found.returncode == 0 and "output that is not finite: teacher (StoredTeacher)" in found.stdout
    torch.save({**content, "stored": None}, path)  # of an earlier version
    assert "the teacher itself is asked" in run_here(capsys, replay.main, path).stdout


def test_a_call_that_was_interrupted_goes_on(material, stored, tmp_path, capsys) -> None:
    folder = Path(shutil.copytree(stored["float16"], tmp_path / "scores"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {path for path in before} == {f"{name}.{kind}" for name in ("train", "unlabelled")
                                         for kind in ("json", "scores", "sums")}
    sums = bytearray(before["train.sums"])
    sums[8:24] = bytes(16)  # two records that were not written
    (folder / "train.sums").write_bytes(sums)
    changed = bytearray(before["unlabelled.scores"])
    changed[len(changed) // 2 + 9] ^= 4
    (folder / "unlabelled.scores").write_bytes(changed)
    assert_refused(capsys, train_kd.main, arguments(material, tmp_path, *scored(folder)),
                   "train.scores: 6 of 8 scores are there")
    done = run_here(capsys, cache_teacher.main, *arguments(material, tmp_path, *scored(folder)))
    assert "(2 of 8 computed now)" in done.stdout and "(1 of 4 computed now)" in done.stdout
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_damage_ends_a_run_in_one_line(material, stored, tmp_path, capsys) -> None:
    folder = Path(shutil.copytree(stored["float16"], tmp_path / "scores"))
    (folder / "train.scores").write_bytes(bytes((folder / "train.scores").stat().st_size))
    assert_refused(capsys, train_kd.main, arguments(material, tmp_path, *scored(folder)), "are damaged",
                   "(--teacher-scores)")


@pytest.mark.parametrize(("more", "expected"), [
    (("--method", "afdcd"), "method 'afdcd' reads c4 of the teacher, and only its scores"),
    (("--lambda-at", "1"), "method 'at' reads head of the teacher"),
    (("--random-scale",), "expected --no-random-scale, and --crop-size of the largest image"),
    (("--crop-size", "144"), "scores of crops of 136x144, not 144x144"),
    (("--method", "none", "--lambda-dist", "0"), "needs labels"),
])
def test_runs_whose_teacher_cannot_be_replaced(material, stored, tmp_path, capsys, more, expected) -> None:
    assert_refused(capsys, train_kd.main, arguments(material, tmp_path, *scored(stored["float16"]), *more), expected)


def test_the_page_names_the_methods_that_read_scores_alone() -> None:
    named = re.search(r"No method of the run reads features.*?:(.*?) do not;", PAGE, re.DOTALL)[1]
    alone = {name for name in methods() if set(Case(name, (512, 512)).needs.teacher) <= set(CLASS_TAPS)}
    assert set(re.findall(r"`(\w+)`", named)) == alone - {"lad"}  # which reads a teacher of its own


def test_another_teacher_and_other_images(material, stored, tmp_path, capsys) -> None:
    weights = torch.load(material[1], weights_only=True)
    next(iter(weights.values())).mul_(1.001)
    torch.save(weights, tmp_path / "other.pth")
    shutil.copy(f"{material[1]}.json", tmp_path / "other.pth.json")
    assert_refused(capsys, train_kd.main, arguments((material[0], tmp_path / "other.pth"), tmp_path,
                                                    *scored(stored["float16"])), "scores of another teacher")
    data = Path(shutil.copytree(material[0], tmp_path / "set"))
    image = cv2.imread(str(data / "images/train/0.png"))
    image[0, 0, 0] ^= 1
    cv2.imwrite(str(data / "images/train/0.png"), image)
    for program in (train_kd.main, cache_teacher.main):
        assert_refused(capsys, program, arguments((data, material[1]), tmp_path, *scored(stored["float16"])),
                       "scores of other data: train: other pixels")


def test_what_the_tool_refuses(material, tmp_path, capsys) -> None:
    folder = scored(tmp_path / "scores")
    for more, expected in (((), "--teacher-scores is missing"),
                           ((*folder, "--crop-size", "100", "144"), "128x128 pixels, more than the crop of 100x144"),
                           ((*folder, "--method", "pkd"), "method 'pkd' reads head of the teacher"),
                           ((*folder, "--random-scale"), "--no-random-scale"),
                           ((*folder, "--dtype", "int8"), "float16"),
                           ((*folder, "--lrr", "1"), "did you mean --lr?")):
        assert_refused(capsys, cache_teacher.main, arguments(material, tmp_path, *more), expected)
    data, grown = Path(shutil.copytree(material[0], tmp_path / "set")), {"train/3": (140, 130), "val/0": (128, 150)}
    for name, (height, width) in grown.items():
        for path in data.glob(f"*/{name}.png"):
            cv2.imwrite(str(path), cv2.resize(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), (width, height),
                                              interpolation=cv2.INTER_NEAREST))
    for crop, expected in (("144", "images/val/0.png: 128x150 pixels"), ("136", "images/train/3.png: 140x130 pixels")):
        assert_refused(capsys, cache_teacher.main, arguments((data, material[1]), tmp_path, *folder, "--crop-size",
                                                             crop), expected, f"the crop of {crop}x{crop}")
    assert not (tmp_path / "scores").exists()
