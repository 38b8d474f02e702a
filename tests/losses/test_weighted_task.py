"""Cross entropy with weights of classes and of hard pixels, against values worked out by hand."""
from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from losses.core.task import SegCrossEntropyLoss, WeightedCrossEntropyLoss, hard_pixels

CLASS_WEIGHTS = [0.5, 2.0, 0.0]


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [4, 3, 8, 8] and labels with ignored pixels, more of them from image to image."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 3, (4, 8, 8), generator=generator)
    for i in range(4):
        target[i, :2 * i] = -1
    return logits.requires_grad_(), target


def test_without_weights_it_is_the_plain_one(batch) -> None:
    for group in (0, 2):
        torch.testing.assert_close(WeightedCrossEntropyLoss(-1, group)(*batch), SegCrossEntropyLoss(-1, group)(*batch))


def test_class_weights_are_those_of_torch(batch) -> None:
    logits, target = batch
    expected = F.cross_entropy(logits, target, torch.tensor(CLASS_WEIGHTS, dtype=torch.float64), ignore_index=-1)
    torch.testing.assert_close(WeightedCrossEntropyLoss(-1, 0, CLASS_WEIGHTS)(logits, target), expected)


@pytest.mark.parametrize("recipe", [(CLASS_WEIGHTS, None), (None, (0.3, 0.2)), (CLASS_WEIGHTS, (0.3, 0.2))])
def test_groups_are_what_processes_and_parts_of_a_batch_compute(batch, recipe) -> None:
    logits, target = batch
    whole = WeightedCrossEntropyLoss(-1, 2, *recipe)(logits, target)
    halves = [WeightedCrossEntropyLoss(-1, 0, *recipe)(x, y) for x, y in zip(logits.split(2), target.split(2),
                                                                            strict=True)]
    torch.testing.assert_close(whole, sum(halves) / 2)


def test_a_single_pixel_of_a_light_class_weighs_as_the_mean_it_is(batch) -> None:
    logits, target = batch
    alone = torch.full_like(target, 255)
    alone[0, 0, 0] = 0
    loss = WeightedCrossEntropyLoss(255, 0, [1e-3, 1.0, 1.0])(logits, alone)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:1, :, :1, :1], alone[:1, :1, :1]))
    nothing = WeightedCrossEntropyLoss(255, 2, [1e-3, 1.0, 1.0], (0.7, 0.2))(logits, torch.full_like(target, 255))
    (gradient,) = torch.autograd.grad(nothing, logits)
    assert nothing.item() == 0 and not gradient.any()


def test_hard_pixels_are_those_below_the_threshold_and_at_least_a_share() -> None:
    probability = torch.tensor([[[0.9, 0.2, 0.8, 0.6], [0.95, 0.99, 0.97, 0.1]]])  # of the pixels' own classes
    labeled = torch.tensor([[[True, True, True, True], [True, True, True, False]]])
    few = hard_pixels(-probability.log(), labeled, 0.7, 0.1)
    assert few.tolist() == [[[False, True, False, True], [False] * 4]]
    more = hard_pixels(-probability.log(), labeled, 0.7, 0.5)  # 4 of the 7
    assert more.tolist() == [[[True, True, True, True], [False] * 4]]
    each = hard_pixels(-probability.log().transpose(0, 1), labeled.transpose(0, 1), 0.01, 0.5, group_size=1)
    assert each.tolist() == [[[False, True, False, True]], [[True, False, True, False]]]


def test_the_loss_is_the_mean_over_the_hard_pixels(batch) -> None:
    logits, target = batch
    per_pixel = F.cross_entropy(logits, target, ignore_index=-1, reduction="none")
    labeled = per_pixel[target >= 0]
    least = labeled.sort(descending=True).values[math.ceil(0.8 * len(labeled)) - 1]
    expected = labeled[(labeled > -math.log(0.3)) | (labeled >= least)].mean()
    assert 0.8 * len(labeled) > (labeled > -math.log(0.3)).sum() > 0, "the share decides"
    torch.testing.assert_close(WeightedCrossEntropyLoss(-1, 0, None, (0.3, 0.8))(logits, target), expected)
