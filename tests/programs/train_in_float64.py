"""``train_kd.py`` in float64 and without dropout, to compare process counts.

In float32 rounding alone drives two runs apart within a few steps, and dropout masks depend on the process.
"""
from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_kd
from models.prepare import PlainOrderDropout
from models.preprocess import Preprocess
from utils.cli import run_main

torch.set_default_dtype(torch.float64)
normalize = Preprocess.__call__
Preprocess.__call__ = lambda self, images, valid=None: normalize(self, images, valid).double()
for kind in (torch.nn.Dropout, torch.nn.Dropout2d, PlainOrderDropout):
    kind.forward = lambda self, x: x

if __name__ == "__main__":
    sys.exit(run_main(train_kd.main))
