"""tools/export.py: what leaves computes the same, says what it is, and claims nothing that its run does not say."""
from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_refused
from reference import fill
from result_files import make_result, score
from tiny_network import tiny_backbone
from torch import nn
from torch.nn import functional as F

from engine.predict import predict
from engine.results import result_path
from engine.run_files import RunFiles, plain
from engine.segmenter import Segmenter
from engine.settings import build_parser, from_flat, parse_settings
from engine.trained import open_trained
from models import SegOutput, get_segmentation_model, save_state_dict
from models.hub import from_pretrained
from tools import export as program
from tools.exporting.card import read_record
from tools.exporting.check import check, load_pt2
from tools.exporting.graph import (
    Deployable,
    Form,
    PoolingByProducts,
    describe_form,
    example_input,
    input_divisor,
    pool_by_products,
    sizes_to_check,
    trace,
    write_pt2,
)
from utils.errors import UserError
from utils.files import sha256, write_json

#: pooling in several bins is the hardest to export; few layers, since every one takes time
MODEL, BACKBONE = "psp", "tiny"


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with tiny_backbone():
        yield


def network(num_class: int = 11, preprocess: str = "bgr") -> nn.Module:
    """Lively weights, so that classes differ from pixel to pixel."""
    return fill.fill_module(get_segmentation_model(MODEL, BACKBONE, num_class, preprocess=preprocess), 3).eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run, as its files tell it: 20 iterations with KD, validated twice."""
    folder = tmp_path_factory.mktemp("export") / "run"
    settings = parse_settings(["--method", "kd", "--dataset", "camvid", "--student-model", MODEL, "--student-backbone",
                               BACKBONE, "--teacher-pretrained", "/far/away/teacher.pth", "--max-iterations", "20",
                               "--save-dir", str(folder), "--log-dir", str(folder), "--seed", "4"])
    files, net = RunFiles(settings), network()
    save_state_dict(net, files.best)
    with torch.no_grad():
        net.head.classifier.bias.zero_()
    save_state_dict(net, files.student)
    files.config.write_text(json.dumps({"config": plain(settings)}))
    train = {"kind": "train", "step": 20, "loss": 1.0, "raw": {}, "weighted": {}, "seconds": 1.0, "cpu_seconds": 1.0,
             "images_per_second": 1.0, "memory_mb": 1, "load": None}
    records = [train, score("val", "val", 10, 40.0), score("val", "val", 20, 37.5), score("test", "report", 20, 33.3)]
    (folder / f"{files.log_name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


def test_every_form_leaves_and_agrees(run, tmp_path, capsys) -> None:
    for package in ("safetensors", "onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    out = tmp_path / "left"
    flags = ["--to", "onnx", "torch-export", "safetensors", "--with-preprocessing", "--with-argmax"]
    assert program.main([str(run), "--out", str(out), *flags]) == 0
    said = capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {"model.safetensors", "model.onnx", "model.pt2", "config.json",
                                               "README.md"}
    config = json.loads((out / "config.json").read_text())
    assert config["exports"].keys() == {"onnx", "torch-export"} and config["input_divisor"] == 1
    for name, one in config["exports"].items():
        assert one["check"]["agreement"] > 0.999 and f"{one['check']['max_difference']:.2e}" in said, name
        assert one["check"]["largest_logit"] > 1 and len({tuple(x) for x in one["check"]["sizes"]}) == 2
        assert one["input"]["shape"] == ["batch", "height", "width", 3] and one["output"]["dtype"] == "uint8"
    import onnxruntime

    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [one.shape for one in session.get_inputs()] == [["batch", "height", "width", 3]]
    images = np.random.default_rng(0).integers(0, 256, (3, 57, 83, 3), dtype=np.uint8)  # a size never seen before
    expected = Segmenter.from_pretrained(run, device="cpu")(list(images))
    (got,) = session.run(["classes"], {"image": images})
    assert len(np.unique(expected)) > 3 and (got == np.stack(expected)).mean() > 0.999
    left = Segmenter.from_pretrained(out, device="cpu")
    np.testing.assert_array_equal(left(images[0]), expected[0])
    assert left.classes[3] == "road" and left.palette.tolist() == config["palette"]


def test_a_folder_can_be_added_to_but_not_become_another_network(run, tmp_path, capsys) -> None:
    pytest.importorskip("safetensors")
    out = tmp_path / "left"
    assert program.main([str(run), "--out", str(out)]) == 0
    first = json.loads((out / "config.json").read_text())
    assert program.main([str(out), "--to", "torch-export", "--size", "48", "64"]) == 0
    second = json.loads((out / "config.json").read_text())
    entry = second["exports"].pop("torch-export")
    assert second == first, "all that was known is known"
    assert entry["input"]["shape"] == ["batch", 3, 48, 64] and entry["check"]["sizes"] == [[2, 48, 64], [1, 48, 64]]
    assert entry["output"]["shape"] == ["batch", 11, 6, 8]
    capsys.readouterr()
    assert_refused(capsys, program.main, [str(run), "--weights", "last", "--out", str(out)], "holds another network")
    assert program.main([str(run), "--weights", "last"]) == 0
    assert from_pretrained(run / "exported").head.classifier.bias.abs().max() == 0
    shutil.rmtree(run / "exported")


def test_the_card_says_what_the_run_says(run, tmp_path, monkeypatch) -> None:
    pytest.importorskip("safetensors")
    cards = {}
    for which in ("best", "last"):
        assert program.main([str(run), "--weights", which, "--out", str(tmp_path / which)]) == 0
        cards[which] = (tmp_path / which / "README.md").read_text()
    for words in ("# psp-tiny, CamVid", "`kd` (Hinton et al., ", "weights: kd 1",
                  "deeplabv3-resnet101, file teacher.pth", "random weights", "20 iterations of 16 crops of", "seed 4",
                  "0 sky, 1 building", "Not stated.", "the teacher's weights (teacher.pth)"):
        assert all(words in card for card in cards.values()), words
    assert "iteration 10" in cards["best"] and "40.00" in cards["best"] and "33.30" in cards["best"]
    assert "iteration 20" in cards["last"] and "37.50" in cards["last"] and "33.30" not in cards["last"]
    assert not [card for card in cards.values() if "/far/away" in card or str(run) in card]
    bare = tmp_path / "bare.pth"
    save_state_dict(network(), bare)
    pushed = []
    monkeypatch.setattr(program, "push_to_hub", lambda *given: pushed.append(given))
    assert program.main([str(bare), "--out", str(tmp_path / "bare"), "--push-to", "owner/net"]) == 0
    assert pushed == [(tmp_path / "bare", "owner/net")]
    card = (tmp_path / "bare" / "README.md").read_text()
    assert card.count("Not known") == 3 and "CamVid" not in card and "Hinton" not in card


def test_scores_come_from_the_result_where_the_log_is_gone(run, tmp_path) -> None:
    copy, results = tmp_path / "run", tmp_path / "results"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("*.jsonl", "*_config.json"))
    (saved,) = run.glob("*_config.json")
    config = json.loads(saved.read_text())["config"]
    config |= {"save_dir": str(copy), "log_dir": str(copy / "logs"), "results": str(results)}
    (copy / saved.name).write_text(json.dumps({"config": config}))
    trained = open_trained(copy)
    assert read_record(trained)["scores"] == {}
    for weights, expected in ((sha256(trained.file), {"val": 0.5, "test": 0.4}), ("another run's", {})):
        made = make_result("kd", 4, 50.0, 40.0, iterations=20, weights=weights)
        write_json(result_path(from_flat({**vars(build_parser().parse_args([])), **config})), made)
        found = read_record(trained)["scores"]
        assert {split: one["mIoU"] for split, one in found.items()} == expected


@pytest.mark.parametrize("preprocess", ["bgr", "rgb"])
def test_preprocessing_and_arg_max_inside_are_those_outside(preprocess) -> None:
    net = network(preprocess=preprocess)
    images, given = example_input(net, Form(preprocessing=True), (2, 50, 71))
    with torch.no_grad():
        inside = Deployable(net, Form(preprocessing=True))(given)
        torch.testing.assert_close(inside, net(net.preprocess(images)).logits, rtol=1e-4, atol=1e-4)
        classes = Deployable(net, Form(preprocessing=True, argmax=True))(given)
        best = predict(net, images).argmax(1)
    assert classes.dtype == torch.uint8 and classes.shape == (2, 50, 71) and best.unique().numel() > 3
    assert (classes == best).float().mean() > 0.999
    assert torch.equal(given[0, 0, 0], images[0, :, 0, 0].flip(0)), "pictures come as RGB"


@pytest.mark.parametrize("bins", [1, 2, 3, 6, (2, 3), (None, 4)])
def test_pooling_by_products_is_adaptive_pooling(bins, monkeypatch) -> None:
    pool = nn.AdaptiveAvgPool2d(bins)
    for height, width in ((7, 12), (6, 6), (13, 5), (3, 4)):
        x = torch.randn(2, 3, height, width, dtype=torch.float64)
        torch.testing.assert_close(pool_by_products(x, bins), F.adaptive_avg_pool2d(x, bins))
        monkeypatch.setattr("tools.exporting.graph.pool_by_products", lambda x, bins: bins)
        with PoolingByProducts():
            assert pool(x) == bins
        monkeypatch.undo()


class Picky(nn.Module):
    """Takes multiples of 32 only."""

    def __init__(self) -> None:
        super().__init__()
        self.preprocess, self.num_class, self.output_stride = network().preprocess, 3, 1
        self.name, self.conv = "picky", nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> SegOutput:
        if x.shape[2] % 32 or x.shape[3] % 32:
            raise RuntimeError("wrong size")
        return SegOutput(self.conv(x), *[None] * 6)


def test_a_network_that_takes_multiples_only(tmp_path) -> None:
    net = Picky().eval()
    assert input_divisor(net) == 32 and input_divisor(network()) == 1
    assert sizes_to_check(Form(), 32) == [(2, 128, 160), (1, 160, 96)]
    path = tmp_path / "x.pt2"
    write_pt2(trace(net, Form(), 32).program, path)
    assert check(net, Form(), load_pt2(path), 32, "x").max_difference < 1e-5
    assert load_pt2(path)(torch.zeros(5, 3, 64, 256)).shape == (5, 3, 64, 256)
    net.conv.forward = lambda x: x.new_tensor(np.asarray(x.numpy()))  # what no tracer follows
    with pytest.raises(UserError, match="picky: cannot be traced .*; a single size may be possible: --size H W"):
        trace(net, Form(), 32)


class Attentive(Picky):
    """Shrinks maps as SegFormer does: below 64 pixels, another graph."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.shrink = nn.Conv2d(3, 3, 7, 4, 3), nn.Conv2d(3, 3, 8, 8)

    def forward(self, x: torch.Tensor) -> SegOutput:
        x = self.embed(x)
        return SegOutput(x + self.shrink(x).mean((2, 3), keepdim=True), *[None] * 6)


def test_the_least_side_is_the_first_that_can_be_traced() -> None:
    net = Attentive().eval()
    traced = trace(net, Form(), 1)
    assert traced.least == 64 and describe_form(net, Form(), traced.least)["input"]["least_side"] == 64
    assert check(net, Form(), traced.program.module(), 1, "x").max_difference < 1e-5
    assert traced.program.module()(torch.zeros(1, 3, 64, 65)).shape == (1, 3, 16, 17)
    assert "least_side" not in describe_form(net, Form(size=(64, 64)))["input"]


def test_a_graph_that_differs_is_refused() -> None:
    net = network()
    for form in (Form(), Form(argmax=True)):
        good = Deployable(net, form)
        assert check(net, form, good, 1, "good").agreement > 0.999
        with pytest.raises(UserError, match="bad: differs from PyTorch by .*; it is not written"):
            check(net, form, lambda x, good=good, form=form: (good(x) + 1) % 11 if form.argmax else good(x) + 0.1, 1,
                  "bad")
    assert describe_form(network(300), Form(argmax=True))["output"]["dtype"] == "int16"


def test_bad_input_is_named(run, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    for argv, words in (([str(tmp_path / "none.pth")], ["no such weights file"]),
                        ([str(run), "--out", str(tmp_path / "file")], ["--out", "expected a folder"]),
                        ([str(run), "--to", "tflite"], ["--to", "invalid choice"])):
        assert_refused(capsys, program.main, argv, *words)
    (config,) = shutil.copytree(run, tmp_path / "own").glob("*_config.json")
    config.write_text(config.read_text().replace('"method": "kd"', '"method": "outtap"'))
    assert_refused(capsys, program.main, [str(tmp_path / "own")], "method 'outtap' is not registered here")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert_refused(capsys, program.main, [str(run), "--to", "onnx"], "onnxscript cannot be imported",
                   "pip install -e '.[export]'")
    assert not (run / "exported").exists()
