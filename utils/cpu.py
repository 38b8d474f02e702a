"""How a process that trains or evaluates on a CPU is set up."""
from __future__ import annotations

import numpy as np
import torch

from utils.allocator import keep_freed_memory


def prepare_cpu(fast: bool = True) -> None:
    """Keep freed memory, and compute with 0 in place of denormal numbers, those nearer to 0 than 1.2e-38 (float32);
    not ``fast``: with the numbers as they are.

    A product with a denormal number takes a CPU many times as long as another one (a GPU does not mind). Networks that
    were trained with weight decay may put out maps that are full of them, and a softmax of large logits makes them.
    Call it before the first parallel operation: threads that PyTorch starts afterwards inherit the setting."""
    if fast:
        keep_freed_memory()
    for kind in (np.float32, np.float64):
        np.finfo(kind)  # NumPy 1 warns when it first asks for these limits later on
    torch.set_flush_denormal(fast)
