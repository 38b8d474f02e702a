"""Model and backbone from the JSON file beside weights: for eval.py, and for the teacher of train_kd.py."""
from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_refused

import train_kd
from engine import eval_settings
from engine.settings import build_parser, parse_settings
from engine.trained import Known, open_trained
from models import list_models
from tools.latency import find_subjects
from utils.errors import UserError

TEACHER = ["--dataset", "folder", "--method", "kd", "--teacher-pretrained"]


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """A weights file that is not there: only its description is read."""
    (tmp_path / "a.pth.json").write_text(json.dumps({"model": "psp", "backbone": "resnet18_w0.5"}))
    return str(tmp_path / "a.pth")


def test_the_evaluated_network(weights):
    network = eval_settings.parse_settings(["--pretrained", weights]).network
    assert (network.model, network.backbone) == ("psp", "resnet18_w0.5")
    network = eval_settings.parse_settings(["--pretrained", "elsewhere.pth"]).network
    assert (network.model, network.backbone) == ("deeplabv3", "resnet18")


def test_the_teacher(weights):
    networks = parse_settings([*TEACHER, weights]).networks
    assert (networks.teacher_model, networks.teacher_backbone) == ("psp", "resnet18_w0.5")
    assert (networks.student_model, networks.student_backbone) == ("deeplabv3", "resnet18")
    networks = parse_settings([*TEACHER, "elsewhere.pth"]).networks
    assert (networks.teacher_model, networks.teacher_backbone) == ("deeplabv3", "resnet101")
    plain = parse_settings(["--method", "none", "--teacher-pretrained", weights, "--teacher-model", "deeplabv3"])
    assert plain.networks.teacher_model == "deeplabv3", "nothing reads that teacher"


@pytest.mark.parametrize("which", ["--list-taps", "--list-methods"])
def test_the_lists(weights, capsys, which):
    """They show the teacher that would be trained with, and fetch nothing for it."""
    path = Path(f"{weights}.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "head_width": 24}))
    argv = ["--dataset", "citys", "--student-backbone", "resnet18_w0.25", "--method", "none", which]
    assert train_kd.main([*argv, "--teacher-pretrained", weights]) == 0
    said = capsys.readouterr().out
    assert "psp-resnet18_w0.5" in said and "resnet101" not in said.partition("\n\nmethod")[0]
    assert which == "--list-methods" or "head       24 channels" in said
    assert_refused(capsys, train_kd.main, [*argv, "--teacher-pretrained", weights, "--teacher-model", "deeplabv3"],
                   "teacher model deeplabv3 was asked for, but")
    assert train_kd.main([*argv, "--teacher-pretrained", "get:resnet101-imagenet"]) == 0
    assert "deeplabv3-resnet101" in capsys.readouterr().out


def test_the_folder_of_a_run(tmp_path):
    """It stands for its best weights."""
    run, teach = tmp_path / "run", [*TEACHER, str(tmp_path / "run")]
    run.mkdir()
    with pytest.raises(UserError, match="--teacher-pretrained .*run: expected the --save-dir of one run, .* or a weig"):
        parse_settings(teach)
    (run / "kd_a_config.json").write_text("{}")
    with pytest.raises(UserError, match="no kd_a_best_model.pth; .* a run without validation has only kd_a.pth"):
        eval_settings.parse_settings(["--pretrained", str(run)])
    path = run / "kd_a_best_model.pth"
    path.touch()
    (run / f"{path.name}.json").write_text(json.dumps({"model": "psp", "backbone": "resnet18_w0.5"}))
    networks, network = parse_settings(teach).networks, eval_settings.parse_settings(["--pretrained", str(run)]).network
    assert networks.teacher_pretrained == network.pretrained == str(path)
    assert (networks.teacher_backbone, network.backbone) == ("resnet18_w0.5", "resnet18_w0.5")


def test_flags_that_agree(weights):
    assert parse_settings([*TEACHER, weights, "--teacher-model", "psp"]).networks.teacher_backbone == "resnet18_w0.5"


@pytest.mark.parametrize("parse, argv, flag", [
    (eval_settings.parse_settings, ["--pretrained"], "backbone"), (parse_settings, TEACHER, "teacher_backbone")])
def test_flags_that_do_not(weights, parse, argv, flag):
    with pytest.raises(UserError, match="resnet18 was asked for, but .*a.pth.json says resnet18_w0.5") as error:
        parse([*argv, weights, f"--{flag}", "resnet18"])
    assert error.value.settings == (flag,)


def test_a_network_from_elsewhere_has_no_backbone_that_could_be_wrong(tmp_path):
    (tmp_path / "a.pth.json").write_text('{"model": "tv:net", "backbone": ""}')
    file = ["--pretrained", str(tmp_path / "a.pth"), "--backbone", "-", "--model"]
    assert eval_settings.parse_settings([*file, "tv:net"]).network.model == "tv:net"
    with pytest.raises(UserError, match="model smp:net was asked for, but .*a.pth.json says tv:net"):
        eval_settings.parse_settings([*file, "smp:net"])


def test_a_description_that_says_less(tmp_path):
    (tmp_path / "a.pth.json").write_text('{"preprocess": null, "model": 3}')
    assert eval_settings.parse_settings(["--pretrained", str(tmp_path / "a.pth")]).network.model == "deeplabv3"


@pytest.mark.parametrize(("model", "message"), [
    ("module:evil:net", "code that would be run here"), ("hf:attacker/repo", "would be fetched or read from elsewhere"),
    ("smp:Unet:tu-hf-hub:attacker/repo", "would be fetched"), (f"smp:{Path(__file__).parent}", "would be fetched")])
def test_what_only_the_caller_may_name(tmp_path, model, message):
    """Its code is not run, nothing is fetched."""
    path = tmp_path / "a.pth"
    (tmp_path / "a.pth.json").write_text(json.dumps({"model": model, "backbone": "", "num_class": 2}))
    evaluate, teach = ["--pretrained", str(path)], [*TEACHER, str(path)]
    for parse, argv, setting in ((eval_settings.parse_settings, evaluate, "model"), (parse_settings, teach,
                                                                                     "teacher_model")):
        with pytest.raises(UserError, match=f"a.pth.*: its model is {model}, .*{message}") as error:
            parse(argv)
        assert error.value.settings == (setting,)
    path.touch()
    with pytest.raises(UserError, match=message):
        open_trained(path)
    with pytest.raises(UserError, match=message):
        find_subjects(str(path), 2)
    named = eval_settings.parse_settings([*evaluate, "--model", model, "--backbone", ""]).network
    assert named.model == model
    assert parse_settings([*teach, "--teacher-model", model]).networks.teacher_model == model


def test_the_code_of_a_runs_own_folder_is_run(tmp_path, monkeypatch):
    """The folder was named; a file of it is no more than a file."""
    path = tmp_path / "kd_a_best_model.pth"
    (tmp_path / "kd_a_config.json").write_text(json.dumps({"config": {
        "student_model": "module:afdcd_own:net", "student_backbone": "", "dataset": "citys", "data": str(tmp_path)}}))
    (tmp_path / "afdcd_own.py").write_text("from torch import nn\ndef net():\n    return nn.Conv2d(3, 19, 1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    torch.save(torch.nn.Conv2d(3, 19, 1).state_dict(), path)
    with pytest.raises(UserError, match="code that would be run here"):
        open_trained(path)
    assert "afdcd_own" not in sys.modules
    for opened in (open_trained(tmp_path), open_trained(path, Known(model="module:afdcd_own:net"))):
        assert opened.net.model == "module:afdcd_own:net" and opened.file == path


def test_the_help_lists_models_and_backbones():
    for parser in (build_parser(), eval_settings.build_parser()):
        text = parser.format_help()
        assert all(name in text for pair in list_models() for name in pair)
