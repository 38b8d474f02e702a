"""Groups of images: the weights of their labeled pixels."""
from __future__ import annotations

import pytest
import torch

from losses.core.groups import image_weights

LABELED = torch.tensor([129600, 100001, 129600, 0])


@pytest.mark.parametrize(("group_size", "counts"), [(0, [359201] * 4), (2, [229601, 229601, 129600, 129600])])
def test_pixels_of_a_group_have_the_same_weight(group_size, counts) -> None:
    groups = 1 if group_size == 0 else 2
    weights = image_weights(LABELED, group_size, torch.float64)
    torch.testing.assert_close(weights, 1 / (groups * torch.tensor(counts, dtype=torch.float64)))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [0, 2])
def test_pixels_are_not_counted_in_half_precision(group_size, half) -> None:
    """A crop has more pixels than float16 has numbers."""
    wanted = image_weights(LABELED, group_size, torch.float32)
    with torch.autocast("cpu", half):
        assert image_weights(LABELED, group_size, torch.float32).equal(wanted)
