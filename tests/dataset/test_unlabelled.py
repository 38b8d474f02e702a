"""Images without labels beside labeled ones: which come when, and what their items hold."""
from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers import write_folder_dataset

from dataset import (
    UNLABELED_STREAM,
    MixedDataset,
    MixedSampler,
    SegmentationDataset,
    TrainSampler,
    get_dataset_spec,
    unlabeled_images,
)
from utils.errors import UserError

LABELED, UNLABELED, STEPS = 7, 5, 6
OPTIONS = {"crop_size": (48, 48), "seed": 3}


def mixed(parts: int = 1, start: int = 0, rank: int = 0, world: int = 1, mode: str = "reference") -> MixedSampler:
    """Eight labeled images and four without labels in a step."""
    options = {"steps": STEPS, "seed": 5, "start_step": start, "rank": rank, "world_size": world, "mode": mode}
    return MixedSampler(TrainSampler(LABELED, batch_size=8, **options),
                        TrainSampler(UNLABELED, batch_size=4, stream=UNLABELED_STREAM, **options), parts)


@pytest.mark.parametrize("mode", ["reference", "epoch"])
class TestOrder:
    def test_the_labeled_images_come_as_without_the_others(self, mode) -> None:
        found = [[key for key in batch if key[0] < LABELED] for batch in mixed(mode=mode)]
        assert found == list(TrainSampler(LABELED, batch_size=8, steps=STEPS, seed=5, mode=mode))
        rest = [key for batch in mixed(mode=mode) for key in batch if key[0] >= LABELED]
        assert len(rest) == 4 * STEPS and {index for index, _ in rest} == set(range(LABELED, LABELED + UNLABELED))
        assert len({ordinal for batch in mixed(mode=mode) for _, ordinal in batch}) == 12 * STEPS

    def test_processes_share_the_batch(self, mode) -> None:
        parts = [list(mixed(rank=rank, world=2, mode=mode)) for rank in range(2)]
        for whole, halves in zip(mixed(mode=mode), zip(*parts, strict=True), strict=True):
            assert sorted(sum(halves, [])) == sorted(whole)
            assert [[index < LABELED for index, _ in half] for half in halves] == [[True] * 4 + [False] * 2] * 2

    def test_a_resumed_run_continues(self, mode) -> None:
        sampler = mixed(start=4, mode=mode)
        assert list(sampler) == list(mixed(mode=mode))[4:] and len(sampler) == STEPS - 4

    def test_every_part_of_a_step_has_its_share(self, mode) -> None:
        for whole, batch in zip(mixed(mode=mode), mixed(parts=2, mode=mode), strict=True):
            assert batch == [*whole[:4], *whole[8:10], *whole[4:8], *whole[10:]]

    def test_the_other_images_have_an_order_of_their_own(self, mode) -> None:
        orders = [[index for batch in TrainSampler(9, batch_size=3, steps=9, seed=5, mode=mode, **more)
                   for index, _ in batch] for more in ({}, {"stream": UNLABELED_STREAM})]
        assert orders[0] != orders[1]


@pytest.fixture
def sets(tmp_path) -> tuple[SegmentationDataset, SegmentationDataset]:
    """A labeled set, and the same images without labels, some in a folder of their own."""
    root = write_folder_dataset(tmp_path / "set", train=4, val=1)
    shutil.copytree(root / "images/train", tmp_path / "more")
    (tmp_path / "more/deeper").mkdir()
    (tmp_path / "more/3.png").rename(tmp_path / "more/deeper/9.png")
    (tmp_path / "more/notes.txt").touch()
    spec = get_dataset_spec("folder", root)
    return SegmentationDataset(spec, root, "train", train=True, **OPTIONS), \
        unlabeled_images(spec, tmp_path / "more", **OPTIONS)


@pytest.mark.parametrize("fast", [True, False])
def test_they_are_augmented_like_labeled_ones(sets, fast) -> None:
    labeled, others = sets
    others = unlabeled_images(labeled.spec, others.root, fast=fast, **OPTIONS)
    assert [Path(sample.image).name for sample in others.samples] == ["0.png", "1.png", "2.png", "9.png"]
    for ordinal in range(6):
        one, other = labeled[3, ordinal], others[3, ordinal]
        assert torch.equal(one["image"], other["image"]) and torch.equal(one["valid"], other["valid"])
        assert other["label"].shape == (48, 48) and (other["label"] == -1).all() and (one["label"] != -1).any()


def test_names_may_differ_in_their_ending_alone(sets) -> None:
    folder = Path(sets[1].root)
    (folder / "0.jpg").write_bytes((folder / "0.png").read_bytes())
    found = unlabeled_images(sets[0].spec, folder, **OPTIONS).samples
    assert [Path(sample.image).name for sample in found] == ["0.jpg", "0.png", "1.png", "2.png", "9.png"]


def test_one_set_of_both(sets) -> None:
    both = MixedDataset(*sets)
    assert len(both) == 8 and [sample.name for sample in both.samples] == [*"0123", *"0129"]
    assert both[2, 11]["index"] == 2 and torch.equal(both[2, 11]["label"], sets[0][2, 11]["label"])
    item = both[7, 11]
    assert (item["index"], item["name"]) == (7, "9") and torch.equal(item["image"], sets[1][3, 11]["image"])


def test_what_is_wrong_is_named(sets, tmp_path) -> None:
    spec, folder = sets[0].spec, Path(sets[1].root)
    (tmp_path / "empty").mkdir()
    for path, expected in ((tmp_path / "empty", r"empty/: no images \(\*.png, .*images without labels"),
                           (tmp_path / "none", "none: folder not found")):
        with pytest.raises(UserError, match=expected) as refused:
            unlabeled_images(spec, path, **OPTIONS)
        assert refused.value.settings == ("unlabelled",)
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:100])
    with pytest.raises(UserError, match="more/1.png: truncated image"):
        unlabeled_images(spec, folder, **OPTIONS)[1, 0]
