"""The cache: the same items, filled once by whoever comes first, never half-written, never stale."""
from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from reference import tiny_data
from torch.utils.data import DataLoader

from dataset import SegmentationDataset, TrainSampler, cache, collate, get_dataset_spec, store, worker_init
from dataset.cache import use_cache
from utils.errors import UserError
from utils.files import readable_size

CROP = (48, 64)


def split(root: Path, name: str = "camvid", part: str = "train", **options) -> SegmentationDataset:
    return SegmentationDataset(get_dataset_spec(name, root), root, part, train=part == "train", crop_size=CROP,
                               **options)


def cached(root: Path, folder: Path, *args, log=lambda text: None, **options) -> SegmentationDataset:
    data = split(root, *args, **options)
    use_cache([data], folder, log)
    return data


def same(first: SegmentationDataset, second: SegmentationDataset) -> bool:
    keys = [*range(len(first)), *((n % len(first), n) for n in range(20) if first.train)]
    return all(torch.equal(first[key][name], second[key][name]) for key in keys for name in ("image", "label", "valid"))


def damage(data: SegmentationDataset, index: int = 0, at: int = 100) -> None:
    """Flip a bit of a picture in the file."""
    position = int(data.cache.rows[index]["offset"]) + at
    with open(data.cache.store.pixels, "rb+") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Names of the images that are decoded from now on."""
    names, plain = [], cache.decode_pair

    def noted(sample, *files):
        names.append(sample.name)
        return plain(sample, *files)

    monkeypatch.setattr(cache, "decode_pair", noted)
    return names


@pytest.fixture
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def many(tmp_path) -> Path:
    """Twenty images of two sizes."""
    for number in range(20):
        size = (60, 80) if number % 2 else (45, 50)
        for place, shape in (("train", (*size, 3)), ("trainannot", size)):
            (tmp_path / place).mkdir(exist_ok=True)
            picture = np.random.default_rng(number).integers(0, 12, shape, dtype=np.uint8)
            cv2.imwrite(str(tmp_path / place / f"{number:02d}.png"), picture)
    return tmp_path


class TestItems:
    """What a dataset with a cache returns"""

    @pytest.mark.parametrize("kind", sorted(tiny_data.IDS))
    @pytest.mark.parametrize("part", ["train", "val"])
    def test_are_the_same(self, tmp_path, folder, kind, part):
        tiny_data.write(str(tmp_path), kind)
        plain, first, second = split(tmp_path, kind, part), *(cached(tmp_path, folder, kind, part) for _ in range(2))
        assert same(plain, first) and same(plain, second)
        assert first.digest() == plain.digest()

    def test_nothing_is_decoded_again(self, camvid_root, folder, decoded):
        cached(camvid_root, folder)
        assert sorted(decoded) == ["a", "b"]
        same(cached(camvid_root, folder), cached(camvid_root, folder))
        assert len(decoded) == 2

    def test_splits_without_labels(self, tmp_path, folder):
        tiny_data.write(str(tmp_path), "citys")
        (tmp_path / "leftImg8bit/val").rename(tmp_path / "leftImg8bit/test")
        assert same(split(tmp_path, "citys", "test"), cached(tmp_path, folder, "citys", "test"))

    def test_of_workers_are_the_same(self, camvid_root, folder):
        batches = []
        for data in (split(camvid_root), cached(camvid_root, folder)):
            loader = DataLoader(data, batch_sampler=TrainSampler(2, batch_size=4, steps=3), num_workers=2,
                                collate_fn=collate, worker_init_fn=worker_init)
            batches.append(list(loader))
        assert all(torch.equal(a[key], b[key]) for a, b in zip(*batches, strict=True) for key in ("image", "label"))

    def test_survive_pickling(self, camvid_root, folder):
        data = cached(camvid_root, folder)
        assert same(pickle.loads(pickle.dumps(data)), split(camvid_root))

    def test_label_values_that_the_set_does_not_have(self, camvid_root, folder):
        path = camvid_root / "trainannot" / "b.png"
        label = np.array(Image.open(path))
        label[3, 4], label[30, 30] = 77, 40
        Image.fromarray(label).save(path)
        expected = r"trainannot/b.png: label value 77; CamVid expects 0..11"
        for data in (split(camvid_root), cached(camvid_root, folder)):
            data[0]
            with pytest.raises(UserError, match=expected):
                data[1, 3]

    def test_a_broken_image_is_named_before_training(self, camvid_root, folder):
        (camvid_root / "train" / "b.png").write_bytes(b"\x89PNG no")
        with pytest.raises(UserError, match="b.png: truncated image"):
            cached(camvid_root, folder)

    def test_no_file_is_opened_per_image_or_worker(self, many, folder):
        data = cached(many, folder)
        gc.collect()  # what earlier tests have left
        before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        for _ in range(2):
            loader = DataLoader(data, batch_sampler=TrainSampler(20, batch_size=4, steps=10), num_workers=2,
                                collate_fn=collate)
            assert sum(len(batch["name"]) for batch in loader) == 40
        del loader
        gc.collect()  # the pipes to its workers
        assert before >= (len(os.listdir("/proc/self/fd")) if before else 0)


class TestFiles:
    """Which files count as the cached ones"""

    def test_a_changed_image_or_label_is_noticed(self, camvid_root, folder, decoded):
        cached(camvid_root, folder)
        for place, name in (("train", "a"), ("trainannot", "b")):
            path, size = camvid_root / place / f"{name}.png", (60, 80) if name == "a" else (45, 50)
            cv2.imwrite(str(path), np.full((*size, 3) if place == "train" else size, 7, np.uint8))
            decoded.clear()
            assert same(cached(camvid_root, folder), split(camvid_root))
            assert decoded == [name]

    def test_a_run_keeps_the_pictures_that_it_began_with(self, camvid_root, folder):
        before = cached(camvid_root, folder)
        image = before[0]["image"].clone()
        cv2.imwrite(str(camvid_root / "train" / "a.png"), np.full((60, 80, 3), 7, np.uint8))
        assert not torch.equal(cached(camvid_root, folder)[0]["image"], image)
        assert torch.equal(before[0]["image"], image) and torch.equal(cached(camvid_root, folder)[0]["image"][:, 0, 0],
                                                                      torch.full((3,), 7, dtype=torch.uint8))

    def test_a_copy_elsewhere_and_later_takes_no_space(self, camvid_root, folder, tmp_path_factory, decoded):
        cached(camvid_root, folder)
        other = tmp_path_factory.mktemp("elsewhere") / "copy"
        shutil.copytree(camvid_root, other, copy_function=shutil.copyfile)
        size, said = (folder / "camvid_train.pixels").stat().st_size, []
        assert same(cached(other, folder, log=said.append), split(camvid_root))
        assert (folder / "camvid_train.pixels").stat().st_size == size and len(decoded) == 2
        assert "2 of 2 images of train: 0.0 MB" in said[0]
        said.clear()
        assert same(cached(other, folder, log=said.append), cached(camvid_root, folder, log=said.append)) and not said

    def test_only_what_is_new_is_added(self, many, folder, decoded):
        cached(many, folder, limit=5)
        cached(many, folder, limit=8)
        assert sorted(decoded) == [f"{n:02d}" for n in range(8)]

    def test_jpeg_depends_on_the_decoder_and_png_does_not(self, camvid_root, folder, decoded, monkeypatch):
        path = camvid_root / "train" / "a.png"
        path.write_bytes(cv2.imencode(".jpg", cv2.imread(str(path)))[1].tobytes())
        assert same(cached(camvid_root, folder), split(camvid_root))
        decoded.clear()
        monkeypatch.setattr(cv2, "__version__", "0.0")
        cached(camvid_root, folder)
        assert decoded == ["a"]

    def test_a_file_that_changes_meanwhile(self, camvid_root, folder, monkeypatch):
        plain = cache._announcement

        def later(*args) -> str:
            os.utime(camvid_root / "train" / "b.png", ns=(0, 0))
            return plain(*args)

        monkeypatch.setattr(cache, "_announcement", later)
        with pytest.raises(UserError, match="train/b.png: changed while it was read; start again"):
            cached(camvid_root, folder)


class TestDamage:
    """Bytes that are not what they were"""

    @pytest.mark.parametrize("at", ["image", "label"])
    def test_a_damaged_picture_is_mended(self, camvid_root, folder, at):
        damage(cached(camvid_root, folder), at=100 if at == "image" else 3 * 60 * 80 + 5)
        data, plain = cached(camvid_root, folder), split(camvid_root)
        with pytest.warns(UserWarning, match="camvid_train.pixels: the picture of .*a.png is damaged; decoded again"):
            assert torch.equal(data[0]["image"], plain[0]["image"])
        assert torch.equal(data[0]["label"], plain[0]["label"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert same(data, plain) and same(cached(camvid_root, folder), plain)

    def test_damaged_and_changed(self, camvid_root, folder):
        data = cached(camvid_root, folder)
        damage(data)
        cv2.imwrite(str(camvid_root / "train" / "a.png"), np.full((60, 80, 3), 7, np.uint8))
        with pytest.raises(UserError, match="a.png is damaged, and the file has changed since; start again"):
            data[0]

    def test_damaged_and_not_writable(self, camvid_root, folder, monkeypatch):
        data = cached(camvid_root, folder)
        damage(data)
        monkeypatch.setattr(store.os, "pwrite", no_space)
        with pytest.raises(UserError, match="a.png is damaged and cannot be written again: No space left"):
            data[0]

    @pytest.mark.parametrize("how", ["a byte", "cut off", "empty", "removed", "of other pixels"])
    def test_a_damaged_index_costs_decoding(self, camvid_root, folder, decoded, how):
        cached(camvid_root, folder)
        index = folder / "camvid_train.index"
        text = index.read_bytes()
        if how == "removed":
            index.unlink()
        elif how == "of other pixels":
            (folder / "camvid_train.pixels").unlink()
        else:
            index.write_bytes({"a byte": text.replace(b'"offset": 64', b'"offset": 65'), "cut off": text[:-9],
                               "empty": b""}[how])
        decoded.clear()
        assert same(cached(camvid_root, folder), split(camvid_root))
        assert len(decoded) == {"a byte": 1, "cut off": 1}.get(how, 2)
        decoded.clear()
        cached(camvid_root, folder)
        assert not decoded

    def test_pixels_that_were_cut_off(self, camvid_root, folder, decoded):
        cached(camvid_root, folder)
        os.truncate(folder / "camvid_train.pixels", 64 + 100)
        decoded.clear()
        assert same(cached(camvid_root, folder, limit=1), split(camvid_root, limit=1)) and decoded == ["a"]
        with pytest.warns(UserWarning, match="b.png is damaged; decoded again"):  # it has its place, but not its bytes
            assert same(cached(camvid_root, folder), split(camvid_root))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert same(cached(camvid_root, folder), split(camvid_root))


def no_space(*args):
    raise OSError(28, "No space left on device")


class TestFolder:
    """Folders and disks that do not fit: one line"""

    def test_the_size_is_told_beforehand(self, camvid_root, folder):
        said = []
        train, val = split(camvid_root), split(camvid_root, part="val")
        use_cache([train, val], folder, lambda text: said.append((text, sorted(os.listdir(folder)))))
        (text, files), = said
        size = 2 * 4 * (60 * 80 + 45 * 50) / 1e6
        assert f"decoding 2 of 2 images of train, 2 of 2 images of val: {size:.1f} MB (" in text and not files
        said.clear()
        use_cache([train, val], folder, said.append)
        assert not said
        assert readable_size(29_180_000_000) == "29.2 GB"

    def test_no_room(self, camvid_root, folder, monkeypatch, decoded):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 20_000))
        with pytest.raises(UserError, match=r"the decoded images need 0.0 MB, but 0.0 MB are free; expected a folder"):
            cached(camvid_root, folder)
        assert not decoded

    def test_the_disk_fills_up(self, camvid_root, folder, monkeypatch):
        cached(camvid_root, folder, limit=1)
        monkeypatch.setattr(store.os, "pwrite", no_space)
        with pytest.raises(UserError, match=f"{folder}: cannot be used as a cache: No space left on device"):
            cached(camvid_root, folder)
        monkeypatch.undo()
        assert same(cached(camvid_root, folder), split(camvid_root))

    def test_a_file_in_place_of_the_folder(self, camvid_root, folder):
        (folder / "file").write_text("")
        for path, why in ((folder / "file", "a file; expected a folder"),
                          (folder / "file" / "below", ".* cannot be used as a cache: Not a directory")):
            with pytest.raises(UserError, match=f"{path}.*{why}"):
                cached(camvid_root, path)

    def test_a_lock_that_cannot_be_had_and_is_not_needed_to_read(self, camvid_root, folder):
        """As in a folder that somebody else filled and that may only be read."""
        cached(camvid_root, folder, limit=1)
        (folder / "camvid.lock").unlink()
        (folder / "camvid.lock").mkdir()
        assert same(cached(camvid_root, folder, limit=1), split(camvid_root, limit=1))
        with pytest.raises(UserError, match="camvid.lock: cannot be used as a cache: Is a directory"):
            cached(camvid_root, folder)

    def test_one_split_twice(self, many, folder, decoded):
        """As with --selection-split train."""
        first, second = split(many), split(many)
        use_cache([first, second], folder)
        assert len(decoded) == 20 and same(first, second) and same(first, split(many))

    def test_something_else_of_that_name(self, camvid_root, folder):
        (folder / "camvid_train.pixels").write_bytes(b"precious" * 20)
        with pytest.raises(UserError, match="camvid_train.pixels: not a file of the cache"):
            cached(camvid_root, folder)
        assert (folder / "camvid_train.pixels").read_bytes() == b"precious" * 20

    def test_a_system_without_file_locks(self, camvid_root, folder, monkeypatch):
        monkeypatch.setattr(cache, "fcntl", None)
        with pytest.raises(UserError, match="needs Linux or macOS") as error:
            cached(camvid_root, folder)
        assert error.value.settings == ("cache",)

    def test_replaced_while_in_use(self, camvid_root, folder):
        data = cached(camvid_root, folder)
        shutil.rmtree(folder)
        cached(camvid_root, folder)
        assert same(data, split(camvid_root))
        with pytest.raises(UserError, match="replaced or removed while in use; start again"):
            pickle.loads(pickle.dumps(data))


class TestProcesses:
    """Several at once, and one that is killed"""

    def test_killed_half_way_and_started_again(self, many, folder, decoded, monkeypatch):
        monkeypatch.setattr(cache, "available_cpus", lambda: 2)

        def fill() -> None:
            plain, calls = os.pwrite, []

            def half(file, pixels, offset):
                calls.append(offset)
                if len(calls) > 8:  # the head of the file and seven pictures are written
                    plain(file, pixels[:len(pixels) // 2], offset)
                    os.kill(os.getpid(), signal.SIGKILL)
                return plain(file, pixels, offset)

            store.os.pwrite = half
            cached(many, folder)

        process = multiprocessing.get_context("fork").Process(target=fill)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        data = cached(many, folder)
        # at most seven pictures are complete: the lines of some may not have been written
        assert 13 <= len(decoded) < 20
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert same(data, split(many))

    def test_many_at_once(self, many, folder):
        """Each finds all images, and every image is decoded once."""
        context = multiprocessing.get_context("fork")
        start, counts = context.Barrier(4), context.Queue()

        def fill() -> None:
            plain, names = cache.decode_pair, []

            def slow(sample, *files):
                names.append(sample.name)
                time.sleep(0.01)
                return plain(sample, *files)

            cache.decode_pair = slow
            data, said = split(many), []
            start.wait()
            use_cache([data], folder, said.append)
            counts.put((len(names), same(data, split(many)), [text for text in said if "waiting" in text]))

        processes = [context.Process(target=fill) for _ in range(4)]
        for process in processes:
            process.start()
        results = [counts.get(timeout=60) for _ in processes]
        for process in processes:
            process.join()
        assert sorted(count for count, *_ in results) == [0, 0, 0, 20]
        assert all(right for _, right, _ in results)
        assert sum(len(waited) for *_, waited in results) == 3

    def test_a_checksum_is_compared_once_for_all_workers(self, camvid_root, folder, monkeypatch):
        data = cached(camvid_root, folder)
        context = multiprocessing.get_context("fork")
        process = context.Process(target=lambda: [data[0], data[1]])
        process.start()
        process.join()
        monkeypatch.setattr(cache, "zlib", None)
        assert same(data, split(camvid_root))
