"""The losses equal the slow forms that ``tools/benchmark.py slow-forms`` sets beside them."""
from __future__ import annotations

import pytest
import torch
from slow_forms import FORMS, make_maps


@pytest.mark.parametrize("size", [(16, 24), (9, 13)])
@pytest.mark.parametrize("name", FORMS)
def test_the_loss_and_its_gradients_equal_the_slow_form(name, size) -> None:
    results = []
    for form in FORMS[name]:
        maps = make_maps(3, size, 5, (8, 12), dtype=torch.float64)
        loss = form(maps)
        loss.backward()
        results.append((loss.detach(), [x.grad for x in maps if x.grad is not None]))
    (slow, slow_gradients), (fast, fast_gradients) = results
    assert slow > 0 and len(slow_gradients) == len(fast_gradients) > 0
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=0)
    for gradient, expected in zip(fast_gradients, slow_gradients, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-9 * float(expected.abs().max()))
