"""What a figure is a figure of."""
from __future__ import annotations

import pytest
import torch

from utils.machine import others_memory


def test_memory_of_others_is_that_of_a_gpu_without_the_tensors_of_this_process(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5000, 8000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1000)
    assert others_memory(torch.device("cuda")) == 2000
    assert others_memory(torch.device("cpu")) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_of_this_process_are_not_those_of_others() -> None:
    device = torch.device("cuda", 0)
    torch.zeros(1, device=device)

    def change() -> int:
        before = others_memory(device)
        held = torch.zeros(2 ** 30, dtype=torch.uint8, device=device)
        after = others_memory(device)
        del held
        torch.cuda.empty_cache()
        return abs(after - before)

    assert min(change() for _ in range(5)) < 2 ** 28  # others may come and go in some of them
