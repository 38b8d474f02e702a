"""Where a run keeps its files: folders without asking, and one place for all that an earlier run has left there."""
from __future__ import annotations

from pathlib import Path

import pytest

from engine.run_files import RunFiles
from engine.settings import Settings, parse_settings


def parsed(*words: str) -> Settings:
    return parse_settings(["--teacher-pretrained", "t.pth", *words])


@pytest.mark.parametrize(("words", "save", "log"), [
    ((), "runs/afdcd_deeplabv3-resnet101_deeplabv3-resnet18_citys", None),
    (("--method", "none", "--dataset", "voc"), "runs/plain_deeplabv3-resnet18_voc", None),
    (("--method", "lad"), "runs/lad_deeplabv3-resnet18_citys", None),
    (("--method", "none", "--name", "mine"), "runs/mine", None),
    (("--method", "none", "--save-dir", "here"), "here", None),
    (("--method", "none", "--name", "mine", "--log-dir", "logs"), "runs/mine", "logs")])
def test_the_folders_of_a_run(words, save, log) -> None:
    running = parsed(*words).running
    assert (running.save_dir, running.log_dir) == (save, log or save)


def files_of(folder: Path, log: Path | None = None) -> RunFiles:
    return RunFiles(parsed("--method", "none", "--save-dir", str(folder), *(["--log-dir", str(log)] if log else [])))


def leave(files: RunFiles) -> None:
    for path in (files.student, files.state, files.config, files.text_log, files.log_directory /
                 f"{files.log_name}.jsonl"):
        path.parent.mkdir(exist_ok=True)
        path.touch()


@pytest.mark.parametrize("log", [None, "logs"])
def test_an_earlier_run_goes_to_one_folder(tmp_path, log) -> None:
    save, logs = tmp_path / "run", tmp_path / (log or "run")
    files = files_of(save, logs)
    (save / "previous-1").mkdir(parents=True)
    for number in (2, 3):
        leave(files)
        files.set_aside()
        moved = {path.name for folder in {save, logs} for path in (folder / f"previous-{number}").iterdir()}
        assert moved == {files.student.name, files.state.name, files.config.name, files.text_log.name,
                         f"{files.log_name}.jsonl"}
        assert not [path for folder in {save, logs} for path in folder.iterdir() if path.is_file()]
    assert not (logs / "previous-4").exists()
    files.set_aside()  # nothing to move
    assert not (save / "previous-4").exists()


def test_a_log_of_an_earlier_version_keeps_its_name(tmp_path) -> None:
    (tmp_path / "none_none_deeplabv3-resnet18_citys.jsonl").touch()
    assert files_of(tmp_path).log_name == "none_none_deeplabv3-resnet18_citys"
    (tmp_path / "plain_deeplabv3-resnet18_citys.jsonl").touch()
    assert files_of(tmp_path).log_name == "plain_deeplabv3-resnet18_citys"
