"""Reading and writing weight files: safe, atomic, and one line for whatever cannot be read."""
from __future__ import annotations

import os
import pathlib
import pickle
import sys

import pytest
import torch

from models import described_network, get_segmentation_model, load_weights, read_info, read_state_dict, save_state_dict
from utils.errors import UserError


class Hostile:
    """Runs a command when it is unpickled without protection."""

    def __init__(self, marker: pathlib.Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def small() -> torch.nn.Module:
    torch.manual_seed(0)
    return get_segmentation_model("psp_mobile", "mobilenetv2_w0.125")


def write_cut_off(path: pathlib.Path) -> None:
    torch.save({"w": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


def write_flipped(path: pathlib.Path) -> None:
    torch.save({"w": torch.ones(1000)}, path)
    content = bytearray(path.read_bytes())
    content[:60] = bytes(60)
    path.write_bytes(content)


BAD_FILES = {
    "missing": (lambda p: None, "no such weights file"),
    "folder": (lambda p: p.mkdir(), "this is a folder"),
    "empty": (lambda p: p.write_bytes(b""), "cut off, or not a PyTorch file"),
    "text": (lambda p: p.write_text("hello world\n" * 50), "cut off, or not a PyTorch file"),
    "html": (lambda p: p.write_text("<!DOCTYPE html><html>404</html>"), "cut off, or not a PyTorch file"),
    "cut off": (write_cut_off, "cut off, or not a PyTorch file"),
    "damaged": (write_flipped, "cut off, or not a PyTorch file"),
    "module": (lambda p: torch.save(torch.nn.Linear(1, 1), p), "Python objects other than tensors"),
    "list": (lambda p: torch.save([torch.ones(1)], p), "its content is a list"),
    "tensor": (lambda p: torch.save(torch.ones(1), p), "its content is a Tensor"),
    "nothing": (lambda p: torch.save({}, p), "its content is empty"),
    "nothing nested": (lambda p: torch.save({"state_dict": {}}, p), "its content is empty"),
    "numbers": (lambda p: torch.save({"epoch": 3}, p), "entry 'epoch' is a int"),
    "numbered": (lambda p: torch.save({0: torch.ones(1)}, p), "entry 0 is a Tensor"),
    "sparse": (lambda p: torch.save({"w": torch.ones(2, 2).to_sparse()}, p), "entry 'w' is a Tensor of an unsupported"),
    "complex": (lambda p: torch.save({"w": torch.ones(2) * 1j}, p), "entry 'w' is a Tensor of an unsupported"),
    "meta": (lambda p: torch.save({"w": torch.empty(2, device="meta")}, p), "entry 'w' is a Tensor of an unsupported"),
    "twice": (lambda p: torch.save({"w": torch.ones(1), "module.w": torch.ones(1)}, p), "'w' occurs twice"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path, case):
    write, message = BAD_FILES[case]
    path = tmp_path / "bad.pth"
    write(path)
    with pytest.raises(UserError, match=message) as caught:
        read_state_dict(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


BAD_SAFETENSORS = {
    "missing": (lambda p, whole: None, "no such weights file"),
    "folder": (lambda p, whole: p.mkdir(), "no such weights file"),
    "text": (lambda p, whole: p.write_text("hello world\n" * 50), "not a weights file that can be loaded"),
    "pickle": (lambda p, whole: torch.save({"w": torch.ones(3)}, p), "not a weights file that can be loaded"),
    "cut off": (lambda p, whole: p.write_bytes(whole[:-5]), "not a weights file that can be loaded"),
    "longer": (lambda p, whole: p.write_bytes(whole + b"x"), "not a weights file that can be loaded"),
    "whole numbers": (lambda p, whole: p.write_bytes(whole.replace(b'"F32"', b'"I32"')), "holds int32 values"),
}


@pytest.mark.parametrize("case", BAD_SAFETENSORS)
def test_bad_safetensors(tmp_path, case):
    safetensors = pytest.importorskip("safetensors.torch")
    net, path = small(), tmp_path / "bad.safetensors"
    write, message = BAD_SAFETENSORS[case]
    write(path, safetensors.save({name: value.contiguous() for name, value in net.state_dict().items()}))
    with pytest.raises(UserError, match=message) as caught:
        load_weights(net, path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_safetensors_are_read_as_other_files(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    net = small()
    content = {f"module.{name}": value.half() for name, value in net.state_dict().items()}  # wrapped, half precision
    safetensors.save_file(content, tmp_path / "net.safetensors")
    (tmp_path / "net.safetensors.json").write_text('{"model": "psp_mobile", "backbone": "mobilenetv2_w0.125"}')
    assert set(load_weights(small(), tmp_path / "net.safetensors").matched) == set(net.state_dict())
    assert described_network(str(tmp_path / "net.safetensors")) == {"model": "psp_mobile",
                                                                    "backbone": "mobilenetv2_w0.125"}
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match=r"safetensors cannot be imported .*pip install -e '.\[export\]'"):
        read_state_dict(tmp_path / "net.safetensors")


@pytest.mark.parametrize("write", [lambda o, p: torch.save(o, p), lambda o, p: p.write_bytes(pickle.dumps(o, 2))],
                         ids=["torch", "pickle"])
def test_hostile_files_are_not_executed(tmp_path, write):
    path, marker = tmp_path / "hostile.pth", tmp_path / "marker"
    write({"state_dict": {"w": Hostile(marker)}}, path)
    with pytest.raises(UserError, match="hostile.pth: not a weights file that can be loaded"):
        read_state_dict(path)
    assert not marker.exists()


@pytest.mark.parametrize("source", [True, 3, ["a.pth"]])
def test_sources_are_paths(source):
    with pytest.raises(UserError, match="must be given as a path"):
        get_segmentation_model("psp_mobile", "mobilenetv2_w0.125", pretrained=source)


def test_reading_gives_plain_tensors(tmp_path):
    torch.save({"state_dict": {"module.w": torch.nn.Parameter(torch.ones(2))}}, tmp_path / "a.pth")
    state = read_state_dict(str(tmp_path / "a.pth"))
    assert list(state) == ["w"] and not state["w"].requires_grad


def test_older_files_are_read(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_state_dict(tmp_path / "a.pth")["w"], torch.ones(2))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    net, path = small(), tmp_path / "net.pth"
    save_state_dict(net, path)
    before = path.read_bytes()

    def full_disk(state, target):
        target.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="net.pth: cannot be written .*No space left"):
        save_state_dict(net, path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.pth", "net.pth.json"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_state_dict(small(), tmp_path / "file" / "net.pth")


@pytest.mark.parametrize(("text", "message"), [
    ("{", "not readable as JSON"), ("[1]", "expected a JSON object"),
    ('{"preprocess": 3}', "'preprocess' is not usable"),
    ('{"preprocess": {"channel_order": "bgr"}}', "'preprocess' is not usable"),
    ('{"trained_on": ["road"]}', "'trained_on' is not usable"), ('{"trained_on": {}}', "'trained_on' is not usable"),
    ('{"trained_on": {"classes": [1]}}', "'trained_on' is not usable"),
    ('{"preprocess": {"channel_order": "bgr", "mean": "abc", "std": [1, 1, 1], "scale": 1}}', "'preprocess' is not"),
])
def test_bad_descriptions(tmp_path, text, message):
    path = tmp_path / "net.pth"
    save_state_dict(small(), path)
    (tmp_path / "net.pth.json").write_text(text)
    with pytest.raises(UserError, match=f"net.pth.json: {message}") as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)


def test_descriptions(tmp_path):
    net, path = small(), tmp_path / "net.pth"
    assert read_info(path) is None
    save_state_dict(net, path)
    assert read_info(path) == {"model": "psp_mobile", "backbone": "mobilenetv2_w0.125", "num_class": 19, "aux": False,
                               "preprocess": net.preprocess}
    (tmp_path / "net.pth.json").write_text('{"preprocess": null}')
    assert read_info(path) == {}
