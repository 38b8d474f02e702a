"""Damaged and odd files that a run is given: the state before is taken, or one line says what is wrong."""
from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers import STEM, assert_refused, assert_same_run, four_steps

import train_kd


@pytest.fixture
def copied(whole_run, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    shutil.copytree(whole_run, tmp_path / "run")
    return tmp_path / "run"


def content(save: Path, suffix: str) -> dict:
    return torch.load(save / f"{STEM}{suffix}.pth", weights_only=True)


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 4
    path.write_bytes(changed)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


class TestStates:
    def test_the_state_before_is_kept(self, whole_run) -> None:
        assert content(whole_run, "_state")["step"] == 4 and content(whole_run, "_state_previous")["step"] == 2

    @pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
    def test_a_damaged_state_leaves_the_one_before_it(self, few_images, whole_run, copied, capsys, damage) -> None:
        damage(copied / f"{STEM}_state.pth")
        assert train_kd.main(four_steps(few_images, copied, "--resume", "auto")) == 0
        said = capsys.readouterr().out
        assert "_state_previous.pth at step 2" in said
        assert (damage is Path.unlink) == (": going on from the one before it" not in said)
        assert_same_run(copied, whole_run)
        assert content(copied, "_state_previous")["step"] == 2, "the damaged one does not take its place"

    def test_two_damaged_states_are_an_error(self, few_images, copied, capsys) -> None:
        for path in copied.glob("*_state*.pth"):
            flip(path)
        argv = four_steps(few_images, copied, "--resume", "auto")
        assert_refused(capsys, train_kd.main, argv, f"{STEM}_state.pth", "damaged")

    def test_a_damaged_state_that_was_named_is_an_error(self, few_images, copied, tmp_path, capsys) -> None:
        flip(copied / f"{STEM}_state.pth")
        argv = four_steps(few_images, tmp_path / "new", "--resume", str(copied / f"{STEM}_state.pth"))
        assert_refused(capsys, train_kd.main, argv, f"{STEM}_state.pth", "damaged")

    def test_the_state_before_by_name_leaves_the_newest_alone(self, few_images, copied) -> None:
        """Asked for by its name, not since the newest is damaged."""
        argv = four_steps(few_images, copied, "--resume", str(copied / f"{STEM}_state_previous.pth"))
        assert train_kd.main(argv) == 0
        assert not (copied / f"{STEM}_state_damaged.pth").exists()

    def test_half_written_files_of_a_killed_run_are_removed(self, few_images, copied, capsys) -> None:
        left = [copied / f".{STEM}_state.pth.12345.tmp", copied / f".{STEM}.pth.json.12345.tmp"]
        for path in left:
            path.write_bytes(b"half")
        assert train_kd.main(four_steps(few_images, copied, "--resume", "auto")) == 0
        assert "removed 2 half-written files of a killed run" in capsys.readouterr().out
        assert not any(path.exists() for path in left)

    def test_a_state_beyond_the_end_is_an_error(self, few_images, copied, capsys) -> None:
        argv = four_steps(few_images, copied, "--resume", "auto", "--max-iterations", "3")
        assert_refused(capsys, train_kd.main, argv, f"{STEM}_state.pth", "is at step 4", "--max-iterations 3")
        assert content(copied, "_state")["step"] == 4

    @pytest.mark.parametrize("choice", ["auto", "named"])
    def test_a_folder_is_no_state(self, few_images, tmp_path, capsys, choice) -> None:
        folder = tmp_path / f"{STEM}_state.pth"
        folder.mkdir()
        argv = four_steps(few_images, tmp_path, "--resume", "auto" if choice == "auto" else str(folder))
        assert_refused(capsys, train_kd.main, argv, f"--resume {folder}: this is a folder")
        assert list(tmp_path.iterdir()) == [folder]

    def test_weights_of_a_state_that_no_network_can_have(self, few_images, whole_run, tmp_path, capsys) -> None:
        state = content(whole_run, "_state")
        name = next(name for name in state["model"] if name.endswith("running_var"))
        state["model"][name] = -state["model"][name]
        torch.save(state, tmp_path / "odd_state.pth")
        argv = four_steps(few_images, tmp_path, "--resume", str(tmp_path / "odd_state.pth"))
        assert_refused(capsys, train_kd.main, argv, "odd_state.pth", name, "negative variances")
