"""The queues of CIRKD: order of writing, wrap-around, sampling, picking pixels."""
from __future__ import annotations

import pytest
import torch

from losses.core.labels import class_members, position_labels
from losses.core.queues import (
    FeatureQueue,
    class_means,
    pick_pixels,
    push_positions,
    random_priorities,
    take_pixels,
)
from utils.errors import UserError


def slow_push(queue, pointer, filled, rows, count):
    """One push after the other, in the words of the method's page."""
    size = queue.shape[1]
    for image in range(len(rows)):
        for k in range(len(queue)):
            n, at = int(count[image, k]), int(pointer[k])
            if not n:
                continue
            if at + n >= size:
                queue[k, -n:], pointer[k], filled[k] = rows[image, k, :n], 0, size
            else:
                queue[k, at:at + n], pointer[k] = rows[image, k, :n], at + n
                filled[k] = max(int(filled[k]), at + n)


@pytest.mark.parametrize("size, most, images", [(5, 5, 9), (16, 16, 4), (7, 3, 12), (3, 1, 8), (40, 16, 6), (90, 4, 2)])
def test_push_equals_the_sequence(size, most, images):
    """Random counts over several steps, with several wrap-arounds and overwritten slots within a step."""
    g = torch.Generator().manual_seed(size)
    queue = FeatureQueue(size, 3, 5, torch.float64, g)
    want = queue.queue.clone(), queue.pointer.clone(), queue.filled.clone()
    for _ in range(6):
        rows = torch.randn(images, 5, most, 3, generator=g, dtype=torch.float64)
        count = torch.randint(0, most + 1, (images, 5), generator=g)
        count[:, 0], count[:, 4] = 0, most
        slow_push(*want, rows, count)
        queue.push(rows, count)
        for got, expected in zip((queue.queue, queue.pointer, queue.filled), want, strict=True):
            assert got.equal(expected)
    assert queue.pointer[0] == queue.filled[0] == 0
    assert queue.filled_share().item() == pytest.approx(int(queue.filled.sum()) / (5 * size))


def test_positions_reach_the_end_exactly():
    """Filling to the last slot already sends the pointer back, as published."""
    start, pointer, restarted = push_positions(torch.tensor([3, 4]), torch.tensor([[2, 2], [3, 3], [1, 1]]), 5, 3)
    assert start.tolist() == [[3, 3], [0, 0], [3, 3]]
    assert pointer.tolist() == [4, 4] and restarted.tolist() == [True, True]


def test_a_push_that_is_longer_than_the_queue_is_refused():
    with pytest.raises(UserError, match="4 vectors cannot take 5"):
        FeatureQueue(4, 3, 2).push(torch.zeros(1, 2, 5, 3), torch.ones(1, 2, dtype=torch.long))


def test_a_single_ring_has_no_class_axis():
    queue = FeatureQueue(6, 3)
    rows = torch.randn(1, 1, 4, 3)
    queue.push(rows, torch.tensor([[4]]))
    assert queue.queue.shape == (6, 3) and queue.queue[:4].equal(rows[0, 0]) and queue.pointer.tolist() == [4]
    vectors, usable = queue.sample(torch.tensor([3, 0, 5, 1, 2, 4]), 2)
    assert usable is None and vectors.equal(rows[0, 0, [3, 0]])


def test_sample_takes_the_same_slots_of_every_class():
    queue = FeatureQueue(8, 2, 3)
    order = torch.randperm(8)
    vectors, usable = queue.sample(order, 5)
    assert usable is None
    assert vectors.equal(torch.cat([queue.queue[k, order[:5]] for k in range(3)]))
    assert len(queue.sample(order, 50)[0]) == 24


def test_sample_of_written_slots():
    queue = FeatureQueue(8, 2, 3)
    queue.filled.copy_(torch.tensor([8, 2, 0]))
    order = torch.tensor([5, 1, 7, 0, 2, 3, 4, 6])
    vectors, usable = queue.sample(order, 3, only_filled=True)
    assert usable.view(3, 3).tolist() == [[True] * 3, [True, True, False], [False] * 3]
    assert vectors[:3].equal(queue.queue[0, [5, 1, 7]]) and vectors[3:5].equal(queue.queue[1, [1, 0]])
    queue.filled.fill_(8)
    full, usable = queue.sample(order, 3, only_filled=True)
    assert usable.all() and full.equal(queue.sample(order, 3)[0])


def test_sampled_vectors_do_not_change_with_the_queue():
    queue = FeatureQueue(4, 2)
    vectors = queue.sample(torch.arange(4), 4)[0]
    before = vectors.clone()
    queue.push(torch.randn(1, 1, 4, 2), torch.tensor([[4]]))
    assert vectors.equal(before) and not queue.queue.equal(before)


def test_picked_pixels_are_distinct_members_and_the_choice_is_even():
    labels = torch.randint(-1, 3, (2, 60), generator=torch.Generator().manual_seed(0))
    members = class_members(labels, 4)
    seen = torch.zeros(60)
    g = torch.Generator().manual_seed(1)
    for _ in range(400):
        pixel, count = pick_pixels(labels, members, 5, random_priorities(2, 60, labels.device, g))
        assert count.tolist() == [[5, 5, 5, 0]] * 2
        for image in range(2):
            for k in range(3):
                chosen = pixel[image, k].tolist()
                assert len(set(chosen)) == 5 and (labels[image, chosen] == k).all()
        seen[pixel[0, 0]] += 1
    members = seen[labels[0] == 0]
    assert seen.sum() == members.sum() == 2000
    assert members.min() > 0.6 * members.mean() and members.max() < 1.4 * members.mean()


def test_the_released_choice_is_a_permutation_of_the_first_positions():
    labels = torch.tensor([[2, 2, 2, 1, 0, 0, 0, -1]])
    members = class_members(labels, 3)
    for seed in range(5):
        priority = random_priorities(1, 8, labels.device, torch.Generator().manual_seed(seed))
        pixel, count = pick_pixels(labels, members, 16, priority, as_released=True)
        assert count.tolist() == [[3, 1, 3]] and pixel.shape == (1, 3, 16)
        assert sorted(pixel[0, 0, :3].tolist()) == sorted(pixel[0, 2, :3].tolist()) == [0, 1, 2]
        assert pixel[0, 1, 0] == 0


def test_means_labels_and_vectors():
    features = torch.randn(2, 6, 3, dtype=torch.float64)
    labels = torch.tensor([[0, 0, 1, -1, 1, 1], [-1] * 6])
    means = class_means(features, class_members(labels, 3))
    expected = features[0, :2].mean(0)
    torch.testing.assert_close(means[0, 0], expected / expected.norm())
    assert means[0, 2].abs().max() == 0 and means[1].abs().max() == 0
    pixel = torch.tensor([[[0, 3]], [[5, 5]]])
    assert take_pixels(features, pixel).equal(torch.stack([features[0, [[0, 3]]], features[1, [[5, 5]]]]))
    target = torch.arange(48).view(1, 6, 8) % 7
    assert position_labels(target, (3, 4), 7).equal(target[:, ::2, ::2].flatten(1))
    assert position_labels(torch.tensor([[[0, 255, 3, 9, -4]]]), (1, 5), 9, 3).tolist() == [[0, -1, -1, -1, -1]]
