"""What a person reads: the first lines of a run, its scores, its end, its panels, and that the lines fit."""
from __future__ import annotations

import logging
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import STEM, distil_arguments, train_arguments, write_folder_dataset, write_teacher

import eval as evaluation
import train_kd
from engine import layout
from engine.introduction import unusual
from engine.log import LOG, RunLogger
from engine.run import build_loader
from engine.settings import ineffective_options, parse_settings
from engine.validation import say_scores
from utils.options import flag


@pytest.fixture(scope="module")
def run_with_panels(tmp_path_factory):
    """(text log, pictures, folder) of a run whose method reads nothing but the teacher's c4."""
    folder, pictures = tmp_path_factory.mktemp("output"), []
    data, teacher = write_folder_dataset(folder / "set", train=4, val=2), write_teacher(folder / "teacher.pth")
    argv = train_arguments(data, folder / "run", *distil_arguments(teacher, "--lambda-kd", "0"), "--max-iterations",
                           "2", "--log-dir", str(folder / "run"), "--panels", "1", "--tensorboard", "--workers", "64")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLogger, "picture", lambda self, tag, image, step: pictures.append(image))
        loaders = []
        patch.setattr("engine.run.build_loader", lambda *options: loaders.append(build_loader(*options)) or loaders[-1])
        patch.setattr("engine.run.available_cpus", lambda: 1)
        assert train_kd.main(argv) == 0
    assert loaders[0].num_workers == 1
    (text,) = (folder / "run").glob("*_log.txt")
    return text.read_text(), pictures, folder


def test_the_text_log_begins_with_what_is_unusual_and_has_every_setting(run_with_panels) -> None:
    text, _, _ = run_with_panels
    begin, rest = text.split("every setting:")
    assert "--lambda-fd 1e-05" in begin and "--pool-size 2" in begin and "--seed" not in begin
    assert "method afdcd" in begin and "2 epochs of the 4 training images" in begin
    assert "  seed=0" in rest and "without weights:" in rest and "TFLOP/s" in rest


def test_lines_fit_a_terminal(run_with_panels) -> None:
    text, _, folder = run_with_panels
    stamp = len("2026-01-01 ")
    long = [line for line in text.splitlines() if len(line) - (stamp if line[0] != " " else 0) > layout.TERMINAL
            and str(folder) not in line]
    assert not long, long
    assert layout.break_lines("word " * 40).count("\n") >= 2 and layout.break_lines("    x " * 40).count("\n") == 0
    assert layout.fold(["a" * 60, "b" * 60, "c"]) == "a" * 60 + "\n    " + "b" * 60 + "  c"


def test_the_end_names_the_weights_and_a_command_that_evaluates_them(run_with_panels, capsys) -> None:
    text, _, folder = run_with_panels
    end = text[text.index("done: 2 iterations"):]
    assert f"{STEM}_best_model.pth" in end and f"files in {folder / 'run'}" in end and "best " in end
    words = shlex.split(end[end.index("python eval.py"):].replace("\\\n", ""))
    assert evaluation.main(words[2:]) == 0
    assert "mIoU" in capsys.readouterr().out


def test_the_command_at_the_end_fits_a_set_without_validation_images(tmp_path, capsys) -> None:
    data = write_folder_dataset(tmp_path / "set", train=4, val=1)
    for kind in ("images", "labels"):
        (data / kind / "val").rename(tmp_path / kind)
    argv = train_arguments(data, tmp_path / "run", "--method", "none", "--max-iterations", "1", "--skip-val")
    assert train_kd.main(argv) == 0
    said = capsys.readouterr().out
    words = shlex.split(said[said.index("python eval.py"):].replace("\\\n", ""))
    assert words[words.index("--split") + 1] == "train" and evaluation.main([*words[2:], "--workers", "0"]) == 0
    assert "train: 4 images" in capsys.readouterr().out


def test_panels_show_the_teacher_although_the_method_needs_no_prediction_of_it(run_with_panels) -> None:
    _, (picture,), _ = run_with_panels
    tiles = 4 * 360
    assert picture.dtype == np.uint8 and tiles < picture.shape[1] < tiles + 360


def test_what_differs_from_defaults_and_preset() -> None:
    settings = parse_settings(["--method", "afdcd", "--teacher-pretrained", "t.pth", "--lambda-ctr", "1", "--seed",
                               "3"])
    of_preset, given = unusual(settings)
    assert of_preset == {"lambda_kd": 1, "lambda_fd": 2e-6, "enhance_projector": True, "rand_mask": False}
    assert given == {"lambda_ctr": 1, "seed": 3, "teacher_pretrained": "t.pth"}


@pytest.mark.parametrize(("flags", "unused"), [
    ("--method dist --kd-temperature 4 --ohem-threshold 0.5", ["--kd-temperature", "--ohem-threshold"]),
    ("--method dist --kd-temperature 4 --lambda-kd 1 --ohem --ohem-threshold 0.5", []),
    ("--method dist --kd-temperature 1", []),  # the default
    ("--method none --cwd-norm spatial", ["--cwd-norm"]),
    ("--method none --group-size 8", [])])  # of the cross entropy
def test_options_that_nothing_reads_are_named_and_not_called_unusual(flags, unused) -> None:
    settings = parse_settings([*flags.split(), "--teacher-pretrained", "t.pth"])
    assert ineffective_options(settings) == unused
    given = {flag(name) for name in unusual(settings)[1]}
    assert not given & set(unused) and ("--teacher-pretrained" in given) == ("none" not in flags)


def test_a_run_warns_of_options_that_nothing_reads(tmp_path, capsys) -> None:
    data = write_folder_dataset(tmp_path / "set", train=4, val=1)
    argv = train_arguments(data, tmp_path / "run", "--method", "none", "--max-iterations", "1", "--skip-val")
    assert train_kd.main([*argv, "--kd-temperature", "4"]) == 0
    assert "no effect in this run, which has no term that reads them: --kd-temperature" in capsys.readouterr().out


class TwoImages:
    """A split as far as its scores are said."""
    split = "val"

    def __init__(self, classes: list[str]) -> None:
        self.spec = SimpleNamespace(classes=classes)

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize("count", [3, 40])
def test_classes_without_a_label_are_named(caplog, count) -> None:
    names = [f"class{k}" for k in range(count)]
    dataset = TwoImages(names)
    result = {"mIoU": 0.2, "pixAcc": 0.5, "mAcc": 0.4, "mIoU_present": 0.3,
              "iou_per_class": [0.3] * (count - 1) + [0.0], "label_pixels": [9] * (count - 1) + [0]}
    with caplog.at_level(logging.DEBUG, "afdcd"):
        LOG.propagate = True
        say_scores("validation", dataset, 5, result)
        LOG.propagate = False
    said = {record.levelname: record.getMessage() for record in caplog.records}
    assert "mIoU 20.00" in said["INFO"] and f"class{count - 1} (mIoU of the others 30.00)" in said["INFO"]
    table = said["INFO" if count == 3 else "DEBUG"]
    assert "class0" in table and " 30.0" in table and table.rstrip().endswith("-")
    assert ("DEBUG" in said) == (count > 24)
