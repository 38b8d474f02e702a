"""Programs with several processes end cleanly: nothing of gloo outlives the process group.

``tests/programs/count_exits.py`` counts the exits of many runs on a busy machine.
"""
from __future__ import annotations

import sys

import pytest
from helpers import (
    ROOT,
    TEACHER,
    distil_arguments,
    launch,
    train_arguments,
    write_folder_dataset,
    write_teacher,
)

PROGRAMS = ROOT / "tests" / "programs"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the names of threads in /proc")


def end_of(program: str, arguments: list[str]) -> None:
    done = launch(str(PROGRAMS / "threads_at_end.py"), [str(ROOT / program), *arguments])
    assert done.returncode == 0, done.stderr[-3000:]


def test_distillation_leaves_no_thread(tmp_path) -> None:
    data, teacher = write_folder_dataset(tmp_path / "set"), write_teacher(tmp_path / "teacher.pth")
    method = distil_arguments(teacher, "--max-iterations", "2")
    end_of("train_kd.py", train_arguments(data, tmp_path / "run", *method))
    assert not list(tmp_path.rglob("*.lock")), "the main process gives its locks back"


def test_evaluation_leaves_no_thread(tmp_path) -> None:
    data, weights = write_folder_dataset(tmp_path / "set"), write_teacher(tmp_path / "weights.pth")
    end_of("eval.py", ["--dataset", "folder", "--data", str(data), "--model", "deeplab_mobile", "--backbone", TEACHER,
                       "--pretrained", str(weights), "--no-cuda", "--workers", "0"])


def test_queues_leave_no_thread(tmp_path) -> None:
    end_of("tests/programs/cirkd_queues.py", [str(tmp_path / "out.pt")])


def test_batch_norm_leaves_no_thread() -> None:
    end_of("tests/programs/batch_norm.py", [])
