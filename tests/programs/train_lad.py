"""``train_kd.py`` in float64, without dropout, with label channels that are the same in every process.

So that a teacher trained by several processes can be compared with one trained by one. Its weights before the stage go
to SAVE_DIR/start.pth.
"""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from train_in_float64 import run_main, train_kd

import losses.stages.label_assisted as stage
from utils.distributed import rank_and_world

stage.NOISE = 0.0
stage.random_codes = lambda batch, classes, generator, device: torch.linspace(
    -1, 1, classes + 1, dtype=torch.float64, device=device).expand(batch, -1)
initial = stage.TeacherState.__init__


def keep_start(self, network, settings, recipe) -> None:
    if rank_and_world()[0] == 0:
        save = Path(sys.argv[sys.argv.index("--save-dir") + 1])
        save.mkdir(parents=True, exist_ok=True)
        torch.save({k: v.clone() for k, v in network.state_dict().items()}, save / "start.pth")
    initial(self, network, settings, recipe)


stage.TeacherState.__init__ = keep_start

if __name__ == "__main__":
    sys.exit(run_main(train_kd.main))
