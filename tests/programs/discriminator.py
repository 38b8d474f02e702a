"""Two steps of the adversarial term on this process's share of a batch of four; writes the outcome of rank 0.

In float64, to compare process counts: the student's gradients of either step, and the discriminator after them.
"""
from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from method_cases import facts, options_of_method

from engine.build import wrap_for_processes
from losses.adversarial import Adversarial
from losses.core import NetInfo
from losses.core.objective import Objective
from models.output import SegOutput
from utils.distributed import Distributed, cleanup, init_distributed, reduce_mean
from utils.randomness import seed_everything

BATCH, STEPS, LOSSES, NET = 4, 2, ("hinge", "wgan-gp"), NetInfo("net", {"logits": 3}, 3)


class Student(nn.Module):
    """One convolution gives the logits."""

    own = True

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> SegOutput:
        logits = self.body(x)
        return SegOutput(logits, None, logits, logits, logits, logits, logits)


def main() -> None:
    torch.set_num_threads(1)
    processes = init_distributed(no_cuda=True)
    outcome = {loss: train(processes, loss) for loss in LOSSES}
    if processes.is_main_process:
        torch.save(outcome, sys.argv[1])
    cleanup()


def train(processes: Distributed, loss: str) -> dict[str, torch.Tensor]:
    seed_everything(0, "networks")
    method = Adversarial(options_of_method("adv", adv_loss=loss), facts(3, active={"adv": 1.0}), NET, NET, width=8)
    nn.init.constant_(method.discriminator.attn1.gamma, 0.3)
    objective = Objective(Student(), {"adv": method}, {"adv": 1.0}).double()
    model = wrap_for_processes(objective, processes, sync_bn=True)
    share = BATCH // processes.world_size
    part, outcome = slice(processes.rank * share, (processes.rank + 1) * share), {}
    for step in range(STEPS):
        g = torch.Generator().manual_seed(step)
        # images of different brightness, so that the statistics of two differ from those of all
        brightness = torch.arange(BATCH).view(-1, 1, 1, 1).double()
        images, teacher = ((torch.randn(BATCH, 3, 64, 64, generator=g).double() + 2 * brightness)[part]
                           for _ in range(2))
        own = torch.Generator().manual_seed(step)
        torch.rand(processes.rank * share, generator=own, dtype=torch.float64)  # what the earlier processes draw
        target = torch.full((share, 64, 64), -1)
        terms = model(images, SegOutput(*[teacher] * 7), target, step, own)
        (terms["adv"] + 0 * terms["task"]).backward()
        outcome |= {f"{name} {step}": p.grad.clone() for name, p in objective.student.named_parameters()}
        objective.student.zero_grad()
        objective.after_step(step)
        outcome |= {f"{name} {step}": reduce_mean(x) for name, x in method.diagnostics().items()}
    return outcome | {f"discriminator {name}": x for name, x in method.discriminator.state_dict().items()}


if __name__ == "__main__":
    main()
