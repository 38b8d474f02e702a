"""A few steps of CIRKD and CIRKDv2 on this process's share of a batch of four; writes the outcome of rank 0.

Asserts that the queues are the same on every process. In float64, to compare process counts.
"""
from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from method_cases import facts, options_of_method

from engine.build import wrap_for_processes
from losses.core import NetInfo
from losses.core.memory import MemoryRelations
from losses.core.objective import Objective, build_distillers
from losses.core.queues import FeatureQueue, gather_batch
from models.output import SegOutput
from utils.distributed import Distributed, cleanup, init_distributed, reduce_mean
from utils.randomness import seed_everything

TERMS = ("cirkd_batch", "cirkd_pixel", "cirkd_region", "cirkdv2_batch", "cirkdv2_pixel", "cirkdv2_region",
         "cirkdv2_channel", "cirkdv2_channel_memory", "cirkdv2_channel_mse", "cirkdv2_fitnet")
BATCH, STEPS = 4, 4
#: all slots are compared with, so that their order, which every process draws for itself, does not part the two runs
SMALL = {"cirkd_pixel_queue": 50, "cirkd_region_queue": 5, "cirkd_pixel_contrast": 250, "cirkd_region_contrast": 25}


class Student(nn.Module):
    """One convolution with stride 8 gives the head map, another the logits."""

    own = True

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classifier = nn.Conv2d(3, 6, 8, stride=8), nn.Conv2d(6, 5, 1)

    def forward(self, x: torch.Tensor) -> SegOutput:
        head = self.body(x).relu()
        return SegOutput(self.classifier(head), None, head, head, head, head, head)


def main() -> None:
    torch.set_default_dtype(torch.float64)
    processes = init_distributed(no_cuda=True)
    train(processes)
    cleanup()


def train(processes: Distributed) -> None:
    options = {"cirkd": options_of_method("cirkd", **SMALL),
               "cirkdv2": options_of_method("cirkdv2", cirkdv2_channel_contrast=100, **SMALL)}
    run = facts(5, active=dict.fromkeys(TERMS, 1.0), crop_size=(64, 40), group_size=2)
    seed_everything(0, "networks")
    student = Student()
    distillers = build_distillers(options, run, NetInfo("s", {"head": 6}, 5), NetInfo("t", {"head": 9}, 5))
    # fewer slots than the program accepts, so that a few steps reach the end
    distillers["cirkdv2"].channels.channel = FeatureQueue(100, 4, generator=torch.Generator().manual_seed(0))
    objective = Objective(student, distillers, run.active)
    model = wrap_for_processes(objective, processes, sync_bn=True)
    share = BATCH // processes.world_size
    part, losses = slice(processes.rank * share, (processes.rank + 1) * share), []
    for step in range(STEPS):
        g = torch.Generator().manual_seed(step)
        images = torch.randn(BATCH, 3, 64, 40, generator=g)[part]
        teacher = torch.randn(BATCH, 9, 8, 5, generator=g).relu()[part]
        target = torch.randint(-1, 5, (BATCH, 8, 5), generator=g).repeat_interleave(8, 1).repeat_interleave(8, 2)[part]
        own = torch.Generator().manual_seed(100 + processes.rank)
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
    slots = contrast_slots(processes, distillers["cirkd"].memory)
    outcome = {"losses": torch.stack(losses), "state": {k: v.clone() for k, v in state.items()},
               "queues": objective.unsynchronized(), "slots": slots}
    check_contrast(processes, distillers["cirkd"].memory)
    if processes.is_main_process:
        torch.save(outcome, sys.argv[1])


def contrast_slots(processes: Distributed, memory: MemoryRelations) -> torch.Tensor:
    """[processes, 2, size]: the orders in which every process takes the slots of the pixel queue, drawn twice from one
    generator; asserts that what enters the queues is the same everywhere."""
    g, orders, priorities = torch.Generator().manual_seed(7), [], []
    for _ in range(2):
        draws = memory.draw(BATCH // processes.world_size, 40, torch.device("cpu"), g)
        orders.append(draws.pixel_order)
        priorities.append(gather_batch(draws.priority))
    after = torch.randint(2 ** 40, (1,), generator=g)
    assert (gather_batch(after) == after).all(), "the generators went apart"
    for priority in priorities:
        assert (gather_batch(priority[None]) == priority).all()
    return gather_batch(torch.stack(orders)[None])


def check_contrast(processes: Distributed, memory: MemoryRelations) -> None:
    """With fewer slots than there are: the loss of this process is that of the slots which it drew for itself."""
    memory.settings = replace(memory.settings, pixel_contrast=12)
    own = torch.Generator().manual_seed(processes.rank)
    student, teacher = (torch.randn(2, c, 8, 5, generator=own).relu() for c in (6, 9))
    target = torch.randint(0, 5, (2, 8, 5), generator=own).repeat_interleave(8, 1).repeat_interleave(8, 2)
    order = memory.draw(2, 40, torch.device("cpu"), torch.Generator().manual_seed(8)).pixel_order
    got = memory(student, teacher, target, generator=torch.Generator().manual_seed(8))["pixel"]
    keys = memory.pixel.queue[:, order[:12]].flatten(0, 1).double()
    s, t = (nn.functional.normalize(x.flatten(2), dim=1).transpose(1, 2) @ keys.T / 0.1
            for x in (memory.project_head(student), teacher))
    want = (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(got, want)


def check_equal(objective: Objective, state: dict[str, torch.Tensor]) -> None:
    """Rank 0's queues are this process's, bit by bit."""
    if dist.is_initialized():
        for name in objective.unsynchronized():
            here = state[name.removeprefix("distillers.")]
            first = here.clone()
            dist.broadcast(first, 0)
            assert first.equal(here), name


if __name__ == "__main__":
    main()
