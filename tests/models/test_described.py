"""Model and backbone from the JSON file beside weights: for eval.py, and for the teacher of train_kd.py."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine import eval_settings
from engine.settings import build_parser, parse_settings
from models import list_models
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


def test_flags_that_agree(weights):
    assert parse_settings([*TEACHER, weights, "--teacher-model", "psp"]).networks.teacher_backbone == "resnet18_w0.5"


@pytest.mark.parametrize("parse, argv, flag", [
    (eval_settings.parse_settings, ["--pretrained"], "backbone"), (parse_settings, TEACHER, "teacher_backbone")])
def test_flags_that_do_not(weights, parse, argv, flag):
    with pytest.raises(UserError, match="resnet18 was asked for, but .*a.pth.json says resnet18_w0.5") as error:
        parse([*argv, weights, f"--{flag}", "resnet18"])
    assert error.value.settings == (flag,)


def test_a_network_from_elsewhere_has_no_backbone_that_could_be_wrong(tmp_path):
    (tmp_path / "a.pth.json").write_text('{"model": "hf:net", "backbone": ""}')
    file = ["--pretrained", str(tmp_path / "a.pth"), "--backbone", "-", "--model"]
    assert eval_settings.parse_settings([*file, "hf:net"]).network.model == "hf:net"
    with pytest.raises(UserError, match="model smp:net was asked for, but .*a.pth.json says hf:net"):
        eval_settings.parse_settings([*file, "smp:net"])


def test_a_description_that_says_less(tmp_path):
    (tmp_path / "a.pth.json").write_text('{"preprocess": null, "model": 3}')
    assert eval_settings.parse_settings(["--pretrained", str(tmp_path / "a.pth")]).network.model == "deeplabv3"


def test_the_help_lists_models_and_backbones():
    for parser in (build_parser(), eval_settings.build_parser()):
        text = parser.format_help()
        assert all(name in text for pair in list_models() for name in pair)
