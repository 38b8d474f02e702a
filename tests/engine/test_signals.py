"""A run that is asked to stop: it saves within a step, says how to go on, and the continuation is the whole run."""
from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import (
    ROOT,
    STEM,
    assert_same_run,
    distil_arguments,
    launch_forked,
    train_arguments,
    write_folder_dataset,
    write_teacher,
)

import engine.signals
import losses.stages.tokens
import train_kd
from utils.cli import run_main


@pytest.fixture(scope="module")
def method(tmp_path_factory) -> list[str]:
    """Data, and Af-DCD for four steps with one state, the last."""
    base = tmp_path_factory.mktemp("base")
    return [*train_arguments(write_folder_dataset(base / "set"), base, *distil_arguments(
        write_teacher(base / "teacher.pth"))), "--max-iterations", "4", "--save-per-iters", "100", "--val-per-iters",
        "2", "--workers", "1"]


def arguments(method: list[str], save: Path, *more: str) -> list[str]:
    return [*method, "--save-dir", str(save), "--log-dir", str(save / "logs"), *more]


@pytest.fixture(scope="module")
def whole(method, tmp_path_factory) -> Path:
    """The folder of a run that nobody has stopped."""
    save = tmp_path_factory.mktemp("whole")
    assert train_kd.main(arguments(method, save)) == 0
    return save


def state_of(save: Path) -> dict:
    return torch.load(save / f"{STEM}_state.pth", weights_only=True)


def signaled(monkeypatch, number: signal.Signals, at: int) -> None:
    """In the step after so many, the run gets a signal, and so do its loading processes, from another process."""
    train_batch = train_kd.train_batch

    def during(run, batch):
        if run.step == at:
            names = [str(child.pid) for child in multiprocessing.active_children()]
            assert names, "there are loading processes"
            subprocess.run(["kill", f"-{number.value}", *names, str(os.getpid())], check=True)
        return train_batch(run, batch)

    monkeypatch.setattr(train_kd, "train_batch", during)


@pytest.mark.parametrize(("number", "at", "code"), [
    (signal.SIGUSR1, 1, 75), (signal.SIGINT, 2, 130), (signal.SIGTERM, 3, 75)])
def test_a_stopped_run_saves_and_goes_on_to_the_same_end(method, whole, tmp_path, capsys, monkeypatch, number, at,
                                                         code) -> None:
    with monkeypatch.context() as patch:
        signaled(patch, number, at)
        assert run_main(train_kd.main, arguments(method, tmp_path)) == code
    said = capsys.readouterr().out
    line = f"stopped by {number.name} after step {at + 1}, which is saved: the same command with --resume auto goes on"
    assert said.count(line) == 1 and said.strip().splitlines()[-1].endswith(f"{line} from it")
    assert state_of(tmp_path)["step"] == at + 1
    assert not [*tmp_path.rglob("*.lock"), *tmp_path.rglob("*.tmp")]
    assert signal.getsignal(number) is not None and "_hear" not in str(signal.getsignal(number))
    assert train_kd.main(arguments(method, tmp_path, "--resume", "auto")) == 0
    assert_same_run(tmp_path, whole)


def test_the_second_ctrl_c_ends_at_once(method, tmp_path, capfd, monkeypatch) -> None:
    monkeypatch.setattr(engine.signals, "ECHO", 0.0)
    monkeypatch.setattr(train_kd, "train_batch", lambda run, batch: [signal.raise_signal(signal.SIGINT)] * 2
                        and signal.raise_signal(signal.SIGINT))
    assert run_main(train_kd.main, arguments(method, tmp_path), prog="program") == 130
    said = capfd.readouterr().err
    assert "once more ends at once" in said and said.endswith("program: interrupted\n")
    assert not [*tmp_path.glob("*.pth"), *tmp_path.rglob("*.lock")]


def test_an_echo_of_a_signal_does_not_count(method, tmp_path, monkeypatch) -> None:
    """Launchers send once more what a terminal has sent to all."""
    train_batch = train_kd.train_batch

    def twice(run, batch):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return train_batch(run, batch)

    monkeypatch.setattr(engine.signals, "ECHO", 1e9)
    monkeypatch.setattr(train_kd, "train_batch", twice)
    assert train_kd.main(arguments(method, tmp_path)) == 130
    assert state_of(tmp_path)["step"] == 1


def test_outside_of_its_steps_a_run_ends_at_once(method, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(train_kd, "build_run", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        train_kd.main(arguments(method, tmp_path, "--resume", "auto"))
    assert stop.value.code == 75
    assert ("stopped by SIGTERM outside of its steps: the same command goes on from the last training state, if there "
            "is one") in capsys.readouterr().out


def test_a_run_that_has_not_begun_does_not_point_to_an_earlier_one(method, tmp_path, capsys, monkeypatch) -> None:
    """The state in the folder is that of the run before."""
    assert train_kd.main(arguments(method, tmp_path)) == 0
    capsys.readouterr()
    monkeypatch.setattr(train_kd, "build_run", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        train_kd.main(arguments(method, tmp_path))
    said = capsys.readouterr().out
    assert stop.value.code == 75 and "--resume" not in said
    assert "before it has begun: the same command starts it" in said


def test_a_signal_at_the_very_end_leaves_a_finished_run(method, tmp_path, monkeypatch) -> None:
    save_state = train_kd.save_state

    def last(run):
        save_state(run)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train_kd, "save_state", lambda run: last(run) if run.step == 4 else save_state(run))
        assert train_kd.main(arguments(method, tmp_path)) == 0
    assert state_of(tmp_path)["step"] == 4


def test_a_stage_before_training_saves_too(method, tmp_path, capsys, monkeypatch) -> None:
    argv = arguments(method, tmp_path, "--method", "maskd", "--maskd-steps", "4", "--maskd-batch-size", "2",
                     "--maskd-tokens", "2", "--max-iterations", "1", "--skip-val")
    learn, signaled = losses.stages.tokens.TokenState.learn, []

    def during(state, images, target, done):
        if done == 1 and not signaled:
            signaled.append(signal.raise_signal(signal.SIGTERM))
        return learn(state, images, target, done)

    monkeypatch.setattr(losses.stages.tokens.TokenState, "learn", during)
    with pytest.raises(SystemExit) as stop:
        train_kd.main(argv)
    said = capsys.readouterr().out
    assert stop.value.code == 75 and "maskd: masks of step 2 in" in said and "stopped by SIGTERM outside of its" in said
    assert train_kd.main([*argv, "--resume", "auto"]) == 0
    said = capsys.readouterr().out
    assert "maskd: masks of step 2 from" in said and state_of(tmp_path)["step"] == 1


def test_processes_stop_after_the_same_step(method, tmp_path) -> None:
    """Three: their sums depend on the order of what is added."""
    folders = [str(tmp_path / name) for name in ("whole", "stopped")]
    done = launch_forked(str(ROOT / "tests" / "programs" / "stop_together.py"), [
        *folders, *method, "--workers", "0", "--max-iterations", "3", "--val-per-iters", "3", "--batch-size",
        "6"], 3)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(*map(Path, folders))
