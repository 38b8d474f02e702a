"""--cache DIR of the programs."""
from __future__ import annotations

import pytest
from helpers import TEACHER, assert_refused, records, train_arguments, write_folder_dataset, write_teacher

import eval as evaluation
import train_kd
from dataset import cache, segmentation
from tools import cache_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder_dataset(tmp_path_factory.mktemp("flag") / "set", train=6, val=2, size=(96, 112))


def test_a_run_is_the_same_with_a_cache_and_goes_on_without(data, tmp_path, capsys, monkeypatch):
    plain, cached = (train_arguments(data, tmp_path / name, "--method", "none", "--max-iterations", "2",
                                     "--val-per-iters", "2") for name in ("plain", "cached"))
    assert train_kd.main(plain) == 0
    assert cache_data.main(["--dataset", "folder", "--data", str(data), "--cache", str(tmp_path)]) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(cache, "decode_pair", None)
        patch.setattr(segmentation, "decode_pair", None)
        assert train_kd.main([*cached, "--cache", str(tmp_path)]) == 0
    scores = [[{**r, "seconds": None} for r in records(tmp_path / name, "val")] for name in ("plain", "cached")]
    assert scores[0] == scores[1]
    first, second = ([r["raw"] for r in records(tmp_path / name)] for name in ("plain", "cached"))
    assert first == second and len(first) == 2
    assert train_kd.main([*cached, "--resume", "auto"]) == 0
    assert "will differ" not in capsys.readouterr().out


def test_a_folder_that_cannot_be(data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    argv = train_arguments(data, tmp_path / "run", "--method", "none", "--cache", str(tmp_path / "file"))
    assert_refused(capsys, train_kd.main, argv, "file: a file; expected a folder for decoded images (--cache)")
    assert not (tmp_path / "run").exists()


def test_filled_beforehand_by_the_tool(data, tmp_path, capsys, monkeypatch):
    argv = ["--dataset", "folder", "--data", str(data), "--cache", str(tmp_path)]
    assert cache_data.main([*argv, "--split", "train"]) == 0
    assert cache_data.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["decoding 6 of 6 images of train:" in lines[0], "decoding 2 of 2 images of val:" in lines[2]] == [True] * 2
    assert lines[3:] == [f"train: 6 images are in {tmp_path}", f"val: 2 images are in {tmp_path}"]


def test_evaluation_reads_it_too(data, tmp_path, monkeypatch):
    weights = write_teacher(tmp_path / "n.pth")
    network = ["--model", "deeplab_mobile", "--backbone", TEACHER, "--pretrained", str(weights), "--dataset",
               "folder", "--data", str(data), "--workers", "0", "--no-cuda", "--limit", "1"]
    assert evaluation.main([*network, "--json", str(tmp_path / "plain.json")]) == 0
    for name in ("first", "second"):
        assert evaluation.main([*network, "--json", str(tmp_path / f"{name}.json"), "--cache", str(tmp_path)]) == 0
        assert (tmp_path / f"{name}.json").read_text() == (tmp_path / "plain.json").read_text()
        monkeypatch.setattr(cache, "decode_pair", None)
