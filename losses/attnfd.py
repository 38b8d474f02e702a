"""AttnFD: attention-guided feature distillation (Mansourian et al., WACV 2026 workshop).

A convolutional block attention module (CBAM) refines a feature map F [B, C, h, w]:

    A = F * sigmoid(mlp(mean over positions) + mlp(max over positions)),   then   A * sigmoid(BN(conv7x7([max, mean])))

with max and mean over the channels in the second step. The loss compares the refined maps of both networks, the
student's after a 1x1 convolution and batch norm, each divided by its Frobenius norm over a group of N images:

    L = sum over the maps of  1/N |A_S / |A_S| - A_T / |A_T||^2

Kept from the released code: the teacher's CBAM is random, is never trained and normalises by the batch; the
convolutions towards the teacher's width (connectors) learn alone for one epoch, with ten times the learning rate and a
student in train mode, and are frozen before the student learns. Not kept: there the teacher itself ran in train mode
and with gradients.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses.core import Batch, Distiller, Needs, NetInfo, OptionGroup, RunFacts, Term, check_maps, option, register
from losses.core.checks import at_least_float32
from losses.core.facts import Preparation
from losses.core.groups import mean_over_groups
from losses.stages.connectors import ConnectorRecipe, ConnectorState
from losses.stages.stage import StageSettings, common_dependencies, run_stage, train_mode
from models.output import SegOutput

TAPS = ("c4", "head")


class CBAM(nn.Module):
    """Channel attention, then spatial attention, multiplied into a map [B, C, h, w].

    channels: C. reduction: C over the width of the channel attention's hidden layer.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        self.conv = nn.Conv2d(2, 1, kernel_size=7, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(1, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """The refined map, [B, C, h, w]."""
        scores = self.mlp(x.mean(dim=(2, 3))) + self.mlp(x.amax(dim=(2, 3)))
        x = x * scores.sigmoid()[:, :, None, None]
        summary = torch.cat([x.amax(dim=1, keepdim=True), x.mean(dim=1, keepdim=True)], dim=1)
        return x * self.bn(self.conv(summary)).sigmoid()


def connector(student_channels: int, teacher_channels: int) -> nn.Sequential:
    """1x1 convolution and batch norm, [B, C_s, h, w] -> [B, C_t, h, w]."""
    return nn.Sequential(nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=False),
                         nn.BatchNorm2d(teacher_channels))


def attnfd_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], group_size: int = 0) -> Tensor:
    """Sum over the maps of the squared distance between student and teacher at unit length, per image.

    student, teacher: maps [B, C, h, w], pairwise of one shape. group_size: images whose maps share a length (0 = all).
    A map of zeros has length 1. Gradients reach the student only. Raises UserError when the shapes differ.
    """
    def distance(s: Tensor, t: Tensor) -> Tensor:  # [groups, images, C, h, w]
        images = s.shape[1]
        s, t = (F.normalize(x.flatten(1), dim=1) for x in (s, t))
        return (s - t).square().sum(dim=1).mean() / images

    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        check_maps("attnfd", s, t, channels=True)
        total = total + mean_over_groups(distance, at_least_float32(s), at_least_float32(t.detach()), group_size)
    return total


@dataclass(frozen=True)
class AttnFDOptions(OptionGroup):
    """Settings of AttnFD."""

    attnfd_connector_steps: int | None = option(
        None, "steps of the stage that trains the convolutions towards the teacher's width, before they are frozen; 0: "
              "they learn with the student (default: one epoch)", at_least=0, metavar="N")


@register("attnfd")
class AttnFD(Distiller):
    """The last backbone stage and the last feature before the classifier (``head``: a 3x3 block after ASPP or pyramid
    pooling, whose own output the released code takes) of both networks.

    student, teacher: (c4, head) channel counts. group_size: as in :func:`attnfd_loss`. settings, recipe: of the stage
    in which the connectors learn, its steps 0 for one epoch; without settings they learn with the student.
    """

    title = "attention-guided feature distillation"
    paper = "Mansourian et al., Attention-guided Feature Distillation for Semantic Segmentation"
    year = 2024
    Options = AttnFDOptions
    terms = (Term("attnfd", 0.0, "weight of AttnFD's attention-refined features"),)
    needs = Needs.both(*TAPS, same_stride=True)
    # the authors' DeepLabV3+ runs: weight 2, no KD, and a weight decay of 5e-4. They had 6 images per process, and the
    # term is divided by the images of a group: with groups of 2 (the default) the same weight is about three times
    # as strong, and groups of 6 on one process give the published scale
    preset = {"*": {"lambda_attnfd": 2.0, "weight_decay": 5e-4}}
    cost = "attention on c4 and head of both networks, one 1x1 conv each; before training, an epoch of passes of both"
    trial = {"attnfd_connector_steps": 2}

    def __init__(self, student: Sequence[int], teacher: Sequence[int], group_size: int,
                 settings: StageSettings | None, recipe: ConnectorRecipe | None) -> None:
        super().__init__()
        self.group_size, self.settings, self.recipe = group_size, settings, recipe
        self.student_attention = nn.ModuleList(map(CBAM, student))
        self.teacher_attention = nn.ModuleList(map(CBAM, teacher)).requires_grad_(False)
        self.connectors = nn.ModuleList(map(connector, student, teacher)).requires_grad_(settings is None)

    @classmethod
    def build(cls, options: AttnFDOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> AttnFD:
        widths = ([net.channels[tap] for tap in TAPS] for net in (student, teacher))
        steps, settings = options.attnfd_connector_steps, None
        recipe = ConnectorRecipe(run.momentum, run.weight_decay, run.active["attnfd"])
        if steps != 0:
            settings = StageSettings(steps or 0, run.batch_size, 10 * run.lr, train_mode=True, seed=run.seed,
                                     depends_on=(*astuple(recipe), *common_dependencies(run)),
                                     save_every=run.save_per_iters, method="attnfd", result="connectors",
                                     shared_norm=run.sync_bn, lr_setting="lr")
        return cls(*widths, run.group_size, settings, recipe)

    def prepare(self, stage: Preparation) -> None:
        """Train the connectors for an epoch, or take them from the cache (:func:`losses.stages.stage.run_stage`)."""
        if self.settings is None:
            return
        steps = self.settings.steps or max(stage.images // self.settings.batch_size, 1)
        networks = stage.student, stage.teacher
        inputs = (repr(getattr(net, "preprocess", None)) for net in networks)
        settings = replace(self.settings, steps=steps, depends_on=(*self.settings.depends_on, *inputs))
        state = ConnectorState(self.connectors, networks, self.refined, self.compare, settings, self.recipe)
        with train_mode(stage.student):
            run_stage(stage, state, nn.ModuleList([*networks, self]), settings, role="both")
        state.freeze()

    def refined(self, student: SegOutput, teacher: SegOutput) -> tuple[list[Tensor], list[Tensor]]:
        """The maps of both networks after attention; the teacher's without a graph."""
        def refine(output: SegOutput, attention: nn.ModuleList) -> list[Tensor]:
            return [module(getattr(output, tap)) for tap, module in zip(TAPS, attention, strict=True)]

        with torch.no_grad():
            of_teacher = refine(teacher, self.teacher_attention)
        return refine(student, self.student_attention), of_teacher

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """:func:`attnfd_loss` of the student's maps, through the connectors, and the teacher's."""
        connected = [connect(x) for x, connect in zip(student, self.connectors, strict=True)]
        return attnfd_loss(connected, teacher, self.group_size)

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"attnfd": self.compare(*self.refined(batch.student, batch.teacher))}
