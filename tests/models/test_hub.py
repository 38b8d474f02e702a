"""Folders of networks that leave: written, read, described, and fetched from a hub that a folder stands for."""
from __future__ import annotations

import json

import pytest
import torch

from engine.trained import Known, open_trained
from models import get_segmentation_model, load_weights
from models.hub import build_config, from_pretrained, push_to_hub, read_config, save_pretrained
from utils.errors import UserError
from utils.extras import need

pytest.importorskip("safetensors")
COLORS = [[0, 0, 0], [255, 0, 9]]


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    return get_segmentation_model("psp", "resnet18_w0.125", 2, preprocess="rgb").eval()


def test_a_folder_gives_the_network_back(net, tmp_path) -> None:
    save_pretrained(net, tmp_path / "a", classes=("road", "car"), palette=COLORS, more={"data": "mine"})
    again, config = from_pretrained(tmp_path / "a"), read_config(tmp_path / "a")
    for (name, one), (other_name, other) in zip(net.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other_name and torch.equal(one, other)
    assert again.preprocess == config["preprocess"] == net.preprocess and not again.training
    assert (config["classes"], config["palette"], config["data"]) == (["road", "car"], COLORS, "mine")
    assert (config["output_stride"], config["aux"]) == (8, True)
    other = get_segmentation_model("psp", "resnet18_w0.125", 2)
    load_weights(other, tmp_path / "a" / "model.safetensors")  # the file alone is a weights file like others
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), net.parameters(), strict=True))


def test_a_hub_id_is_downloaded(net, tmp_path, monkeypatch) -> None:
    hub, asked = pytest.importorskip("huggingface_hub"), []
    save_pretrained(net, tmp_path)

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name == "owner/none":
            raise ValueError("404 Not Found\nand more")
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert from_pretrained("owner/student").name == net.name
    with pytest.raises(UserError, match=r"owner/none: no such folder here, and .* \(404 Not Found\)$"):
        from_pretrained("owner/none")
    assert asked[0] == ("owner/student", ["config.json", "model.safetensors"])
    with pytest.raises(UserError, match="a/b/c: no such folder; expected"):
        from_pretrained("a/b/c")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model": "module:os:abort"}))
    for opened in (from_pretrained, open_trained):
        with pytest.raises(UserError, match="its model is module:os:abort, code that would be run here"):
            opened("owner/student")
    for opened in (from_pretrained, open_trained):
        with pytest.raises(UserError, match="its model is module:os:abort, code that would be run here"):
            opened(tmp_path)
    named = {"model": "module:os:nothing"}
    (tmp_path / "config.json").write_text(json.dumps(config | named))
    for opened in (lambda: from_pretrained(tmp_path, **named), lambda: open_trained(tmp_path, Known(**named))):
        with pytest.raises(UserError, match="no attribute 'nothing'"):  # it was looked for
            opened()


def test_only_what_belongs_to_the_network_is_uploaded(net, tmp_path, monkeypatch) -> None:
    hub, calls = pytest.importorskip("huggingface_hub"), []

    class Api:
        def __init__(self, token):
            calls.append(token)

        def create_repo(self, repo, private, exist_ok):
            calls.append((repo, private))
            return f"https://hub/{repo}"

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            calls.append((repo_id, folder_path, "*.pth" in allow_patterns))

    monkeypatch.setattr(hub, "HfApi", Api)
    save_pretrained(net, tmp_path / "net")
    assert push_to_hub(tmp_path / "net", "owner/student", token="t") == "https://hub/owner/student"
    assert calls == ["t", ("owner/student", True), ("owner/student", tmp_path / "net", False)]
    for folder, repo, message in ((tmp_path, "owner/student", "config.json: cannot be read"),
                                  (tmp_path / "net", "student", "expected OWNER/NAME")):
        with pytest.raises(UserError, match=message):
            push_to_hub(folder, repo)


def test_what_does_not_fit_is_named(net, tmp_path) -> None:
    with pytest.raises(UserError, match="3 class names for 2 classes"):
        build_config(net, classes="abc")
    save_pretrained(net, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for change, message in (({"num_class": 3}, r"head.classifier.weight has shape .* 3 classes wants"),
                            ({"format": "x"}, "with format afdcd-1"), ({"preprocess": {"mean": 1}}, "not usable")):
        (tmp_path / "config.json").write_text(json.dumps(content | change))
        with pytest.raises(UserError, match=message):
            from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(content))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-9])
    with pytest.raises(UserError, match="not a weights file that can be loaded"):
        from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no model.safetensors"):
        from_pretrained(tmp_path)


def test_a_missing_package_is_named_with_what_installs_it() -> None:
    with pytest.raises(UserError, match=r"^no_such_package cannot be imported .*: pip install -e '\.\[export\]'$"):
        need("no_such_package.torch", "export")
