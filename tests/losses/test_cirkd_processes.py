"""CIRKD's queues with two processes: equal on both, and those of one process; each compares with slots of its own."""
from __future__ import annotations

import subprocess
import sys

import torch
from helpers import ROOT, launch_forked


def test_two_processes_equal_one(tmp_path):
    program, paths = str(ROOT / "tests" / "programs" / "cirkd_queues.py"), [str(tmp_path / n) for n in ("1.pt", "2.pt")]
    alone = subprocess.run([sys.executable, program, paths[0]], capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr[-3000:]
    together = launch_forked(program, [paths[1]], 2)
    assert together.returncode == 0, together.stderr[-3000:]
    one, two = (torch.load(path, weights_only=True) for path in paths)
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-9, atol=1e-12)
    assert (one["losses"] > 0).all()
    assert one["queues"] == two["queues"] and len(one["queues"]) == 15
    for name, value in one["state"].items():
        if value.dtype.is_floating_point:
            # the queues are kept in float32
            torch.testing.assert_close(two["state"][name], value, rtol=1e-6, atol=1e-7)
        else:
            assert two["state"][name].equal(value), name
    assert one["state"]["cirkd.memory.pixel.filled"].min() == 50
    # as released: every process draws the slots that it compares with; the first one draws what a single one does
    assert two["slots"].shape == (2, 2, 50) and two["slots"].sort(-1).values.equal(torch.arange(50).expand(2, 2, 50))
    assert two["slots"][0].equal(one["slots"][0])
    assert len({tuple(order.tolist()) for order in two["slots"].flatten(0, 1)}) == 4
