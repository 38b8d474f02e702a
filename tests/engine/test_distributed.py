"""Real runs with two processes (gloo) against the same run with one."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    ROOT,
    STEM,
    distil_arguments,
    launch,
    launch_forked,
    records,
    train_arguments,
    write_folder_dataset,
    write_teacher,
)
from torch import nn

from utils.distributed import keep_strides

PROGRAM = str(ROOT / "tests" / "programs" / "train_in_float64.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[int, Path]:
    """{process count: folder} of the same Af-DCD run. The centre mask is the same in every process, and the pixels
    without a label are spread unevenly over the images.

    Three steps: rounding (1e-15) grows about fiftyfold a step even in float64.
    """
    base = tmp_path_factory.mktemp("runs")
    data, teacher = write_folder_dataset(base / "set", ignored=0.8), write_teacher(base / "teacher.pth")
    folders = {}
    for count in (1, 2):
        folders[count] = base / f"processes{count}"
        method = distil_arguments(teacher, "--no-rand-mask", "--max-iterations", "3", "--diagnose-every", "3")
        argv = train_arguments(data, folders[count], *method)
        done = launch_forked(PROGRAM, argv, count)
        assert done.returncode == 0, done.stderr[-3000:]
    return folders


def test_losses_agree(runs) -> None:
    one, two = (records(runs[n]) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        for name in a["raw"]:
            assert b["raw"][name] == pytest.approx(a["raw"][name], rel=1e-9), (a["step"], name)


def test_diagnoses_agree(runs) -> None:
    (one,), (two,) = (records(runs[n], "diagnose") for n in (1, 2))
    assert one["step"] == two["step"] == 3 and set(one["terms"]) == {"task", "fd", "ctr", "kd"}
    for name, expected in one["terms"].items():
        found = two["terms"][name]
        if name == "ctr":  # saturated in this tiny run: what is left of its gradient is rounding, in any direction
            found, expected = ({**x, "cosine": 0} for x in (found, expected))
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9), name


def test_weights_agree(runs) -> None:
    one, two = (torch.load(runs[n] / f"{STEM}.pth", weights_only=True) for n in (1, 2))
    for name, value in one.items():
        assert torch.allclose(two[name].double(), value.double(), rtol=1e-7, atol=1e-8), name


def test_validation_agrees(runs) -> None:
    one, two = (records(runs[n], "val") for n in (1, 2))
    assert [{k: r[k] for k in ("step", "mIoU", "pixAcc", "mAcc")} for r in two] == \
        [{k: r[k] for k in ("step", "mIoU", "pixAcc", "mAcc")} for r in one]


def test_a_batch_that_does_not_divide_is_refused(tmp_path) -> None:
    data = write_folder_dataset(tmp_path / "set", train=2, val=1)
    done = launch("train_kd.py", train_arguments(data, tmp_path / "run", "--method", "none", "--batch-size", "5"))
    assert done.returncode != 0
    assert done.stderr.count("--batch-size 5 does not divide by 2 processes") == 1, "both find it, one says so"
    assert not (tmp_path / "run").exists()


def test_a_misspelt_flag_is_named_once() -> None:
    done = launch("train_kd.py", ["--lamda-kd", "1"])
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if "error: " in line] == [
        "train_kd.py: error: unrecognized arguments: --lamda-kd 1 (did you mean --lambda-kd?)"]


def test_batch_norm_over_processes_equals_one_process() -> None:
    program = ROOT / "tests" / "programs" / "batch_norm.py"
    done = launch_forked(str(program), [])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "FutureWarning" not in done.stderr


def test_parameters_that_no_step_uses(tmp_path) -> None:
    """In a network from elsewhere, also where the graph is not taken to be fixed."""
    data, jobs = write_folder_dataset(tmp_path / "set", train=4, val=1), tmp_path / "jobs.json"
    forms = {"fast": (), "no-fast": ("--no-fast",), "parts": ("--grad-accumulation", "2")}
    jobs.write_text(json.dumps({name: train_arguments(
        data, tmp_path / name, "--method", "none", "--student-model", "module:tests.partly_used:PartlyUsed",
        "--crop-size", "32", "32", "--batch-size", "8", "--max-iterations", "3", "--skip-val", *more)
        for name, more in forms.items()}))
    program = ROOT / "tests" / "programs" / "train_methods.py"
    done = launch_forked(str(program), [str(jobs), str(tmp_path / "results.json")])
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "results.json").read_text()) == dict.fromkeys(forms, "")


class OtherStrides(torch.autograd.Function):
    """A sum whose gradient, 0, 1, 2 ..., has the strides that oneDNN gives to that of a depthwise convolution."""

    @staticmethod
    def forward(ctx, weight: torch.Tensor) -> torch.Tensor:
        return weight.sum()

    @staticmethod
    def backward(ctx, _: torch.Tensor) -> torch.Tensor:
        return torch.arange(72.0).as_strided((8, 1, 3, 3), (9, 1, 3, 1))


def test_gradients_have_the_strides_of_their_parameters() -> None:
    conv = nn.Conv2d(8, 8, 3, groups=8, bias=False)
    keep_strides(conv)
    OtherStrides.apply(conv.weight).backward()
    assert conv.weight.grad.stride() == conv.weight.stride() == (9, 9, 3, 1)
    assert torch.equal(conv.weight.grad, torch.arange(72.0).view(8, 1, 3, 3))


def test_the_program_runs_without_a_launcher() -> None:
    done = subprocess.run([sys.executable, "train_kd.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--teacher-pretrained" in done.stdout
