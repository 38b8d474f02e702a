"""Students of other libraries leave: what is exported opens where the folder that they came from is not. Names of
folders of this machine stay here."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import fill

from engine.segmenter import Segmenter
from engine.trained import open_trained
from models import get_segmentation_model, network_name, save_state_dict
from models.hub import from_pretrained, save_pretrained
from models.outside import portable
from models.torchvision_compat import import_torchvision
from tools import export as program
from utils.errors import UserError

pytest.importorskip("safetensors")
K = 4


def change(path: Path, **entries) -> None:
    """Entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_a_network_of_transformers(tmp_path) -> None:
    """Also as ONNX, for one size, which is faster."""
    import_torchvision()
    transformers = pytest.importorskip("transformers")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    transformers.SegformerConfig(hidden_sizes=[4, 8, 8, 8], depths=[1] * 4, num_labels=K, num_attention_heads=[1] * 4,
                                 decoder_hidden_size=8).save_pretrained(tmp_path / "mine")
    net = fill.fill_module(get_segmentation_model(f"hf:{tmp_path / 'mine'}", "", K), 3).eval()
    save_state_dict(net, tmp_path / "w.pth")
    out = tmp_path / "left"
    flags = ["--to", "safetensors", "onnx", "--size", "64", "64", "--out", str(out)]
    assert program.main([str(tmp_path / "w.pth"), *flags]) == 0
    (tmp_path / "mine").rename(tmp_path / "away")
    config = json.loads((out / "config.json").read_text())
    assert config["model"] == "hf:mine" and str(tmp_path) not in json.dumps(config) + (out / "README.md").read_text()
    assert config["exports"]["onnx"]["check"]["largest_logit"] > 1
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for opened in (from_pretrained(out), open_trained(tmp_path / "w.pth").net):
            assert torch.equal(opened(x).logits, net(x).logits) and opened.channels == net.channels
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    assert Segmenter.from_pretrained(out, device="cpu")(image).shape == (40, 50)
    for given, message in (("x", "expected an object, of a model of smp: or hf:"),
                           ({"model_type": "nothing"}, r"hf:mine: .*\(of the 'architecture' in its description\)"),
                           (config["architecture"] | {"id2label": {"0": "a"}, "label2id": {"a": 0}}, "scores 1 class")):
        change(out / "config.json", architecture=given)
        with pytest.raises(UserError, match=message):
            from_pretrained(out)


def test_a_folder_of_segmentation_models_pytorch(tmp_path) -> None:
    import_torchvision()
    package = pytest.importorskip("segmentation_models_pytorch")
    package.create_model("Unet", "resnet18", encoder_weights=None, classes=K, decoder_channels=(8, 8, 8, 8, 8),
                         ).save_pretrained(str(tmp_path / "mine"))
    net = get_segmentation_model(f"smp:{tmp_path / 'mine'}", "", K).eval()
    save_pretrained(net, tmp_path / "left")
    (tmp_path / "mine").rename(tmp_path / "away")
    again, x = from_pretrained(tmp_path / "left"), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x).logits, net(x).logits) and again.name == "smp:mine"
    change(tmp_path / "left" / "config.json", architecture={"_model_class": "Nothing"})
    with pytest.raises(UserError, match=r"smp:mine: .*Nothing.*\(of the 'architecture' in its description\)"):
        from_pretrained(tmp_path / "left")


@pytest.mark.parametrize(("model", "backbone"), [("tv:lraspp_mobilenet_v3_large", ""),
                                                 ("deeplabv3", "timm:mobilenetv3_small_050")])
def test_those_that_their_names_describe(model, backbone, tmp_path) -> None:
    if backbone:
        pytest.importorskip("timm")
    net, x = get_segmentation_model(model, backbone, K).eval(), torch.randn(1, 3, 64, 64)
    save_pretrained(net, tmp_path)
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path)(x).logits, net(x).logits)
    assert "architecture" not in json.loads((tmp_path / "config.json").read_text())


def test_names_without_folders(tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    assert portable(f"hf:{tmp_path / 'mine'}") == "hf:mine" and portable("smp:/gone/net") == "smp:net"
    assert network_name(f"hf:{tmp_path / 'mine'}", "") == "hf-mine" and network_name("hf:me/net", "") == "hf-me-net"
    for name in ("hf:nvidia/segformer-b0", "smp:Unet:resnet18", "module:a.b:c", "psp"):
        assert portable(name) == name
