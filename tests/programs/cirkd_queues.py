"""A few steps of CIRKD and CIRKDv2 on this process's share of a batch of four; writes the outcome of rank 0.

Asserts that the queues are the same on every process. In float64, to compare process counts.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from losses.composition import Objective, build_distillers
from losses.distiller import BuildContext, NetInfo
from models.output import SegOutput
from utils.build import wrap_for_processes
from utils.distributed import cleanup, init_distributed, reduce_mean
from utils.randomness import seed_everything

TERMS = ("cirkd_batch", "cirkd_pixel", "cirkd_region", "cirkdv2_batch", "cirkdv2_pixel", "cirkdv2_region",
         "cirkdv2_channel", "cirkdv2_channel_memory", "cirkdv2_channel_mse", "cirkdv2_fitnet")
BATCH, STEPS = 4, 4


class Student(nn.Module):
    """One convolution with stride 8 gives the head map, another the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classifier = nn.Conv2d(3, 6, 8, stride=8), nn.Conv2d(6, 5, 1)

    def forward(self, x: torch.Tensor) -> SegOutput:
        head = self.body(x).relu()
        return SegOutput(self.classifier(head), None, head, head, head, head, head)


def main() -> None:
    torch.set_default_dtype(torch.float64)
    place = init_distributed(no_cuda=True)
    options = argparse.Namespace(
        sync_bn=True, seed=0, group_size=2, compat="fixed", cirkd_pixel_queue=50, cirkd_region_queue=5,
        cirkd_pixel_contrast=60, cirkd_region_contrast=15, cirkdv2_channel_queue=100, cirkdv2_channel_contrast=40)
    seed_everything(0, "networks")
    context = BuildContext(NetInfo("s", {"head": 6}, 5), NetInfo("t", {"head": 9}, 5), 5, -1, frozenset(TERMS),
                           (64, 40), "citys", options)
    objective = Objective(Student(), build_distillers(context), dict.fromkeys(TERMS, 1.0))
    model = wrap_for_processes(options, objective, place)
    share = BATCH // place.world_size
    mine, losses = slice(place.rank * share, (place.rank + 1) * share), []
    for step in range(STEPS):
        g = torch.Generator().manual_seed(step)
        images = torch.randn(BATCH, 3, 64, 40, generator=g)[mine]
        teacher = torch.randn(BATCH, 9, 8, 5, generator=g).relu()[mine]
        target = torch.randint(-1, 5, (BATCH, 8, 5), generator=g).repeat_interleave(8, 1).repeat_interleave(8, 2)[mine]
        own = torch.Generator().manual_seed(100 + place.rank)
        terms = model(images, SegOutput(*[teacher] * 7), target, step, own)
        # DDP wants the classifier used; cross entropy is a mean per process, which would part the two runs
        (sum(terms[name] for name in TERMS) + 0 * terms["task"]).backward()
        with torch.no_grad():
            for parameter in objective.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        losses.append(reduce_mean(torch.stack([terms[name].detach() for name in TERMS])))
    state = objective.distillers.state_dict()
    check_equal(objective, state)
    if place.is_main:
        torch.save({"losses": torch.stack(losses), "state": state, "queues": objective.unsynchronised()}, sys.argv[1])
    cleanup()


def check_equal(objective: Objective, state: dict[str, torch.Tensor]) -> None:
    """Rank 0's queues are this process's, bit by bit."""
    if dist.is_initialized():
        for name in objective.unsynchronised():
            here = state[name.removeprefix("distillers.")]
            first = here.clone()
            dist.broadcast(first, 0)
            assert first.equal(here), name


if __name__ == "__main__":
    main()
