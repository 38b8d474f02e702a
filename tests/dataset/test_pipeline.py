"""Augmentation, the ignore label, repeatability and loading in workers."""
from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from reference import tiny_data
from torch.utils.data import DataLoader

from dataset import EvalSampler, SegmentationDataset, TrainSampler, collate, get_dataset_spec, transforms, worker_init
from utils.errors import UserError

CROP = (48, 64)


def camvid(root: Path, split: str = "train", train: bool = True, **options) -> SegmentationDataset:
    return SegmentationDataset(get_dataset_spec("camvid"), root, split, train=train, crop_size=CROP, **options)


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(first[key], second[key]) for key in ("image", "label", "valid"))


class TestDraw:
    """draw_augmentation"""

    def test_distribution(self):
        rng = np.random.default_rng(0)
        drawn = [transforms.draw_augmentation(rng, (60, 80), CROP) for _ in range(8000)]
        scales, counts = np.unique([how.scale for how in drawn], return_counts=True)
        assert scales.tolist() == [0.5 + k / 10.0 for k in range(16)]
        assert abs(counts / 500 - 1).max() < 0.2
        assert abs(np.mean([how.mirrored for how in drawn]) - 0.5) < 0.03
        whole = [how for how in drawn if how.scale == 1.0]
        assert {how.offset[0] for how in whole} == set(range(13))
        assert {how.offset[1] for how in whole} == set(range(17))
        assert all(how.offset == (0, 0) for how in drawn if how.scale <= 0.8)

    def test_switched_off(self):
        rng = np.random.default_rng(0)
        drawn = [transforms.draw_augmentation(rng, CROP, CROP, scale=False, mirror=False) for _ in range(20)]
        assert set(drawn) == {transforms.Augmentation(1.0, (0, 0), False)}

    @pytest.mark.parametrize("size", [(45, 50), (1024, 2048), (333, 501), (35, 35)])
    def test_scaled_size_is_that_of_opencv(self, size):
        for scale in transforms.SCALES:
            resized = cv2.resize(np.zeros(size, np.uint8), None, fx=scale, fy=scale)
            assert transforms.scaled_size(size, scale) == resized.shape


class TestTransforms:
    """crop, pad, valid_rectangle"""

    @pytest.mark.parametrize("mirrored", [False, True])
    def test_against_pad_then_crop_then_mirror(self, mirrored):
        image = np.random.default_rng(0).integers(1, 256, (30, 90, 3), dtype=np.uint8)
        padded = np.zeros((48, 90, 3), np.uint8)
        padded[:30] = image
        want = padded[0:48, 7:71]
        part = transforms.crop(image, (0, 7), CROP, mirrored)
        got = transforms.pad(part, CROP, 0, mirrored)
        assert np.array_equal(got, want[:, ::-1] if mirrored else want)
        assert transforms.valid_rectangle(part.shape[:2], CROP, mirrored) == (0, 30, 0, 64)

    def test_mirror_moves_the_border_to_the_left(self):
        part = np.ones((48, 50), np.int16)
        padded = transforms.pad(part, CROP, -1, True)
        assert transforms.valid_rectangle(part.shape, CROP, True) == (0, 48, 14, 64)
        assert (padded[:, :14] == -1).all() and (padded[:, 14:] == 1).all()

    def test_mapping_after_cropping_equals_mapping_first(self):
        """Nearest neighbors commute with a table lookup, so that only the crop has to be mapped."""
        label = np.random.default_rng(1).integers(0, 256, (45, 50), dtype=np.uint8)
        table = get_dataset_spec("citys").id_to_train
        scaled = transforms.scale_pair(np.zeros((45, 50, 3), np.uint8), label, 1.3)[1]
        first = transforms.scale_pair(np.zeros((45, 50, 3), np.uint8), table[label], 1.3)[1]
        assert np.array_equal(table[scaled], first)


class TestTrainingItem:
    """ds[index, ordinal]"""

    def test_is_a_function_of_seed_and_ordinal(self, camvid_root):
        data = camvid(camvid_root, seed=3)
        assert same(data[0, 7], camvid(camvid_root, seed=3)[0, 7])
        assert sum(not same(data[0, 7], data[0, ordinal]) for ordinal in range(10)) == 9
        assert not same(data[0, 7], camvid(camvid_root, seed=4)[0, 7])

    def test_global_generators_are_left_alone(self, camvid_root):
        data = camvid(camvid_root)
        np.random.seed(0)
        torch.manual_seed(0)
        before = np.random.get_state()[1].copy(), torch.get_rng_state()
        data[0, 1]
        assert np.array_equal(before[0], np.random.get_state()[1]) and torch.equal(before[1], torch.get_rng_state())

    def test_outside_of_valid_is_zero_and_ignored(self, camvid_root):
        data = camvid(camvid_root, ignore_label=250)
        padded = mirrored = 0
        for ordinal in range(60):
            item = data[1, ordinal]
            top, bottom, left, right = item["valid"].tolist()
            assert item["image"].shape == (3, *CROP) and item["label"].shape == CROP
            outside = torch.ones(CROP, dtype=torch.bool)
            outside[top:bottom, left:right] = False
            assert (item["image"][:, outside] == 0).all() and (item["label"][outside] == 250).all()
            padded += bool(outside.any())
            mirrored += left > 0
        assert padded > 10 and mirrored > 3

    def test_needs_a_training_set(self, camvid_root):
        with pytest.raises(TypeError):
            camvid(camvid_root, train=False)[0, 0]

    def test_int_gives_the_whole_image_even_in_training(self, camvid_root):
        assert same(camvid(camvid_root)[0], camvid(camvid_root, train=False)[0])
        assert camvid(camvid_root)[0]["valid"].tolist() == [0, 60, 0, 80]


class TestIgnoreLabel:
    """One rule for every data set: what the table ignores and what is padded becomes `ignore_label`."""

    @pytest.mark.parametrize("kind", sorted(tiny_data.IDS))
    def test_only_the_ignored_pixels_change(self, tmp_path, kind):
        tiny_data.write(str(tmp_path), kind)
        spec = get_dataset_spec(kind)
        options = {"train": True, "crop_size": CROP}
        plain = SegmentationDataset(spec, tmp_path, "train", **options)
        other = SegmentationDataset(spec, tmp_path, "train", ignore_label=255, **options)
        keys = [0, 1, *((index, ordinal) for index in (0, 1) for ordinal in range(8))]
        for label, changed in ((plain[key]["label"], other[key]["label"]) for key in keys):
            assert label.min() >= -1 and label.max() < spec.num_class
            assert torch.equal(changed, torch.where(label == -1, 255, label))
        assert (other[0]["label"] == 255).any() or (other[1]["label"] == 255).any()
        assert any((other[key]["label"] == 255).any() for key in keys[2:])

    def test_unknown_cityscapes_ids_are_ignored(self, tmp_path):
        tiny_data.write(str(tmp_path), "citys")
        path = next(tmp_path.glob("gtFine/val/*/*0a_000019_gtFine_labelIds.png"))
        Image.fromarray(np.arange(4800, dtype=np.int64).reshape(60, 80).astype(np.uint8)).save(path)
        label = SegmentationDataset(get_dataset_spec("citys"), tmp_path, "val", train=False)[0]["label"]
        assert sorted(label.unique().tolist()) == list(range(-1, 19))
        assert (label.flatten()[34:256] == -1).all()

    @pytest.mark.parametrize("value", [0, 10, 2**15, -2**15])
    def test_out_of_range(self, camvid_root, value):
        with pytest.raises(UserError, match=f"ignore label {value};"):
            camvid(camvid_root, ignore_label=value)


def test_voc_labels_are_read_by_index_gray_or_palette(tmp_path):
    tiny_data.write(str(tmp_path), "voc")
    data = SegmentationDataset(get_dataset_spec("voc"), tmp_path, "train", train=False)
    before = data[0]["label"]
    palette = Image.fromarray(tiny_data.label("voc", "train", "a")).convert("P")
    palette.putpalette([(37 * value) % 256 for value in range(768)])
    palette.save(data.samples[0].label)
    assert Image.open(data.samples[0].label).mode == "P"
    assert torch.equal(data[0]["label"], before)


def test_split_without_labels_is_all_ignored(tmp_path):
    tiny_data.write(str(tmp_path), "citys")
    (tmp_path / "leftImg8bit/val").rename(tmp_path / "leftImg8bit/test")
    data = SegmentationDataset(get_dataset_spec("citys"), tmp_path, "test", train=False)
    assert data[0]["name"] == "town_00000a_000019_leftImg8bit"
    assert (data[0]["label"] == -1).all() and data[0]["label"].shape == (60, 80)
    with pytest.raises(UserError, match="split 'test' of Cityscapes has no labels; expected one of train, val"):
        SegmentationDataset(get_dataset_spec("citys"), tmp_path, "test", train=True)


def test_limit(camvid_root):
    assert [s.name for s in camvid(camvid_root, limit=1).samples] == ["a"]
    assert len(camvid(camvid_root, limit=5)) == 2
    with pytest.raises(UserError, match="limit 0"):
        camvid(camvid_root, limit=0)


class TestLoading:
    """DataLoader, workers, collate"""

    @staticmethod
    def batches(data: SegmentationDataset, workers: int) -> list[dict]:
        sampler = TrainSampler(len(data), batch_size=4, steps=3, seed=1)
        loader = DataLoader(data, batch_sampler=sampler, num_workers=workers, collate_fn=collate,
                            worker_init_fn=worker_init)
        return list(loader)

    def test_same_batches_with_and_without_workers(self, camvid_root):
        plain, workers = (self.batches(camvid(camvid_root), count) for count in (0, 2))
        assert len(plain) == len(workers) == 3
        for first, second in zip(plain, workers, strict=True):
            assert same(first, second) and first["name"] == second["name"]
            assert first["image"].shape == (4, 3, *CROP) and first["valid"].shape == (4, 4)
            assert first["index"].dtype == torch.int64 and torch.equal(first["index"], second["index"])

    def test_dataset_survives_pickling(self, camvid_root):
        data = camvid(camvid_root)
        assert same(pickle.loads(pickle.dumps(data))[1, 5], data[1, 5])

    def test_evaluation_one_by_one(self, camvid_root):
        data = camvid(camvid_root, "val", train=False)
        loader = DataLoader(data, batch_size=1, sampler=EvalSampler(len(data)), collate_fn=collate)
        assert [(batch["name"], tuple(batch["label"].shape)) for batch in loader] == [
            (["a"], (1, 60, 80)), (["b"], (1, 45, 50))]

    def test_different_sizes_do_not_fit_into_one_batch(self, camvid_root):
        data = camvid(camvid_root, "val", train=False)
        with pytest.raises(UserError, match="batch size 1"):
            collate([data[0], data[1]])

    def test_opencv_threads_are_only_switched_off_by_worker_init(self):
        code = ("import cv2; before = cv2.getNumThreads(); import dataset; "
                "assert cv2.getNumThreads() == before; dataset.worker_init(0); assert cv2.getNumThreads() == 1")
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
