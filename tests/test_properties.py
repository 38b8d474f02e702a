"""What holds for every input, tried on what hypothesis draws: sample order, metric, augmentation, checkpoints."""
from __future__ import annotations

from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same, write_folder_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dataset import EvalSampler, SegmentationDataset, TrainSampler, get_dataset_spec
from dataset.transforms import SCALES, Augmentation, draw_augmentation, scaled_crop
from dataset.window import windowed_crop
from utils.score import SegmentationMetric
from utils.tensor_files import in_plain_order, load_tensors, save_tensors

#: few and always the same, so that a failure comes again
few = settings(max_examples=20, deadline=None, derandomize=True, database=None,
               suppress_health_check=[HealthCheck.function_scoped_fixture])
#: images, share of a process, processes, steps, seed
runs = st.tuples(st.integers(1, 40), st.integers(1, 4), st.integers(1, 4), st.integers(1, 25), st.integers(0, 9))
modes = st.sampled_from(["reference", "epoch"])


def global_batches(run: tuple[int, ...], mode: str, world: int, start: int, stop: int) -> list[list[tuple[int, int]]]:
    """Steps start..stop of all processes together."""
    length, share, processes, steps, seed = run
    options = {"batch_size": share * processes, "steps": steps, "seed": seed, "start_step": start, "mode": mode}
    parts = [list(TrainSampler(length, rank=rank, world_size=world, **options)) for rank in range(world)]
    assert len({len(step) for part in parts for step in part}) <= 1, "every process has as many images"
    assert len({len(part) for part in parts}) == 1, "and as many steps"
    return [list(chain(*step)) for step in zip(*parts, strict=True)][:stop - start]


class TestSampler:
    @few
    @given(runs)
    def test_every_image_once_per_epoch(self, run) -> None:
        length, order = run[0], [index for step in global_batches(run, "epoch", 1, 0, run[3]) for index, _ in step]
        for first in range(0, len(order), length):
            epoch = order[first:first + length]
            assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(length))

    @few
    @given(runs, modes)
    def test_the_reference_repeats_the_list(self, run, mode) -> None:
        """No image is drawn more than once as often as another, over the whole run."""
        order = [index for step in global_batches(run, mode, 1, 0, run[3]) for index, _ in step]
        counts = np.bincount(order, minlength=run[0])
        assert counts.max() - counts.min() <= 1 and len(order) == run[1] * run[2] * run[3]

    @few
    @given(runs, modes, st.data())
    def test_one_two_and_one_processes_keep_the_order(self, run, mode, data) -> None:
        """A run that goes on with another number of processes, twice."""
        steps, worlds = run[3], [1, run[2], 1]
        cuts = sorted(data.draw(st.lists(st.integers(0, steps), min_size=2, max_size=2)))
        pieces = [global_batches(run, mode, world, *span)
                  for world, span in zip(worlds, pairwise([0, *cuts, steps]), strict=True)]
        assert list(chain(*pieces)) == global_batches(run, mode, 1, 0, steps)

    @few
    @given(st.integers(0, 60), st.integers(1, 9))
    def test_evaluation_takes_every_image_once(self, length, world) -> None:
        parts = [list(EvalSampler(length, rank, world)) for rank in range(world)]
        assert sorted(chain(*parts)) == list(range(length))


CLASSES = 4
labels = arrays(np.int16, st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
                elements=st.sampled_from([-1, 0, 1, 2, 3, 255]))


def literal(prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
    matrix = np.zeros((CLASSES, CLASSES), np.int64)
    for predicted, labeled in zip(prediction.ravel(), label.ravel(), strict=True):
        if labeled in range(CLASSES):
            matrix[labeled, predicted] += 1
    return matrix


class TestMetric:
    @few
    @given(labels, st.integers(0, 2**32 - 1))
    def test_the_confusion_matrix_is_that_of_a_loop(self, label, seed) -> None:
        logits = torch.randn((len(label), CLASSES, *label.shape[1:]), generator=torch.Generator().manual_seed(seed))
        metric = SegmentationMetric(CLASSES, ignore_label=255)
        metric.update(logits, torch.from_numpy(label))
        expected = literal(logits.argmax(1).numpy(), label)
        assert np.array_equal(metric.confusion().numpy(), expected)
        unions = expected.sum(0) + expected.sum(1) - expected.diagonal()
        ious = [i / u if u else 0.0 for i, u in zip(expected.diagonal(), unions, strict=True)]
        assert metric.result()["mIoU"] == pytest.approx(sum(ious) / CLASSES, abs=1e-12)

    @few
    @given(st.lists(labels, min_size=1, max_size=6), st.integers(1, 4), st.data())
    def test_counts_of_any_split_into_processes_add_up(self, batches, world, data) -> None:
        owners = [data.draw(st.integers(0, world - 1)) for _ in batches]
        rng, parts = np.random.default_rng(0), [SegmentationMetric(CLASSES, ignore_label=255) for _ in range(world)]
        whole = SegmentationMetric(CLASSES, ignore_label=255)
        for owner, label in zip(owners, batches, strict=True):
            prediction = rng.integers(0, CLASSES, label.shape)
            for metric in (whole, parts[owner]):
                metric.update(torch.from_numpy(prediction), torch.from_numpy(label))
        assert torch.equal(sum(part.confusion() for part in parts), whole.confusion())


sides = st.integers(17, 70)


@pytest.fixture(scope="module")
def train_set(tmp_path_factory) -> SegmentationDataset:
    root = write_folder_dataset(tmp_path_factory.mktemp("data") / "set", train=1, val=1, size=(32, 32))
    return SegmentationDataset(get_dataset_spec("folder", root), root, "train", train=True)


class TestAugmentation:
    """In an image of two halves, which the label tells apart."""

    @few
    @given(st.tuples(sides, sides), st.tuples(sides, sides), st.booleans(), st.integers(0, 2**32 - 1))
    def test_image_and_label_stay_together(self, train_set, size, crop, upright, seed) -> None:
        label = np.zeros(size, np.uint8)
        edge = (slice(None), slice(size[1] // 2, None)) if upright else (slice(size[0] // 2, None),)
        label[edge] = 1
        image = np.where(label[..., None] == 1, 250, 10).astype(np.uint8).repeat(3, 2)
        train_set.crop_size = crop
        augmentation = draw_augmentation(np.random.default_rng(seed), size, crop)
        item = train_set.augmented(0, image, label, augmentation)
        top, bottom, left, right = item["valid"].tolist()
        inside = np.zeros(crop, bool)
        inside[top:bottom, left:right] = True
        shown, told = item["image"][0].numpy(), item["label"].numpy()
        assert (told[~inside] == -1).all() and (shown[~inside] == 0).all() and (told[inside] >= 0).all()
        wrong = ((shown > 130) != (told == 1)) & inside
        across = wrong.any(0 if upright else 1)
        assert across.sum() <= 2, "but for the edge, where one is interpolated and the other is not"
        if augmentation.scale == 1.0:
            assert not wrong.any()

    @few
    @given(st.tuples(sides, sides), st.tuples(sides, sides), st.integers(0, 2**32 - 1), st.sampled_from(SCALES))
    def test_only_the_window_is_resized_to_the_same_bytes(self, size, crop, seed, scale) -> None:
        rng = np.random.default_rng(seed)
        image, label = (rng.integers(0, 256, (*size, *more), np.uint8) for more in ((3,), ()))
        drawn = draw_augmentation(rng, size, crop)
        drawn = drawn if drawn.scale == scale else Augmentation(scale, (0, 0), drawn.mirrored)
        pairs = windowed_crop(image, label, drawn, crop), scaled_crop(image, label, drawn, crop)
        assert all(np.array_equal(one, two) for one, two in zip(*pairs, strict=True))


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@st.composite
def tensors(draw) -> torch.Tensor:
    """Of any type and shape, some laid out in another order than that of their dimensions."""
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    order = draw(st.permutations(range(len(shape))))
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(9)
    return numbers.to(draw(st.sampled_from(DTYPES))).permute(tuple(order))


plain = st.one_of(st.none(), st.booleans(), st.integers(-2**70, 2**70), st.floats(allow_nan=False), st.text(max_size=5))
contents = st.recursive(st.one_of(tensors(), plain), lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.text(max_size=4), st.integers(0, 9)), inner, max_size=3)),
    max_leaves=12)


@few
@given(contents)
def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path, content) -> None:
    path, again = tmp_path / "a.pth", tmp_path / "b.pth"
    save_tensors(path, in_plain_order(content))
    read = load_tensors(path, "file")
    assert_same(read, content)
    save_tensors(again, read)
    assert_same(load_tensors(again, "file"), content)
