"""The order of samples depends on seed and step only."""
from __future__ import annotations

import pickle
from collections import Counter

import pytest

from dataset import EvalSampler, TrainSampler
from utils.errors import UserError

LENGTH, BATCH, STEPS = 7, 6, 9
MODES = ["reference", "epoch"]


def batches(**options) -> list[list[tuple[int, int]]]:
    return list(TrainSampler(LENGTH, **{"batch_size": BATCH, "steps": STEPS, "seed": 5, **options}))


@pytest.mark.parametrize("mode", MODES)
class TestTrainSampler:
    """What holds in both modes."""

    def test_ordinals_count_through_the_run(self, mode):
        got = batches(mode=mode)
        assert [ordinal for batch in got for _, ordinal in batch] == list(range(BATCH * STEPS))
        assert {index for batch in got for index, _ in batch} == set(range(LENGTH))

    @pytest.mark.parametrize("world", [2, 3, 6])
    def test_ranks_share_the_global_batch_in_order(self, mode, world):
        parts = [batches(mode=mode, rank=rank, world_size=world) for rank in range(world)]
        assert [sum(step, []) for step in zip(*parts, strict=True)] == batches(mode=mode)

    @pytest.mark.parametrize("start", [0, 1, 4, 9, 12])
    def test_a_resumed_run_continues(self, mode, start):
        sampler = TrainSampler(LENGTH, batch_size=BATCH, steps=STEPS, seed=5, mode=mode, start_step=start)
        assert list(sampler) == batches(mode=mode)[start:]
        assert len(sampler) == max(STEPS - start, 0)

    def test_seed(self, mode):
        assert batches(mode=mode) == batches(mode=mode)
        assert batches(mode=mode) != batches(mode=mode, seed=6)

    def test_can_be_iterated_again_and_pickled(self, mode):
        sampler = TrainSampler(LENGTH, batch_size=BATCH, steps=STEPS, seed=5, mode=mode, rank=1, world_size=2)
        first = list(sampler)
        assert list(sampler) == first and list(pickle.loads(pickle.dumps(sampler))) == first


def test_reference_mode_shuffles_the_repeated_list_cut_to_the_run():
    drawn = Counter(index for batch in batches() for index, _ in batch)
    assert drawn == Counter((list(range(LENGTH)) * 8)[:BATCH * STEPS])
    flat = [index for batch in batches() for index, _ in batch]
    assert any(len(set(flat[first:first + LENGTH])) < LENGTH for first in range(0, len(flat), LENGTH))


def test_reference_mode_when_the_run_is_shorter_than_the_list():
    drawn = [index for batch in TrainSampler(100, batch_size=5, steps=3, seed=0) for index, _ in batch]
    assert sorted(drawn) == list(range(15))


def test_epoch_mode_is_balanced():
    flat = [index for batch in batches(mode="epoch") for index, _ in batch]
    epochs = [flat[first:first + LENGTH] for first in range(0, len(flat), LENGTH)]
    assert all(sorted(epoch) == list(range(LENGTH)) for epoch in epochs[:-1])
    assert len(set(epochs[-1])) == len(epochs[-1])
    assert len({tuple(epoch) for epoch in epochs[:-1]}) > 1


def test_epoch_mode_does_not_depend_on_the_length_of_the_run():
    assert batches(mode="epoch", steps=4) == batches(mode="epoch")[:4]


@pytest.mark.parametrize("options, expected", [
    ({"batch_size": 16, "world_size": 3}, "batch size 16 with 3 processes; expected a multiple of 3"),
    ({"mode": "random"}, "expected one of reference, epoch"), ({"rank": 2, "world_size": 2}, "rank 2"),
    ({"seed": -1}, "seed -1"), ({"batch_size": 0}, "batch size 0"), ({"steps": -1}, "steps -1"),
    ({"world_size": 0}, "world size 0"),
])
def test_bad_arguments(options, expected):
    with pytest.raises(UserError, match=expected):
        batches(**options)


def test_empty_data_set():
    with pytest.raises(UserError, match="number of images 0"):
        TrainSampler(0, batch_size=1, steps=1)


@pytest.mark.parametrize("length, world", [(7, 1), (7, 3), (2, 4), (8, 4)])
def test_evaluation_covers_every_index_once(length, world):
    parts = [EvalSampler(length, rank, world) for rank in range(world)]
    assert sorted(index for part in parts for index in part) == list(range(length))
    assert [len(part) for part in parts] == [len(list(part)) for part in parts]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_evaluation_rank_out_of_range():
    with pytest.raises(UserError, match="rank 3 of 3"):
        EvalSampler(5, 3, 3)
