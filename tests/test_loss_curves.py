"""tools/loss_curves.py: windows and tables of made-up runs, and two real ones that are not repeated."""
from __future__ import annotations

import json

import pytest
from helpers import train_arguments, write_folder_dataset

from tools import loss_curves
from tools.loss_curves import Curve, read_curve, split_variant, tables
from utils.errors import UserError


def write_run(folder, losses) -> None:
    folder.mkdir()
    lines = [{"kind": "train", "step": i + 1, "loss": x, "images_per_second": 10.0 + i} for i, x in enumerate(losses)]
    lines.append({"kind": "val", "step": len(losses), "split": "val", "mIoU": 0.5})
    (folder / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_windows_cover_the_run(tmp_path) -> None:
    write_run(tmp_path / "a", [4.0, 2.0, 1.0, 0.0, 5.0])
    assert read_curve(tmp_path / "a", 2) == Curve([3.0, 2.0], {"val": 0.5}, 12.0)
    with pytest.raises(UserError, match="5 logged iterations for --windows 6"):
        read_curve(tmp_path / "a", 6)


def test_tables_hold_means_and_spreads() -> None:
    text = tables({"float32": [Curve([3.0], {"val": 0.25}, 8.0), Curve([5.0], {"val": 0.75}, 9.0)],
                   "bf16": [Curve([3.0], {"val": 0.5}, 20.0)] * 2})
    assert "| float32 | 4.000 ± 1.414 |" in text and "| bf16 | 3.000 ± 0.000 |" in text
    assert "| float32 | 50.00 ± 35.36 | 8.5 |" in text and "| bf16 | 50.00 ± 0.00 | 20.0 |" in text


def test_a_variant_is_a_name_with_flags() -> None:
    assert split_variant("bf16=--amp bf16") == ("bf16", ["--amp", "bf16"]) and split_variant("a") == ("a", [])
    with pytest.raises(UserError, match="expected NAME or NAME=FLAGS"):
        split_variant("=--fast")


def test_real_runs_are_made_once(tmp_path, capsys) -> None:
    data = write_folder_dataset(tmp_path / "set")
    flags = ["--seeds", "0", "--variants", "fast", "plain=--no-fast", "--windows", "2", "--out", str(tmp_path / "out")]
    training = train_arguments(data, tmp_path / "x", "--method", "none", "--max-iterations", "2")
    at = training.index("--save-dir")
    training = training[:at] + training[at + 4:]
    assert loss_curves.main([*flags, "--json", str(tmp_path / "all.json"), "--", *training]) == 0
    first = capsys.readouterr()
    curves = json.loads((tmp_path / "all.json").read_text())["curves"]
    assert curves["fast"][0]["losses"] == pytest.approx(curves["plain"][0]["losses"], rel=0.02)
    assert loss_curves.main([*flags, "--", *training]) == 0
    second = capsys.readouterr()
    assert second.out == first.out and first.err.count("\n") == 2 and not second.err
    with pytest.raises(UserError, match="holds a run with other flags"):
        loss_curves.main([*flags, "--", *training, "--lr", "0.1"])
