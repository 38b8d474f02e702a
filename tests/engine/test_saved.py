"""``--config``: a run repeats from the file that it has left, and flags override what stands there."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import assert_refused

import train_kd
from engine.presets import preset
from engine.run_files import plain
from engine.settings import parse_settings

TEACHER = ("--teacher-pretrained", "t.pth")


def saved(folder: Path, *argv: str, **changes: object) -> Path:
    """The configuration that a run with this command line would leave, with other values."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "kd_x_config.json"
    path.write_text(json.dumps({"config": {**plain(parse_settings([*TEACHER, *argv])), **changes}, "command": []}))
    return path


def differing(one: dict[str, object], two: dict[str, object]) -> set[str]:
    assert one.keys() == two.keys()
    return {name for name in one if one[name] != two[name]}


@pytest.mark.parametrize("argv", [
    (), ("--method", "none", "--no-aux", "--crop-size", "64", "--lr", "1"), ("--method", "kd", "--lambda-kd", "0.5"),
    ("--method", "afdcd", "--dataset", "voc", "--student-backbone", "resnet18", "--aux", "--selection-split", "val"),
    ("--method", "afdcd", "--dataset", "voc", "--optimizer", "adamw", "--lr", "0.01", "--epochs", "3"),
    ("--method", "cirkd", "--resume", "auto", "--results", "r", "--amp", "bf16", "--ignore-label", "-1"),
])
def test_the_same_settings_but_for_the_folders(argv, tmp_path) -> None:
    path = saved(tmp_path / "run", *argv, "--save-dir", "a", "--log-dir", "b")
    before, again = json.loads(path.read_text())["config"], plain(parse_settings(["--config", str(path)]))
    folder = str(tmp_path.resolve() / "run-repeat")
    assert (again["save_dir"], again["log_dir"], again["resume"], again["results"]) == (folder, folder, None, None)
    assert differing(before, again) <= {"save_dir", "log_dir", "resume", "results"}
    assert plain(parse_settings(["--config", str(path.parent)])) == again


def test_flags_win(tmp_path) -> None:
    path = str(saved(tmp_path, "--method", "kd", "--lambda-kd", "0.5", "--save-dir", "a"))
    same, again = parse_settings(["--config", path]), parse_settings(
        ["--seed", "7", "--config", path, "--method", "kd", "--save-dir", "c", "--lambda-cwd-feat", "3"])
    assert differing(same.flat(), again.flat()) == {"seed", "save_dir", "log_dir", "lambda_cwd_feat"}
    assert again.active == {"kd": 0.5, "cwd_feat": 3} and again.running.log_dir == "c"
    assert parse_settings(["--config", path, "--log-dir", "l"]).running.log_dir == "l"


def test_what_a_flag_sets_beside_itself(tmp_path) -> None:
    """--max-iterations replaces the epochs of the file; another optimizer brings its defaults, the same does not."""
    path = str(saved(tmp_path, "--optimizer", "adamw", "--lr", "0.01", "--epochs", "3"))
    again = parse_settings(["--config", path, "--max-iterations", "5"])
    assert (again.recipe.epochs, again.optimization.max_iterations, again.optimization.lr) == (None, 5, 0.01)
    path = str(saved(tmp_path, "--lr", "0.01"))
    assert parse_settings(["--config", path, "--optimizer", "adamw"]).optimization.lr == 1e-4


def test_another_method_brings_its_preset_and_takes_the_other_away(tmp_path) -> None:
    argv = ("--method", "dist", "--dataset", "citys", "--student-backbone", "resnet18", "--seed", "3")
    path = str(saved(tmp_path, *argv))
    for method in ("none", "afdcd"):
        other = parse_settings(["--config", path, "--method", method])
        expected = parse_settings([*TEACHER, *argv[2:], "--method", method])
        assert differing(other.flat(), expected.flat()) == {"save_dir", "log_dir"}
        assert other.optimization.weight_decay == 1e-4 != preset("dist", "citys", "resnet18")["weight_decay"]


def test_settings_that_are_newer_than_the_file_have_their_defaults(tmp_path) -> None:
    path = saved(tmp_path, "--momentum", "0.5")
    content = json.loads(path.read_text())
    del content["config"]["momentum"]
    path.write_text(json.dumps(content))
    assert parse_settings(["--config", str(path)]).optimization.momentum == 0.9


@pytest.mark.parametrize("changes, expected", [
    ({"bach_size": 3}, "there is no setting 'bach_size'; did you mean batch_size?"), ({"xyz": 3}, "no setting 'xyz'"),
    ({"lr": "fast"}, 'lr is "fast"; expected a number above 0'), ({"lr": -1}, "lr is -1; expected a number above 0"),
    ({"lr": True}, "lr is true; expected a number"), ({"batch_size": 1.5}, "batch_size is 1.5; expected a whole"),
    ({"batch_size": None}, "batch_size is null; expected"), ({"crop_size": 64}, "crop_size is 64; expected a list"),
    ({"fast": 1}, "fast is 1; expected true or false"), ({"amp": "bf17"}, 'amp is "bf17"; expected one of off, bf16'),
    ({"method": "kdd"}, "method 'kdd' is not registered here: start the program from a file that imports it (docs/"),
    ({"lambda_kdd": 0.5}, "the method of its term 'kdd' is not registered here"),
    ({"lambda_kdd": 0.0}, "there is no setting 'lambda_kdd'; did you mean lambda_kd?"),
    ({"aux": "yes"}, "expected true or false, or null"),
])
def test_what_does_not_fit_is_named(changes, expected, tmp_path, capsys) -> None:
    path = saved(tmp_path, **changes)
    assert_refused(capsys, train_kd.main, ["--config", str(path)], f"--config {path}: ", expected)


def test_files_that_are_none(tmp_path, capsys) -> None:
    path = tmp_path / "kd_x_config.json"
    for content, expected in (("{", "not a configuration that a run has written"), ("[]", "not a configuration"),
                              ("{}", "(no entry 'config')"), ('{"config": 3}', "not a configuration")):
        path.write_text(content)
        assert_refused(capsys, train_kd.main, ["--config", str(path)], expected)
    assert_refused(capsys, train_kd.main, ["--config", str(tmp_path / "other.json")], "other.json: not found")
    (tmp_path / "kd_y_config.json").touch()
    assert_refused(capsys, train_kd.main, ["--config", str(tmp_path)], "expected the --save-dir of one run",
                   "kd_x_config.json, kd_y_config.json")


def test_what_the_file_says_counts_as_said(tmp_path) -> None:
    """It keeps its intervals and its length, and another optimizer or an explicit weight drops what belongs to the
    one before."""
    path = str(saved(tmp_path, "--epochs", "3", "--val-per-iters", "800"))
    again = parse_settings(["--config", path])
    assert {"val_per_iters", "max_iterations", "epochs"} <= again.given and again.running.val_per_iters == 800
    path = str(saved(tmp_path, "--optimizer", "adamw"))
    again = parse_settings(["--config", path, "--optimizer", "sgd"])
    assert (again.optimization.lr, again.optimization.weight_decay) == (0.02, 1e-4)
    path = str(saved(tmp_path, "--method", "at"))
    assert parse_settings(["--config", path]).recipe.scale_weights == ("at",)
    assert parse_settings(["--config", path, "--lambda-at", "5000"]).recipe.scale_weights == ()
