"""tools/smoke_methods.py keeps finished runs, and no others."""
from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools import smoke_methods
from utils.errors import UserError


@pytest.fixture
def calls(monkeypatch):
    """Folders of the runs that were started; each leaves the records of a whole run."""
    started = []

    def run(command, **more):
        folder = Path(command[command.index("--save-dir") + 1])
        steps = int(command[command.index("--max-iterations") + 1])
        records = [{"kind": "train", "weighted": {"kd": float(steps - i)}, "raw": {"task": 1.0}} for i in range(steps)]
        records.append({"kind": "val", "step": steps, "mIoU": 0.25})
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        started.append(folder)
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr(smoke_methods.subprocess, "run", run)
    return started


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "teacher.pth").write_bytes(b"one")
    return smoke_methods.Settings(data="streets", teacher_pretrained=str(tmp_path / "teacher.pth"), steps=10,
                                  out=str(tmp_path / "out"))


def test_a_finished_run_is_kept(calls, settings):
    first = smoke_methods.result("kd", settings)
    assert smoke_methods.result("kd", settings) == first and len(calls) == 1
    assert smoke_methods.row("kd", first) == "| kd | 10 | 1 | 1.000 | 25.0 |"


def test_a_run_of_other_settings_is_refused(calls, settings):
    smoke_methods.result("kd", settings)
    with pytest.raises(UserError, match="holds a run of other settings"):
        smoke_methods.result("kd", replace(settings, steps=20))
    Path(settings.teacher_pretrained).write_bytes(b"two")
    with pytest.raises(UserError, match="of another teacher"):
        smoke_methods.result("kd", settings)
    assert len(calls) == 1


def test_plain_training_does_not_depend_on_the_teacher(calls, settings):
    smoke_methods.result("none", settings)
    Path(settings.teacher_pretrained).unlink()
    assert smoke_methods.result("none", settings) and len(calls) == 1


def test_what_an_interrupted_run_has_logged_does_not_count(calls, settings):
    folder = Path(settings.out) / "kd"
    folder.mkdir(parents=True)
    earlier = folder / "another_network.jsonl"
    earlier.write_text(json.dumps({"kind": "train", "weighted": {"kd": 99.0}, "raw": {"task": 1.0}}) + "\n")
    os.utime(earlier, (0, 0))
    assert len(smoke_methods.result("kd", settings)) == 11
