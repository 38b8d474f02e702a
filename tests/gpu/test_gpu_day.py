"""``tools/gpu_day.sh``: parts one after another, a summary, and an exit code; its parts run without images on disk."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers import ROOT


def gpu_day(folder: Path, parts: str) -> tuple[subprocess.CompletedProcess, dict[str, dict]]:
    """The finished script and {part: its entry of the summary}."""
    environment = {**os.environ, "SHORT": "1", "PARTS": parts, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", str(ROOT / "tools" / "gpu_day.sh"), str(folder)], env=environment,
                          capture_output=True, text=True)
    return done, {entry["part"]: entry for entry in json.loads((folder / "summary.json").read_text())}


def test_parts_leave_their_files(tmp_path) -> None:
    done, summary = gpu_day(tmp_path, "report check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [entry["status"] for entry in summary.values()] == ["passed", "passed"]
    assert json.loads((tmp_path / "report.json").read_text())["packages"]["cv2"] is True
    checks = json.loads((tmp_path / "check.json").read_text())
    assert checks["failed"] == 0 and checks["results"]["check_fast_against_plain[afdcd]"] == "passed"


def test_a_part_that_fails_does_not_stop_the_others(tmp_path) -> None:
    done, summary = gpu_day(tmp_path, "lunch report")
    assert done.returncode == 1
    assert (summary["lunch"]["status"], summary["lunch"]["code"]) == ("failed", 2)
    assert summary["report"]["status"] == "passed" and (tmp_path / "report.json").is_file()
    assert "unknown part lunch" in done.stdout


def test_what_is_not_installed_fails_only_when_it_is_used() -> None:
    program = ("import importlib.util; real = importlib.util.find_spec\n"
               "importlib.util.find_spec = lambda name, *rest: None if name == 'cv2' else real(name, *rest)\n"
               "import tools.absent, cv2; from cv2 import imread\n"
               "print(tools.absent.MISSING, cv2.IMREAD_COLOR is not None); imread('x')")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "('cv2',) True"
    assert "cv2 is not installed, and cv2.imread was needed" in done.stderr
