"""Denormal numbers count as 0 in a program that computes on a CPU."""
from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import ROOT, four_steps, write_folder_dataset, write_teacher

import eval as evaluation
import train_kd

PROGRAM = """
import torch
from utils.cpu import prepare_cpu
torch.set_num_threads(2)
prepare_cpu()
product = torch.full((10**6,), 1e-38) * 0.1
assert torch.get_num_threads() == 2
print(int((product.view(torch.int32) != 0).sum()))
"""


def test_all_threads_take_them_for_0() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "0"), done.stderr[-2000:]


def smallest() -> int:
    """The bits of a product that is denormal."""
    return (torch.full((1,), 1e-38) * 0.1).view(torch.int32).item()


@pytest.mark.parametrize(("more", "zero"), [((), True), (("--no-fast",), False)])
def test_programs_do_so_unless_told_not_to(more, zero, tmp_path) -> None:
    assert smallest() != 0, "the test process itself does not"
    data = write_folder_dataset(tmp_path / "set", train=4, val=1)
    assert train_kd.main(four_steps(data, tmp_path / "run", "--max-iterations", "1", "--skip-val", *more)) == 0
    assert (smallest() == 0) == zero
    torch.set_flush_denormal(not zero)  # as another program in this process may have left it
    weights = write_teacher(tmp_path / "weights.pth")
    assert evaluation.main(["--dataset", "folder", "--data", str(data), "--model", "deeplab_mobile", "--backbone",
                            "mobilenetv2_w0.5", "--pretrained", str(weights), "--no-cuda", "--workers", "0",
                            *more]) == 0
    assert (smallest() == 0) == zero
