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
from models.outside.trust import check_hf, without_unsafe
from models.torchvision_compat import import_torchvision
from tools import export as program
from tools.exporting.check import load_onnx
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
                           (config["architecture"] | {"num_encoder_blocks": 9}, "IndexError"),
                           (config["architecture"] | {"id2label": {"0": "a"}, "label2id": {"a": 0}}, "scores 1 class")):
        change(out / "config.json", architecture=given)
        with pytest.raises(UserError, match=message):
            from_pretrained(out)


def test_a_folder_of_segmentation_models_pytorch(tmp_path) -> None:
    """Also as ONNX, for any size that its divisor allows."""
    import_torchvision()
    package = pytest.importorskip("segmentation_models_pytorch")
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed)
    package.create_model("Unet", "tu-test_resnet", encoder_weights=None, classes=K, encoder_depth=3,
                         decoder_channels=(8, 8, 8)).save_pretrained(str(tmp_path / "mine"))
    net = get_segmentation_model(f"smp:{tmp_path / 'mine'}", "", K).eval()
    save_state_dict(net, tmp_path / "w.pth")
    assert program.main([str(tmp_path / "w.pth"), "--to", "safetensors", "onnx", "--out", str(tmp_path / "left")]) == 0
    (tmp_path / "mine").rename(tmp_path / "away")
    again, x = from_pretrained(tmp_path / "left"), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x).logits, net(x).logits) and again.name == "smp:mine"
        graph, y = load_onnx(tmp_path / "left" / "model.onnx"), torch.randn(3, 3, 40, 88)
        torch.testing.assert_close(graph(y), net(y).logits, atol=1e-4, rtol=0)
    config = json.loads((tmp_path / "left" / "config.json").read_text())
    assert config["input_divisor"] == 8 and config["exports"]["onnx"]["input"]["shape"] == ["batch", 3, "height",
                                                                                            "width"]
    plain = {"_model_class": "Unet", "encoder_name": "resnet18", "classes": K}
    for given, message in (({"_model_class": "Nothing"}, "no architecture 'Nothing'"), ({"_model_class": 3}, "3"),
                           (plain | {"encoder_name": "tu-resnet18", "checkpoint_path": "evil.pth"},
                            "refused, .*: checkpoint_path"),
                           (plain | {"encoder_name": "tu-hf-hub:a/b"}, "the encoder 'tu-hf-hub:a/b' is refused"),
                           (plain | {"decoder_channels": [-1] * 5}, "RuntimeError|ValueError")):
        change(tmp_path / "left" / "config.json", architecture=given)
        with pytest.raises(UserError, match=rf"smp:mine: .*({message}).*\(of the 'architecture' in its description\)"):
            from_pretrained(tmp_path / "left")


UPERNET = {"model_type": "upernet", "num_labels": K}


@pytest.mark.parametrize("refused", [
    {"backbone_kwargs": {"trust_remote_code": True}}, {"auto_map": {"AutoConfig": "evil.Config"}},
    {"trust_remote_code": True}, {"attn_implementation": "attacker/kern"}, {"_attn_implementation": "attacker/kern"},
    {"_attn_implementation_internal": "attacker/kern"}, {"use_pretrained_backbone": True},
    {"backbone": "attacker/net"}, {"backbone": "hf-hub:attacker/net", "use_timm_backbone": True},
    {"model_args": {"checkpoint_path": "evil.pth"}}])
def test_what_leads_to_code_is_refused(refused) -> None:
    """At any depth, before transformers sees it; and it is not written."""
    pytest.importorskip("transformers")
    for architecture in (UPERNET | refused, UPERNET | {"backbone_config": {"model_type": "swin"} | refused},
                         UPERNET | {"more": [{"a": refused}]}):
        with pytest.raises(UserError, match=f"hf:mine: .*the entry '{next(iter(refused))}' is refused"):
            get_segmentation_model("hf:mine", "", K, architecture=architecture)
        check_hf(without_unsafe(architecture))
    usual = {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18", "_name_or_path": "/a",
                                 "use_pretrained_backbone": True}, "backbone_kwargs": {"out_indices": [1], "b": 2}}
    assert without_unsafe(usual) == {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18",
                                                         "use_pretrained_backbone": False},
                                     "backbone_kwargs": {"out_indices": [1]}}


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
