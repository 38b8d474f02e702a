"""The files of a run's own code, and how they are named."""
from __future__ import annotations

import json
import sys

import torch
from helpers import ROOT, STEM, TEACHER, train_arguments, write_folder_dataset, write_teacher

import train_kd
from engine.settings import parse_settings
from engine.sources import differing, is_own_code, sources
from losses.core import Distiller, Needs, Term, distiller
from utils.files import sha256

TEACHER_FLAGS = ("--teacher-model", "deeplab_mobile", "--teacher-backbone", TEACHER, "--teacher-pretrained")


def test_methods_that_count_and_networks_of_modules_are_named_from_the_root() -> None:
    settings = parse_settings(["--method", "kd", "--lambda-at", "1", "--teacher-pretrained", "t.pth", "--teacher-model",
                               "module:examples.espnet:camvid"])
    names = ["losses/kd.py", "losses/at.py", "examples/espnet.py"]
    assert sources(settings) == {name: sha256(ROOT / name) for name in names}
    assert sources(parse_settings(["--method", "none"])) == {}


def test_files_elsewhere_have_their_name_alone(tmp_path, monkeypatch) -> None:
    (tmp_path / "mynet.py").write_text("def build(num_class):\n    raise RuntimeError('is not called')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    settings = parse_settings(["--method", "none", "--student-model", "module:mynet:build"])
    assert sources(settings) == {"mynet.py": sha256(tmp_path / "mynet.py")}
    other = parse_settings(["--method", "none", "--student-model", "module:no_such_package.net:build"])
    assert sources(other) == {}


def test_two_files_of_one_name_are_both_there(tmp_path, monkeypatch) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "net.py").write_text(f"# {name}\ndef build(num_class): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    settings = parse_settings(["--method", "mse", "--student-model", "module:one.net:build", "--teacher-model",
                               "module:two.net:build", "--teacher-pretrained", "t.pth"])
    files = {"net.py": sha256(tmp_path / "one/net.py"), ".../two/net.py": sha256(tmp_path / "two/net.py")}
    assert sources(settings) == {"losses/feature_mse.py": sha256(ROOT / "losses/feature_mse.py"), **files}
    assert [is_own_code(name) for name in sources(settings)] == [True, False, False]


def test_a_method_that_was_typed_in_has_no_file(monkeypatch) -> None:
    parts = {"title": "t", "paper": "p", "year": 2026, "cost": "c", "needs": Needs.both("logits"),
             "terms": (Term("typed", 1.0, "w"),)}
    monkeypatch.setattr(distiller, "_REGISTRY", dict(distiller.methods()))
    distiller.register("typed")(type("Typed", (Distiller,), {**parts, "__module__": "no_such_module"}))
    assert sources(parse_settings(["--lambda-typed", "1", "--method", "typed", "--teacher-pretrained", "t.pth"])) == {}


def test_what_differs_is_said_in_short() -> None:
    before, now = {"a.py": "1" * 64, "b.py": "2" * 64}, {"a.py": "3" * 64, "b.py": "2" * 64, "c.py": "4" * 64}
    assert differing(before, now) == {"code of a.py": ("1111111", "3333333")} and differing(now, now) == {}


def test_a_run_that_goes_on_with_other_code_says_so(tmp_path, capsys) -> None:
    def with_other_code() -> None:
        state = torch.load(path, weights_only=True)
        assert state["sources"] == {"losses/kd.py": sha256(ROOT / "losses/kd.py")}
        torch.save({**state, "sources": {"losses/kd.py": "1a2b3c4d" * 8}}, path)

    data, teacher = write_folder_dataset(tmp_path / "set", train=4, val=1), write_teacher(tmp_path / "t.pth")
    argv = train_arguments(data, tmp_path / "run", "--method", "kd", *TEACHER_FLAGS, str(teacher), "--skip-val")
    path, change = tmp_path / "run" / f"{STEM}_state.pth", f"1a2b3c4 -> {sha256(ROOT / 'losses/kd.py')[:7]}"
    assert train_kd.main([*argv, "--max-iterations", "1"]) == 0
    with_other_code()
    assert train_kd.main([*argv, "--max-iterations", "2", "--resume", "auto"]) == 0
    assert f"code of losses/kd.py: {change} (the continuation may differ" in capsys.readouterr().out
    told = json.loads((tmp_path / "run" / f"{STEM}_config.json").read_text())["changed"]
    assert {"code of losses/kd.py", "max_iterations"} == {one["setting"] for one in told}
    with_other_code()  # a run that is finished has not used it
    assert train_kd.main([*argv, "--max-iterations", "2", "--resume", "auto"]) == 0
    assert "code of" not in capsys.readouterr().out
