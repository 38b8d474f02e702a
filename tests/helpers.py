"""Small data sets, networks and command lines that several test files use."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import torch

from models import get_segmentation_model
from models.weights import save_state_dict
from utils.cli import run_main

ROOT = Path(__file__).resolve().parent.parent
CLASSES = 5
TEACHER, STUDENT = "mobilenetv2_w0.5", "mobilenetv2_w0.25"
#: of the files of a run of :func:`train_arguments`
STEM = f"kd_deeplab_mobile_{STUDENT}_folder"
#: of a record of the log, what another run of the same cannot have
TIMES = ("seconds", "cpu_seconds", "images_per_second", "waiting_for_data", "waited", "load", "tflops", "memory_mb")


def set_blocks(monkeypatch, size: int) -> None:
    """Similarities that CIRKD's relations compute at a time and, in their faster form, keep."""
    for name in ("relations.BLOCK", "relation_sums.TILE_CPU", "relation_sums.KEPT"):
        monkeypatch.setattr(f"losses.core.{name}", size)


def write_folder_dataset(root: Path, train: int = 8, val: int = 3, size: tuple[int, int] = (128, 128),
                         ignored: float = 0.0) -> Path:
    """A ``folder`` data set of blocky random pictures whose colours follow the class.

    ignored: largest share of the blocks without a label; it differs from image to image. 0: every pixel is labelled.
    """
    (root / "images").mkdir(parents=True)
    (root / "classes.txt").write_text("".join(f"class{i}\n" for i in range(CLASSES)))
    colours = np.random.default_rng(0).integers(30, 220, (CLASSES, 3))
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            rng = np.random.default_rng((len(split), i))
            label = rng.integers(0, CLASSES, (size[0] // 16, size[1] // 16)).repeat(16, 0).repeat(16, 1)
            image = colours[label] + rng.normal(0, 25, (*label.shape, 3))
            cv2.imwrite(str(root / "images" / split / f"{i}.png"), image.clip(0, 255).astype(np.uint8))
            if ignored:
                label = np.where(rng.random(label.shape) < rng.uniform(0, ignored), 255, label)
            cv2.imwrite(str(root / "labels" / split / f"{i}.png"), label.astype(np.uint8))
    return root


def write_teacher(path: Path) -> Path:
    """A random teacher as a weights file."""
    save_state_dict(get_segmentation_model(model="deeplab_mobile", backbone=TEACHER, num_class=CLASSES), path)
    return path


def train_arguments(data: Path, save: Path, *more: str) -> list[str]:
    """A tiny run on the CPU; ``more`` comes last and therefore wins."""
    return ["--dataset", "folder", "--data", str(data), "--student-model", "deeplab_mobile", "--student-backbone",
            STUDENT, "--crop-size", "64", "64", "--batch-size", "4", "--max-iterations", "6", "--workers", "0",
            "--log-iter", "1", "--save-per-iters", "3", "--val-per-iters", "3", "--no-cuda", "--no-tensorboard",
            "--save-dir", str(save), "--log-dir", str(save / "logs"), *more]


def four_steps(data: Path, save: Path, *more: str) -> list[str]:
    """A tiny plain run of four steps that validates, and therefore saves, after the second and the fourth."""
    return train_arguments(data, save, "--method", "none", "--max-iterations", "4", "--save-per-iters", "100",
                           "--val-per-iters", "2", *more)


def distil_arguments(teacher: Path, *more: str) -> list[str]:
    """Af-DCD from the teacher of :func:`write_teacher`, with a contrast that fits 8x8 maps."""
    return ["--teacher-model", "deeplab_mobile", "--teacher-backbone", TEACHER, "--teacher-pretrained", str(teacher),
            "--lambda-fd", "1e-5", "--lambda-ctr", "0.005", "--pool-size", "2", *more]


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, state and log of two runs are the same to the last bit."""
    for suffix in ("", "_best_model", "_state"):
        one, two = (torch.load(save / f"{STEM}{suffix}.pth", weights_only=True) for save in (a, b))
        for content in (one, two):
            content.pop("config", None)  # the folders differ
        assert_same(one, two, suffix)
    for kind in ("train", "val"):
        assert without_times(records(a, kind)) == without_times(records(b, kind))


def launch(program: str, arguments: list[str], processes: int = 2) -> subprocess.CompletedProcess:
    """Run a program of the repository under ``torchrun`` with gloo on this machine."""
    return run_together(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), program,
                         *arguments])


def launch_forked(program: str, arguments: list[str], processes: int = 2) -> subprocess.CompletedProcess:
    """The same without torchrun, in half the time, where the launcher is not what is tested (``group.py``)."""
    return run_together([str(ROOT / "tests/programs/group.py"), str(processes), program, *arguments])


def run_together(words: list[str]) -> subprocess.CompletedProcess:
    """Run Python with these words; after 300 seconds, kill it and the processes that it has started."""
    command = [sys.executable, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as running:
        try:
            output, error = running.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, running.returncode, output, error)


def records(save: Path, kind: str = "train") -> list[dict]:
    """The JSON lines of one kind that a run wrote."""
    (path,) = (save / "logs").glob("*.jsonl")
    return [r for r in map(json.loads, path.read_text().splitlines()) if r["kind"] == kind]


def without_times(found: list[dict]) -> list[dict]:
    """Records without what another run of the same cannot have."""
    return [{k: v for k, v in r.items() if k not in TIMES} for r in found]


def assert_same(a, b, where: str = "") -> None:
    """Bit for bit, through dicts, lists and tensors, but for the times in a training state."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - (TIMES if where.endswith(".window") else ()):
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


def run_here(capsys, main, *arguments: object, prog: str = "program") -> subprocess.CompletedProcess:
    """A program run in this process: its exit code and what it wrote."""
    try:
        code = run_main(main, [*map(str, arguments)], prog=prog)
    except SystemExit as stop:
        code = stop.code
    return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())


def assert_refused(capsys, main, argv: list[str], *words: str) -> None:
    """The program exits with code 2 and exactly one line on stderr that holds all of ``words``."""
    done = run_here(capsys, main, *argv)
    code, error = done.returncode, done.stderr
    assert code == 2, (code, error)
    assert len(error.strip().splitlines()) == 1, error
    for word in words:
        assert word in error, (word, error)
