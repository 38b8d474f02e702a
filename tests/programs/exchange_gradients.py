"""Two processes: gradients of a batch in two parts, in a fixed graph, and exchanged in half precision.

    torchrun --nproc_per_node 2 exchange_gradients.py
"""
from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from test_speed import assert_close, batch, gradients, step_of

from engine.build import wrap_for_processes
from utils.distributed import cleanup, init_distributed


def main() -> None:
    torch.set_num_threads(1)
    distributed = init_distributed(no_cuda=True)
    images, target = batch(seed=distributed.rank)
    found = {}
    for name, parts, fixed, compression in (("plain", 1, False, "none"), ("fixed", 1, True, "none"),
                                            ("parts", 2, False, "none"), ("bf16", 1, True, "bf16")):
        wrap = partial(wrap_for_processes, distributed=distributed, sync_bn=False, fixed_graph=fixed,
                       compression=compression)
        step_fn = step_of("--no-rand-mask", frozen_norm=True, parts=parts, wrap=wrap)
        step_fn(images, images, target, 0)
        found[name] = {k: v.clone() for k, v in gradients(step_fn).items()}
        for key, value in found[name].items():
            first = value.clone()
            dist.broadcast(first, 0)
            assert torch.equal(first, value), f"{name}: the processes disagree on {key}"
        del step_fn
    assert_close(found["fixed"], found["plain"])
    assert_close(found["parts"], found["plain"])
    assert_close(found["bf16"], found["plain"], 2 ** -6)
    rounded = [key for key, value in found["bf16"].items() if not torch.equal(value, found["plain"][key])]
    assert len(rounded) > len(found["plain"]) / 2
    cleanup()


if __name__ == "__main__":
    main()
