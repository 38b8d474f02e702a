"""Heads of another width than usual: CIRKDv2's files have 512 channels where CIRKD's and Af-DCD's have 128 or 256."""
from __future__ import annotations

import json

import pytest
import torch
from helpers import CLASSES, STEM, STUDENT, TEACHER, train_arguments, write_folder_dataset

import train_kd
from engine.results import differences
from engine.settings import parse_settings
from models import get_segmentation_model, read_info, save_state_dict
from models.hub import from_pretrained, save_pretrained
from utils.errors import UserError

MOBILE = {"deeplab_mobile": "mobilenetv2_w0.125", "psp_mobile": "mobilenetv2_w0.125"}


@pytest.mark.parametrize("model", MOBILE)
def test_the_width_of_a_file_is_taken_over(model, tmp_path):
    wide = get_segmentation_model(model, MOBILE[model], 4, head_width=24)
    assert wide.channels["head"] == 24 != get_segmentation_model(model, MOBILE[model], 4).channels["head"]
    torch.save(wide.state_dict(), tmp_path / "released.pth")  # no JSON file beside it
    again = get_segmentation_model(model, MOBILE[model], 4, pretrained=str(tmp_path / "released.pth"))
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(again.eval()(image).logits, wide.eval()(image).logits) and again.channels == wide.channels
    with pytest.raises(UserError, match="released.pth: its head is 24 channels wide, but 8 were asked for"):
        get_segmentation_model(model, MOBILE[model], 4, pretrained=str(tmp_path / "released.pth"), head_width=8)


def test_the_width_is_written_down(tmp_path):
    wide = get_segmentation_model("psp_mobile", "mobilenetv2_w0.125", 4, head_width=24)
    save_state_dict(wide, tmp_path / "wide.pth")
    assert read_info(tmp_path / "wide.pth")["head_width"] == 24
    usual = get_segmentation_model("psp_mobile", "mobilenetv2_w0.125", 4, head_width=16)
    save_state_dict(usual, tmp_path / "usual.pth")
    assert "head_width" not in read_info(tmp_path / "usual.pth")
    pytest.importorskip("safetensors")
    save_pretrained(wide, tmp_path / "left")
    assert from_pretrained(tmp_path / "left").channels == wide.channels


def test_the_flags():
    networks = parse_settings(["--method", "none", "--student-head-width", "512"]).networks
    assert networks.student.head_width == 512 and networks.teacher.head_width is None
    with pytest.raises(UserError, match="tv:lraspp_mobilenet_v3_large: has no head of this repository"):
        get_segmentation_model("tv:lraspp_mobilenet_v3_large", head_width=512)


def test_released_shapes_at_full_width():
    """Of CIRKDv2's DeepLabV3 over ResNet-18, on the meta device."""
    with torch.device("meta"):
        shapes = get_segmentation_model("deeplabv3", "resnet18", 19, head_width=512).head.state_dict()
    assert shapes["aspp.b1.block.0.weight"].shape == (512, 512, 3, 3)
    assert shapes["aspp.project.0.weight"].shape == (512, 2560, 1, 1)
    assert shapes["block.0.weight"].shape == (512, 512, 3, 3) and shapes["block.4.weight"].shape == (19, 512, 1, 1)


def test_a_run_writes_down_what_its_files_said(tmp_path):
    """A wide teacher and a wide student to start from, then the same run resumed without the student's file."""
    safetensors = pytest.importorskip("safetensors.torch")
    for name, backbone, width in (("teacher", TEACHER, 40), ("student", STUDENT, 24)):
        tensors = get_segmentation_model("deeplab_mobile", backbone, CLASSES, head_width=width).state_dict()
        safetensors.save_file(tensors, tmp_path / f"{name}.safetensors")
    data, save = write_folder_dataset(tmp_path / "data", train=4, val=1, size=(64, 64)), tmp_path / "run"
    arguments = train_arguments(
        data, save, "--method", "kd", "--teacher-model", "deeplab_mobile", "--teacher-backbone", TEACHER,
        "--teacher-pretrained", str(tmp_path / "teacher.safetensors"), "--skip-val", "--max-iterations", "2")
    assert train_kd.main([*arguments, "--student-pretrained", str(tmp_path / "student.safetensors")]) == 0
    config = json.loads((save / f"{STEM}_config.json").read_text())["config"]
    assert (config["student_head_width"], config["teacher_head_width"]) == (24, 40)
    assert read_info(save / f"{STEM}.pth")["head_width"] == 24
    assert torch.load(save / f"{STEM}.pth", weights_only=True)["head.block.4.weight"].shape[:2] == (CLASSES, 24)
    assert train_kd.main([*arguments, "--student-head-width", "24", "--resume", "auto"]) == 0
    open_settings = {**config, "student_head_width": None}
    assert not differences(config, open_settings)
    assert differences(config, {**config, "student_head_width": 32}) == ["student_head_width: 24 -> 32"]
