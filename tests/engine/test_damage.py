"""Damaged and odd files that a run is given: the state before is taken, or one line says what is wrong."""
from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import CLASSES, STEM, STUDENT, assert_refused, assert_same_run, four_steps, train_arguments

import eval as evaluation
import train_kd
from dataset import get_dataset_spec
from engine.build import build_student
from engine.log import LOG
from engine.settings import parse_settings
from models import read_info


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
        assert_refused(capsys, train_kd.main, argv, f"{STEM}_state.pth", f"{STEM}_state_previous.pth", "starts anew")

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


class TestData:
    """What a run was trained on stands in its files, and is compared."""

    @pytest.fixture
    def changed(self, few_images, tmp_path) -> Path:
        """The data set with another pixel, an image less, and two classes in each other's place."""
        data = Path(shutil.copytree(few_images, tmp_path / "set"))
        image = cv2.imread(str(data / "images/train/0.png"))
        image[0, 0, 0] ^= 1
        cv2.imwrite(str(data / "images/train/0.png"), image)
        for kind in ("images", "labels"):
            (data / kind / "val/1.png").unlink()
        return data

    def swap(self, data: Path) -> None:
        """Two classes in each other's place."""
        names = [f"class{i}" for i in (1, 0, *range(2, CLASSES))]
        (data / "classes.txt").write_text("\n".join(names))

    def test_state_and_weights_name_classes_and_data(self, whole_run) -> None:
        said = content(whole_run, "_state")["net_info"]["trained_on"]
        assert said["classes"] == [f"class{i}" for i in range(CLASSES)] and said["dataset"] == "folder"
        assert said["splits"]["train"]["images"] == 4 and said["splits"]["val"]["images"] == 2
        for suffix in ("", "_best_model"):
            assert read_info(whole_run / f"{STEM}{suffix}.pth")["trained_on"] == said

    def test_a_resumed_run_tells_what_changed_in_one_line(self, changed, copied, capsys) -> None:
        self.swap(changed)
        assert train_kd.main(four_steps(changed, copied, "--resume", "auto")) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "other data" in line]
        assert ("--resume: other data: class 0: class0 -> class1 (2 classes differ); train: other pixels or labels (in "
                "the 4 images that are compared); val: 2 -> 1 images") in line

    def test_the_same_data_elsewhere_are_no_change(self, few_images, copied, tmp_path, capsys) -> None:
        shutil.copytree(few_images, tmp_path / "same")
        assert train_kd.main(four_steps(tmp_path / "same", copied, "--resume", "auto")) == 0
        assert "other data" not in capsys.readouterr().out

    def test_permuted_classes_are_refused(self, changed, whole_run, tmp_path, capsys) -> None:
        self.swap(changed)
        weights = tmp_path / "student.pth"
        for suffix in ("", ".json"):
            shutil.copy(whole_run / f"{STEM}.pth{suffix}", f"{weights}{suffix}")
        asked = ["--dataset", "folder", "--data", str(changed), "--workers", "0", "--no-cuda", "--pretrained"]
        expected = (f"{weights}: trained for these classes in another order (class 0 is 'class0' there and 'class1' "
                    "here, 1 is")
        assert_refused(capsys, evaluation.main, [*asked, str(weights)], expected)
        assert_refused(capsys, evaluation.main, [*asked, str(whole_run / f"{STEM}_state.pth"), "--model",
                                                 "deeplab_mobile", "--backbone", STUDENT], "_state.pth: trained for")
        as_teacher = ["--teacher-pretrained", str(weights), "--lambda-fd", "1e-5", "--pool-size", "2"]
        assert_refused(capsys, train_kd.main, train_arguments(changed, tmp_path / "new", *as_teacher), expected)
        Path(f"{weights}.json").unlink()  # a file that nobody knows anything of
        assert evaluation.main([*asked, str(weights), "--model", "deeplab_mobile", "--backbone", STUDENT]) == 0

    def test_a_student_may_start_from_them(self, changed, whole_run, tmp_path, monkeypatch) -> None:
        self.swap(changed)
        start, said = str(whole_run / f"{STEM}.pth"), []
        settings = parse_settings(four_steps(changed, tmp_path / "new", "--student-pretrained", start))
        monkeypatch.setattr(LOG, "warning", lambda text, *values: said.append(text % values))
        build_student(settings, get_dataset_spec("folder", changed))
        assert len(said) == 1 and f"--student-pretrained {start}: trained for these classes in another order" in said[0]

    def test_a_split_without_a_labeled_pixel_is_refused(self, few_images, tmp_path, capsys) -> None:
        data = Path(shutil.copytree(few_images, tmp_path / "set"))
        for path in (data / "labels/val").iterdir():
            cv2.imwrite(str(path), np.full((128, 128), 255, np.uint8))
        assert_refused(capsys, train_kd.main, four_steps(data, tmp_path / "new"), f"{data}/labels/val: every pixel of "
                       "the 2 labels of split 'val' is ignored")
