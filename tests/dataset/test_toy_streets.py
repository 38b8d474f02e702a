"""Toy streets: the painter, the folder that the writer leaves, and its command line."""
from __future__ import annotations

import errno
import json
import os
import resource
from multiprocessing import active_children
from multiprocessing.context import SpawnProcess

import cv2
import numpy as np
import pytest
from helpers import run_here

from dataset import SegmentationDataset, get_dataset_spec
from dataset.toy_streets import labels, paint_scene, toy_street, write_toy_streets
from dataset.toy_streets.__main__ import PROG, main
from dataset.toy_streets.world import sample_noise
from dataset.toy_streets.writer import DESCRIPTION
from utils.cli import run_main
from utils.errors import UserError

SMALL = {"train": 3, "val": 1, "test": 2, "height": 48, "width": 64}
COUNTS = {"train": 3, "val": 1, "test": 2}


@pytest.fixture(scope="module")
def streets():
    return [toy_street(0, "train", index, 120, 160) for index in range(32)]


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "streets"
    assert write_toy_streets(folder, **SMALL)
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class TestPainter:
    """What one scene is."""

    @pytest.mark.parametrize("size", [(120, 160), (90, 131), (32, 32)])
    def test_shapes_and_types(self, size):
        image, label = paint_scene(np.random.default_rng(3), *size)
        assert image.shape == (*size, 3) and image.dtype == np.uint8
        assert label.shape == size and label.dtype == np.uint8

    @pytest.mark.parametrize("count", [0, 1, 1024, 40000])
    def test_noise_for_any_number_of_points(self, count):
        """OpenCV refuses empty maps and long rows; a view without any grass asks for no point at all."""
        x = np.linspace(-900, 900, count, dtype=np.float32)
        noise = sample_noise(x, x)
        assert noise.shape == (count,)
        if count:
            assert np.array_equal(noise[:5], sample_noise(x[None, :5], x[None, :5])[0])

    def test_too_small(self):
        with pytest.raises(ValueError, match="at least 32 x 32 pixels, got 31 x 64"):
            paint_scene(np.random.default_rng(0), 31, 64)

    def test_same_seed_same_pixels(self):
        first, second = (toy_street(5, "val", 7, 72, 96) for _ in range(2))
        assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])

    def test_seed_split_and_index_matter(self):
        labels_ = [toy_street(*key, 48, 64)[1] for key in
                   ((0, "train", 0), (0, "train", 1), (1, "train", 0), (0, "val", 0), (0, "test", 0))]
        assert all((a != b).mean() > 0.05 for i, a in enumerate(labels_) for b in labels_[:i])

    def test_only_known_labels(self, streets):
        assert set(np.unique([label for _, label in streets])) == set(range(labels.NUM_CLASS + 1))

    def test_every_class_is_frequent(self, streets):
        stacked = np.stack([label for _, label in streets])
        share = np.bincount(stacked.ravel(), minlength=12) / stacked.size
        present = [(stacked == k).any(axis=(1, 2)).mean() for k in range(labels.NUM_CLASS)]
        assert min(present) >= 0.4, present
        assert share[:labels.NUM_CLASS].min() >= 0.002, share
        assert share[labels.ROAD] < 0.45 and share[labels.VOID] < 0.06

    def test_sky_above_road(self, streets):
        rows = np.arange(120)[:, None] * np.ones((1, 160))
        for _, label in streets:
            assert rows[label == labels.SKY].mean() < 55 < rows[label == labels.ROAD].mean()

    def test_color_alone_does_not_tell_the_class(self, streets):
        """The best guess from the (coarse) color of a pixel stays far from solving the task."""
        codes = [(image // 32).astype(np.int64) @ np.array([64, 8, 1]) for image, _ in streets]
        counts = np.zeros((512, 12))
        for code, (_, label) in zip(codes[:24], streets[:24], strict=True):
            np.add.at(counts, (code.ravel(), label.ravel()), 1)
        guess = counts.argmax(axis=1)
        unseen = zip(codes[24:], streets[24:], strict=True)
        assert 0.25 < np.mean([(guess[code] == label).mean() for code, (_, label) in unseen]) < 0.75

    def test_labels_follow_the_picture(self, streets):
        """Color steps are much larger across a border of labels than inside a class."""
        across, inside = [], []
        for image, label in streets:
            step = np.abs(np.diff(image.astype(np.int64), axis=1)).sum(axis=2)
            border = np.diff(label.astype(np.int64), axis=1) != 0
            across.append(step[border].mean())
            inside.append(step[~border].mean())
        assert np.mean(across) > 2 * np.mean(inside)

    def test_larger_pictures_show_the_same_kind_of_street(self):
        image, label = toy_street(0, "train", 2, 240, 320)
        assert len(np.unique(label)) >= 8 and image.std() > 15

    def test_label_ids_are_those_of_the_spec(self):
        names = [c.split("/")[0].upper() for c in get_dataset_spec("toy_streets").classes]
        assert [getattr(labels, name) for name in names] == list(range(labels.NUM_CLASS))


class TestWriter:
    """What lies in the folder, and when it is left alone."""

    def test_layout(self, root):
        assert sorted(p.name for p in root.iterdir()) == sorted(
            [DESCRIPTION, *COUNTS, *(f"{split}annot" for split in COUNTS)])
        for split, count in COUNTS.items():
            names = sorted(p.name for p in (root / split).iterdir())
            assert len(names) == count and names == sorted(p.name for p in (root / f"{split}annot").iterdir())
        assert os.listdir(root.parent) == ["streets"]

    def test_files_hold_the_scenes(self, root):
        image, label = toy_street(0, "test", 1, 48, 64)
        assert np.array_equal(cv2.imread(str(root / "test" / "test_00001.png")), image)
        stored = cv2.imread(str(root / "testannot" / "test_00001.png"), cv2.IMREAD_UNCHANGED)
        assert stored.ndim == 2 and np.array_equal(stored, label)

    def test_scenes_do_not_depend_on_how_many_there_are(self, root, tmp_path):
        write_toy_streets(tmp_path / "fewer", **{**SMALL, "train": 1, "test": 1})
        fewer, more = contents(tmp_path / "fewer"), contents(root)
        assert all(more[name] == data for name, data in fewer.items() if name != DESCRIPTION)

    def test_twice_changes_nothing(self, root):
        before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
        assert not write_toy_streets(root, **SMALL)
        assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before

    def test_other_parameters_are_refused(self, root):
        before = contents(root)
        with pytest.raises(UserError, match=r"train 3, not 2; seed 0, not 9.*--overwrite"):
            write_toy_streets(root, **{**SMALL, "train": 2, "seed": 9})
        assert contents(root) == before

    def test_points_label_the_training_scenes_only_there(self, root, tmp_path):
        write_toy_streets(tmp_path / "points", **SMALL, points=40)
        exact, clicked = contents(root), contents(tmp_path / "points")
        for name in exact.keys() - {DESCRIPTION}:
            if not name.startswith("trainannot"):
                assert clicked[name] == exact[name]
                continue
            label, few = (cv2.imread(str(place / name), cv2.IMREAD_UNCHANGED) for place in (root, tmp_path / "points"))
            kept = few != 11
            assert 30 <= kept.sum() <= 40 and (few[kept] == label[kept]).all()
        with pytest.raises(UserError, match="points None, not 40"):
            write_toy_streets(root, **SMALL, points=40)

    def test_overwrite(self, root):
        before = contents(root)
        assert write_toy_streets(root, **{**SMALL, "train": 1, "seed": 9}, overwrite=True)
        assert len(list((root / "train").iterdir())) == 1
        assert contents(root)["val/val_00000.png"] != before["val/val_00000.png"]
        assert os.listdir(root.parent) == ["streets"]

    def test_lost_files_are_noticed(self, root):
        (root / "valannot" / "val_00000.png").unlink()
        with pytest.raises(UserError, match="files are missing.*--overwrite"):
            write_toy_streets(root, **SMALL)
        assert write_toy_streets(root, **SMALL, overwrite=True)

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_foreign_folder_is_never_touched(self, tmp_path, overwrite):
        (tmp_path / "train").mkdir()
        (tmp_path / "train" / "mine.png").write_bytes(b"precious")
        (tmp_path / DESCRIPTION).write_text(json.dumps({"dataset": "else"}))
        before = contents(tmp_path)
        with pytest.raises(UserError, match="holds no toy streets"):
            write_toy_streets(tmp_path, **SMALL, overwrite=overwrite)
        assert contents(tmp_path) == before

    def test_interrupted_run_leaves_nothing(self, tmp_path, monkeypatch):
        def stop(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr("dataset.toy_streets.writer.toy_street", stop)
        with pytest.raises(KeyboardInterrupt):
            write_toy_streets(tmp_path / "streets", **SMALL)
        assert os.listdir(tmp_path) == []

    def test_read_back_as_a_data_set(self, root):
        spec = get_dataset_spec("toy_streets")
        data = SegmentationDataset(spec, root, "val", train=False)
        label = toy_street(0, "val", 0, 48, 64)[1].astype(np.int64)
        assert len(data) == 1 and data[0]["name"] == "val_00000"
        assert np.array_equal(data[0]["label"].numpy(), np.where(label == labels.VOID, -1, label))
        train = SegmentationDataset(spec, root, "train", train=True)
        assert tuple(train[0, 5]["image"].shape) == (3, *spec.train_crop)


class TestProcesses:
    """Painting in several processes: the same files, and nothing left behind when one fails."""

    @pytest.fixture(autouse=True)
    def pool_for_few_scenes(self, monkeypatch):
        monkeypatch.setattr("dataset.toy_streets.writer._PROCESS_SCENES", 1)

    def test_files_do_not_depend_on_them(self, root, tmp_path, monkeypatch):
        here = []
        monkeypatch.setattr("dataset.toy_streets.writer.toy_street", lambda *scene: here.append(scene))
        assert write_toy_streets(tmp_path / "two", **SMALL, workers=2)
        assert contents(tmp_path / "two") == contents(root)
        assert not here and not active_children() and sorted(os.listdir(tmp_path)) == ["streets", "two"]

    def test_few_scenes_are_painted_here(self, root, tmp_path, monkeypatch):
        monkeypatch.setattr("dataset.toy_streets.writer._PROCESS_SCENES", 4)
        monkeypatch.setattr("dataset.toy_streets.writer.ProcessPoolExecutor", None)
        assert write_toy_streets(tmp_path / "here", **SMALL, workers=64)
        assert contents(tmp_path / "here") == contents(root)

    def test_a_file_that_cannot_be_written(self, tmp_path):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))  # the processes inherit it
        try:
            with pytest.raises(UserError, match=r"streets: cannot be written \(File too large\); expected a folder"):
                write_toy_streets(tmp_path / "streets", **SMALL, workers=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert os.listdir(tmp_path) == [] and not active_children()

    @pytest.mark.parametrize("last, error, text", [
        (0, BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "Resource temporarily unavailable"),
        (1, BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "Resource temporarily unavailable"),
        (9, RuntimeError("can't start new thread"), "can't start new thread")])
    def test_processes_that_cannot_be_started(self, tmp_path, monkeypatch, last, error, text):
        """The first or second process, as under ulimit -u, or the thread that feeds them."""
        start, started = SpawnProcess.start, []

        def limited(process):
            if len(started) == last:
                raise error
            started.append(start(process))

        def no_thread(thread):
            raise error

        monkeypatch.setattr(SpawnProcess, "start", limited)
        if last == 9:
            monkeypatch.setattr("concurrent.futures.process._ExecutorManagerThread.start", no_thread)
        with pytest.raises(UserError, match=f"^--workers 2: .* cannot be started .{text}.; --workers 1"):
            write_toy_streets(tmp_path / "streets", **SMALL, workers=2)
        for child in active_children():
            child.join(20)
        assert os.listdir(tmp_path) == [] and not active_children()

    def test_a_pool_that_cannot_be_made(self, tmp_path, monkeypatch):
        def refuse(*args, **kwargs):
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr("dataset.toy_streets.writer.ProcessPoolExecutor", refuse)
        with pytest.raises(UserError, match="^--workers 2: .*Too many open files"):
            write_toy_streets(tmp_path / "streets", **SMALL, workers=2)
        assert os.listdir(tmp_path) == []

    def test_a_process_that_dies(self, tmp_path, monkeypatch):
        monkeypatch.setattr("dataset.toy_streets.writer._start_painter", os.abort)
        with pytest.raises(UserError, match="--workers 2: a painting process ended unexpectedly.*--workers 1"):
            write_toy_streets(tmp_path / "streets", **SMALL, workers=2)
        assert os.listdir(tmp_path) == [] and not active_children()

    def test_an_interruption(self, tmp_path, monkeypatch):
        def stop(tasks):
            assert len(tasks) == sum(COUNTS.values()) and len(active_children()) == 2
            raise KeyboardInterrupt

        monkeypatch.setattr("dataset.toy_streets.writer.as_completed", stop)
        with pytest.raises(KeyboardInterrupt):
            write_toy_streets(tmp_path / "streets", **SMALL, workers=2)
        assert os.listdir(tmp_path) == [] and not active_children()


class TestCommandLine:
    """`python -m dataset.toy_streets`."""

    ARGS = ["--train", "1", "--val", "1", "--test", "1", "--height", "32", "--width", "40", "--workers", "1"]

    def test_writes_then_has_nothing_to_do(self, tmp_path, capsys):
        for expected in ("wrote toy streets (1 train, 1 val, 1 test; 32 x 40, seed 0)", "nothing to do"):
            assert main(["--data", str(tmp_path / "a" / "b"), *self.ARGS]) == 0
            out, err = capsys.readouterr()
            assert expected in out and out.count("\n") == 1 and not err

    @pytest.mark.parametrize(("change", "message"), [
        (["--train", "0"], "--train 0: expected at least one scene"),
        (["--points", "-1"], "--points -1: expected 0 or more"),
        (["--width", "20"], "--width 20: expected at least 32 pixels"),
        (["--seed", "-1"], "--seed -1: expected 0 or more"),
        (["--workers", "0"], "argument --workers: expected a whole number of at least 1, got '0'"),
        (["--train", "many"], "argument --train: expected a whole number, got 'many'"),
    ])
    def test_bad_numbers(self, tmp_path, capsys, change, message):
        done = run_here(capsys, main, "--data", tmp_path / "new", *self.ARGS, *change, prog=PROG)
        assert done.returncode == 2 and done.stderr == f"{PROG}: error: {message}\n" and not done.stdout
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("below", ["", "/deeper"])
    def test_a_file_is_in_the_way(self, tmp_path, capsys, below):
        (tmp_path / "file").write_text("mine")
        assert run_main(main, ["--data", f"{tmp_path}/file{below}", *self.ARGS], prog=PROG) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"{PROG}: error: {tmp_path}/file") and "expected a" in err and err.count("\n") == 1
        assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"
