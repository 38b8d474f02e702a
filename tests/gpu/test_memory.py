"""Counting the bytes of live tensors, on the CPU and on a simulated GPU, against sums by hand; the tool for tables."""
from __future__ import annotations

import json

import pytest
import torch
from helpers import assert_refused

from tools.simulate_memory import main
from utils.memory import MemoryTracker
from utils.simulated_gpu import simulated_gpu


def by_hand(device: torch.device | str, memory: MemoryTracker) -> None:
    """Sizes in bytes, rounded up to 512."""
    assert memory.now == memory.peak == 0
    a = torch.zeros(1000, device=device)
    assert memory.now == 4096  # for 4000
    b = a * 2
    view = b.view(10, 100)[3]
    b.add_(1)
    assert memory.now == memory.peak == 8192
    total = (a + b).sum()  # the sum is there before its argument goes
    assert (memory.now, memory.peak) == (8192 + 512, 8192 + 4096 + 512)
    del b
    assert memory.now == 8192 + 512  # the view holds it
    del view, total, a
    memory.reset_peak()
    assert memory.now == memory.peak == 0
    weight = torch.zeros(100, 100, device=device, requires_grad=True)  # 40448
    loss = (torch.zeros(7, 100, device=device) @ weight).relu().sum()  # keeps its input and the result of relu: 3072
    assert memory.now == 40448 + 2 * 3072 + 512
    assert memory.peak == 40448 + 3 * 3072
    loss.backward()
    assert memory.now == 2 * 40448 + 512
    del loss, weight
    assert memory.now == 0


def test_on_the_cpu() -> None:
    with MemoryTracker("cpu") as memory:
        by_hand("cpu", memory)


def test_what_is_known_never_counts() -> None:
    x = torch.zeros(1000)
    with MemoryTracker("cpu", known=[x]) as memory:
        view, more = x.view(10, 100), x + 1
        assert memory.now == 4096 and view.shape == (10, 100)
        del more
        assert memory.now == 0


def test_on_a_simulated_gpu() -> None:
    with simulated_gpu() as device, MemoryTracker("cuda") as memory:
        torch.zeros(1000)  # of another device
        by_hand(device, memory)


def test_the_differences_of_cdist_count_where_they_are_made() -> None:
    peaks = []
    for workspaces in (False, True):
        with simulated_gpu() as device, MemoryTracker("cuda", workspaces) as memory:
            x, y = (torch.zeros(3, 64, 32, device=device) for _ in range(2))
            torch.cdist(x.requires_grad_(), y, p=1.0).sum().backward()
        peaks.append(memory.peak)
    assert peaks[1] - peaks[0] > 3 * 64 * 64 * 32 * 4 / 2  # [3, 64, 64, 32], in place of a smaller peak before it


class TestTool:
    def test_a_table(self, tmp_path, capsys) -> None:
        path = tmp_path / "memory.json"
        assert main(["--short", "--rows", "camvid-r18", "--batch", "2", "--variants", "plain", "bf16", "--json",
                     str(path)]) == 0
        plain, half = json.loads(path.read_text())["results"]
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 4 and all(line.count("|") == 9 for line in lines)
        assert lines[2].startswith("| camvid-r18 | afdcd | 2 | plain |")
        assert f"| {plain['peak'] / 1e9:.2f} | 1.00 |" in lines[2]
        assert 0 < plain["kept"] < plain["peak"] and half["peak"] < plain["peak"]
        assert plain["flop"] == pytest.approx(half["flop"], rel=0.1)

    def test_refusals(self, capsys) -> None:
        assert_refused(capsys, main, ["--short", "--variant", "half"], "--variant", "NAME=FLAGS")
        assert_refused(capsys, main, ["--rows", "citys-r1000"], "--rows", "citys-r18")
