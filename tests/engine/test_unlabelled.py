"""Runs with images without labels: killed and resumed, with another folder, and those that make no sense."""
from __future__ import annotations

import re
import shutil
from pathlib import Path

import cv2
import pytest
import torch
from helpers import (
    ROOT,
    STEM,
    TEACHER,
    assert_refused,
    assert_same,
    records,
    run_here,
    train_arguments,
    without_times,
    write_teacher,
)

import train_kd
from engine.build import build_run
from engine.checkpoint import resume
from engine.log import LOG
from engine.run import build_loader
from engine.settings import parse_settings
from tools import replay
from tools.cache_data import main as cache_data
from tools.check_data import main as check_data
from utils.distributed import Distributed

ONE = Distributed(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def material(few_images, tmp_path_factory) -> tuple[Path, Path, Path]:
    """(data set of four images, folder with three without labels, teacher)."""
    base = tmp_path_factory.mktemp("unlabelled")
    (base / "more/deeper").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.jpg", "deeper/c.png")):
        cv2.imwrite(str(base / "more" / name), cv2.imread(str(few_images / f"images/train/{i}.png"))[:100 + 7 * i])
    return few_images, base / "more", write_teacher(base / "teacher.pth")


def arguments(material: tuple[Path, Path, Path], save: Path, *more: str) -> list[str]:
    """The command of docs/unlabelled.md for small networks and a few steps."""
    page = (ROOT / "docs/unlabelled.md").read_text(encoding="utf-8").replace("\\\n", "")
    words = re.search(r"^python train_kd.py (.*--unlabelled .*)$", page, re.MULTILINE)[1].split()
    if "--method" in more:
        del words[(at := words.index("--method")):at + 2]
    names = dict(zip(("mydata", "more_images", "teacher.pth"), map(str, material), strict=True))
    return [*(names.get(word, word) for word in words), *train_arguments(
        material[0], save, "--teacher-model", "deeplab_mobile", "--teacher-backbone", TEACHER, "--max-iterations", "4",
        "--save-per-iters", "2", "--skip-val", *more)]


def without_them(argv: list[str]) -> list[str]:
    """The same command line without --unlabelled."""
    flags = {"--unlabelled", "--unlabelled-share"}
    return [word for word, before in zip(argv, ["", *argv[:-1]], strict=True) if not flags & {word, before}]


def test_a_resumed_run_is_the_whole_run(material, tmp_path, monkeypatch, capsys) -> None:
    """Also from copies of both folders; what has changed in the one without labels is said."""
    whole, save, more = tmp_path / "whole", train_kd.save_run, ("--unlabelled-share", "0.34")

    def also_for_later(run) -> None:
        save(run)
        if run.step == 2:  # what a run that dies here leaves behind
            shutil.copytree(whole, tmp_path / "resumed")

    with monkeypatch.context() as patch:
        patch.setattr(train_kd, "save_run", also_for_later)
        assert train_kd.main(arguments(material, whole, *more)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "2 images without labels join every batch:" in said and "2.67 epochs of the 3 in" in said
    assert "which kd read and task leave out" in said

    copied = tuple(Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in material[:2])
    moved = (*copied, material[2])
    assert train_kd.main(arguments(moved, tmp_path / "resumed", *more, "--resume", "auto")) == 0
    assert "--resume:" not in capsys.readouterr().out
    for suffix in ("", "_state"):
        one, two = (torch.load(folder / f"{STEM}{suffix}.pth", weights_only=True)
                    for folder in (whole, tmp_path / "resumed"))
        assert_same({**one, "config": 0}, {**two, "config": 0}, suffix)
    assert without_times(records(whole)) == without_times(records(tmp_path / "resumed"))

    warned: list[str] = []
    monkeypatch.setattr(LOG, "warning", lambda text, *values: warned.append(text % values))
    (copied[1] / "b.jpg").unlink()
    for argv in (arguments(moved, whole, *more), without_them(arguments(moved, whole))):
        assert resume(build_run(parse_settings([*argv, "--resume", "auto"]), ONE))
    assert [line.split(" (")[0] for line in warned] == [
        "--resume: other data: unlabelled: 3 -> 2 images", f"--resume: unlabelled: {material[1]} -> None",
        "--resume: unlabelled_share: 0.34 -> 0.5"]


def test_a_step_that_breaks_names_its_images_and_can_be_replayed(material, tmp_path, capsys) -> None:
    """In parts, on images of either kind."""
    argv = arguments(material, tmp_path, "--lr", "1e30", "--grad-accumulation", "2", "--unlabelled-share", "0.5")
    assert run_here(capsys, train_kd.main, *argv).returncode == 2
    content = torch.load(tmp_path / f"{STEM}_replay.pth", weights_only=True)
    assert content["unlabelled"] == 4 and len(content["batch"]["name"]) == 8
    assert [index >= 4 for index in content["batch"]["index"]] == [False, False, True, True] * 2
    assert replay.main([str(tmp_path / f"{STEM}_replay.pth")]) == 0
    out = capsys.readouterr().out
    assert "part 2 of 2" in out and re.findall(r"^\| (\w+) +\| +nan \|", out, re.MULTILINE) == ["task", "kd"] * 2


def test_the_labeled_images_of_a_batch_stay_what_they_are(material, tmp_path) -> None:
    """In order and augmentation; those without labels are behind them, as many as the objective thinks."""
    found = []
    for more in ((), ("--unlabelled-share", "0.7")):
        argv = arguments(material, tmp_path, *more) if more else without_them(arguments(material, tmp_path))
        run = build_run(parse_settings(argv), ONE)
        found.append(list(build_loader(run, 0, 4, 4)))
    assert run.objective.images_without_labels == 9
    for alone, batch in zip(*found, strict=True):
        assert batch["name"][:4] == alone["name"] and len(batch["name"]) == 13
        for key in ("image", "label", "valid", "index"):
            assert torch.equal(batch[key][:4], alone[key])
        assert (batch["label"][4:] == -1).all() and (batch["index"][4:] >= 4).all()


@pytest.mark.parametrize(("more", "expected"), [
    (("--method", "none"), "every term of this run (task) needs labels"),
    (("--method", "dkd"), "every term of this run (task, dkd) needs labels"),
    (("--method", "lad", "--aux"), "every term of this run (task, aux, lad) needs labels"),
    (("--method", "bpkd"), "(task, bpkd_edge, bpkd_body)"),
    (("--method", "kt", "--lambda-kd", "0", "--lambda-kt-feature", "0", "--lambda-kt-contrast", "0"),  # no kt_aux here
     "every term of this run (task, kt_logit) needs labels"),
    (("--batch-size", "1"), "--batch-size 1 leaves one labeled image per batch norm"),
    (("--unlabelled-share", "0.1"), "--unlabelled-share 0.1: less than one image beside the 4"),
    (("--unlabelled-share", "0.45", "--grad-accumulation", "2"),
     "puts 3 images without labels beside the 4 of --batch-size: expected a multiple of 4 ("
     "--grad-accumulation 2), such as 4: --unlabelled-share 0.5"),
])
def test_what_makes_no_sense_is_refused(material, tmp_path, capsys, more, expected) -> None:
    assert_refused(capsys, train_kd.main, arguments(material, tmp_path, *more), expected)


def test_files_that_are_not_there_or_damaged(material, tmp_path, capsys) -> None:
    assert_refused(capsys, train_kd.main, train_arguments(material[0], tmp_path, "--unlabelled-share", "0.3",
                                                          "--teacher-pretrained", "x"), "without --unlabelled")
    (tmp_path / "none").mkdir()
    assert_refused(capsys, train_kd.main, arguments((material[0], tmp_path / "none", material[2]), tmp_path / "run"),
                   "no images (*.png", "(--unlabelled)")
    damaged = Path(shutil.copytree(material[1], tmp_path / "damaged"))
    assert run_here(capsys, check_data, "--dataset", "folder", "--data", material[0], "--unlabelled",
                    damaged).stdout.splitlines()[3] == "unlabelled: 3 images, no labels; 3 decoded"
    assert "unlabelled: 3 images are in" in run_here(
        capsys, cache_data, "--dataset", "folder", "--data", material[0], "--cache", tmp_path / "cache", "--unlabelled",
        damaged).stdout
    for name in ("a.png", "b.jpg", "deeper/c.png"):
        (damaged / name).write_bytes(b"no picture")
    with_damage = material[0], damaged, material[2]
    assert_refused(capsys, train_kd.main, arguments(with_damage, tmp_path / "run"), "cannot decode this image")
    assert_refused(capsys, check_data, ["--dataset", "folder", "--data", str(material[0]), "--unlabelled",
                                        str(damaged)], "3 errors, the first", "a.png: cannot decode")
    assert not list(tmp_path.glob("run/*.pth"))
