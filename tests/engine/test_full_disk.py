"""Disks that are full: logs go on without, saves are errors that leave what was there."""
from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from helpers import assert_refused, four_steps

import engine.checkpoint
import train_kd
from engine.log import LOG, RunLogger, setup_logging

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")


def test_records_wait_for_room(tmp_path, capsys) -> None:
    logger = RunLogger(tmp_path, "run", tensorboard=False)
    room = logger._file
    with open(FULL, "ab", buffering=0) as logger._file:
        logger.record("train", 1, loss=1.0)
        logger.record("train", 2, loss=2.0)
    logger._file = room
    logger.record("train", 3, loss=3.0)
    logger.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "run.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_a_state_is_never_ahead_of_the_log(few_images, tmp_path, monkeypatch) -> None:
    def waits(self, kind: str, step: int, **values) -> None:
        self._pending += json.dumps({"kind": kind, "step": step}).encode() + b"\n"

    def save_and_look(path, content, keep=None) -> None:
        log, = tmp_path.glob("**/*.jsonl")
        told.append((content["step"], max(json.loads(line)["step"] for line in log.read_text().splitlines())))
        save(path, content, keep)

    save, told = engine.checkpoint.save_tensors, []
    monkeypatch.setattr(RunLogger, "record", waits)
    monkeypatch.setattr(engine.checkpoint, "save_tensors", save_and_look)
    flags = ("--skip-val", "--save-per-iters", "2", "--log-iter", "1")
    assert train_kd.main(four_steps(few_images, tmp_path, *flags)) == 0
    assert told == [(2, 2), (4, 4)]


def test_a_text_log_that_is_full_is_told_once(capsys) -> None:
    setup_logging(True, FULL)
    try:
        LOG.info("one")
        LOG.info("two")
        said = capsys.readouterr()
        assert "one" in said.out and "two" in said.out and said.err.count("/dev/full: cannot be written") == 1
    finally:
        for handler in [h for h in LOG.handlers if isinstance(h, logging.FileHandler)]:
            LOG.removeHandler(handler)
            handler.stream = None
        setup_logging(True)


def test_tensorboard_that_fails_is_left_out(tmp_path, capsys) -> None:
    logger = RunLogger(tmp_path, "run")

    def full(*_, **__) -> None:
        raise OSError(28, "No space left on device")

    logger._board.add_scalar = full
    for step in (1, 2):
        logger.record("train", step, loss=1.0)
    logger.close()
    assert capsys.readouterr().err.count("_tensorboard: cannot be written") == 1
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == 2


def test_a_save_that_fails_names_its_file_and_the_state_that_is_good(few_images, tmp_path, capsys, monkeypatch) -> None:
    save, done = engine.checkpoint.save_tensors, []

    def full(path, content, keep=None):
        if done:
            path = FULL / "state.pth"  # below a device
        done.append(path)
        save(path, content, keep)

    monkeypatch.setattr(engine.checkpoint, "save_tensors", full)
    assert_refused(capsys, train_kd.main, four_steps(few_images, tmp_path, "--skip-val", "--save-per-iters", "2"),
                   "/dev/full", "cannot be written", "the last good state is", "step 2")
