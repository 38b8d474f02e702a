"""AttnFD: attention-guided feature distillation (Mansourian et al., WACV 2026 workshop).

A convolutional block attention module (CBAM) refines a feature map F [B, C, h, w]:

    A = F * sigmoid(mlp(mean over positions) + mlp(max over positions)),   then   A * sigmoid(BN(conv7x7([max, mean])))

with the second max and mean over the channels. The loss compares the refined maps of both networks, the student's after
a 1x1 convolution and batch norm, each divided by its Frobenius norm over a group of N images:

    L = sum over the maps of  1/N |A_S / |A_S| - A_T / |A_T||^2

Kept from the released code: the teacher's CBAM is random, is never trained and normalizes by the batch; the
convolutions towards the teacher's width (connectors) start as N(0, sqrt(2 / C_t)), learn alone for one epoch, at the
run's learning rate and with a student in train mode, and are frozen before the student learns. Not kept: a teacher in
train mode and with gradients. ``run.as_released``: the linear layers of the student's CBAM are in no optimizer.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses import core
from losses.core import Batch, Distiller, Needs, NetInfo, OptionGroup, Preparation, RunFacts, Term, option, register
from losses.core.objective import resize_maps
from losses.stages.stage import StageSettings, TrainedState, run_stage, stage_settings, train_mode
from models.output import SegOutput
from utils.distributed import rank_and_world
from utils.randomness import seed_everything

TAPS = ("c4", "head")


class CBAM(nn.Module):
    """Channel attention (its hidden layer C / reduction wide), then spatial attention of a map [B, C, h, w]."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        self.conv = nn.Conv2d(2, 1, kernel_size=7, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(1, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.mlp(x.mean(dim=(2, 3))) + self.mlp(x.amax(dim=(2, 3)))
        x = x * scores.sigmoid()[:, :, None, None]
        summary = torch.cat([x.amax(dim=1, keepdim=True), x.mean(dim=1, keepdim=True)], dim=1)
        return x * self.bn(self.conv(summary)).sigmoid()


def connector(student_channels: int, teacher_channels: int) -> nn.Sequential:
    """1x1 convolution, of the released initialization, and batch norm, [B, C_s, h, w] -> [B, C_t, h, w]."""
    convolution = nn.Conv2d(student_channels, teacher_channels, 1, bias=False)
    nn.init.normal_(convolution.weight, std=(2 / teacher_channels) ** 0.5)
    return nn.Sequential(convolution, nn.BatchNorm2d(teacher_channels))


def attnfd_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], group_size: int = 0) -> Tensor:
    """Sum over the maps of the squared distance between student and teacher (no gradient) at unit length, per image.
    Maps: [B, C, h, w], pairwise of one shape or UserError. group_size: images whose maps share a length (0 = all)."""
    def distance(s: Tensor, t: Tensor) -> Tensor:  # [groups, images, C, h, w]
        images = s.shape[1]
        s, t = (F.normalize(x.flatten(1), dim=1) for x in (s, t))
        return (s - t).square().sum(dim=1).mean() / images

    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        core.check_maps("attnfd", s, t, channels=True)
        s, t = core.at_least_float32(s), core.at_least_float32(t.detach())
        total = total + core.mean_over_groups(distance, s, t, group_size)
    return total


@dataclass(frozen=True)
class AttnFDOptions(OptionGroup):
    attnfd_connector_steps: int | None = option(
        None, "steps of the stage that trains the convolutions towards the teacher's width, before they are frozen; 0: "
              "they learn with the student (default: one epoch)", at_least=0, metavar="N")


@dataclass(frozen=True)
class ConnectorRecipe:
    """How the connectors learn beyond ``StageSettings``. weight: of the term. The learning rate decays with this power
    over the iterations of the run, of which the released program counts the stage as the first ones."""
    momentum: float
    weight_decay: float
    weight: float
    power: float
    iterations: int


@register("attnfd")
class AttnFD(Distiller):
    """The last backbone stage and the last feature before the classifier (``head``: a 3x3 block after ASPP or pyramid
    pooling, whose own output the released code takes) of both networks. settings: of the stage in which the connectors
    learn, its steps 0 for one epoch, or None. recipe: of the stage."""
    title = "attention-guided feature distillation"
    paper = "Mansourian et al., Attention-guided Feature Distillation for Semantic Segmentation"
    year = 2024
    Options = AttnFDOptions
    terms = (Term("attnfd", 0.0, "weight of AttnFD's attention-refined features"),)
    needs = Needs.both(*TAPS, same_stride=True)
    # the authors' DeepLabV3+ runs: weight 2, no KD, and a weight decay of 5e-4. The term is divided by the images of a
    # group, theirs of 6 per process: groups of 2 (the default) make the same weight about three times as strong
    preset = {"*": {"lambda_attnfd": 2.0, "weight_decay": 5e-4}}
    cost = "attention on c4 and head of both networks, one 1x1 conv each; before training, an epoch of passes of both"
    trial = {"attnfd_connector_steps": 2}

    def __init__(self, options: AttnFDOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> None:
        super().__init__()
        self.group_size, self.settings, steps = run.group_size, None, options.attnfd_connector_steps
        self.recipe = ConnectorRecipe(run.momentum, run.weight_decay, run.active["attnfd"], run.poly_power,
                                      run.max_iterations)
        if steps != 0:
            self.settings = stage_settings(run, "attnfd", "connectors", steps or 0, run.batch_size, run.lr,
                                           *astuple(self.recipe), train_mode=True, shared_norm=run.sync_bn,
                                           lr_setting="lr")
        of_student, of_teacher = ([net.channels[tap] for tap in TAPS] for net in (student, teacher))
        self.student_attention = nn.ModuleList(map(CBAM, of_student))
        if run.as_released:
            for attention in self.student_attention:
                attention.mlp.requires_grad_(False)
        self.teacher_attention = nn.ModuleList(map(CBAM, of_teacher)).requires_grad_(False)
        self.connectors = nn.ModuleList(map(connector, of_student, of_teacher)).requires_grad_(steps == 0)

    def prepare(self, stage: Preparation) -> None:
        """Train the connectors for an epoch, or take them from the cache (:func:`losses.stages.stage.run_stage`)."""
        if self.settings is None:
            return
        steps = self.settings.steps or max(stage.images // self.settings.batch_size, 1)
        networks = stage.student, stage.teacher
        inputs = (repr(getattr(net, "preprocess", None)) for net in networks)
        settings = replace(self.settings, steps=steps, depends_on=(*self.settings.depends_on, *inputs))
        state = ConnectorState(self, networks, settings)
        with train_mode(stage.student):
            run_stage(stage, state, nn.ModuleList([*networks, self]), settings, role="both")
        state.freeze()

    def refined(self, student: SegOutput, teacher: SegOutput) -> tuple[list[Tensor], list[Tensor]]:
        """The maps of both networks after attention; the teacher's without a graph."""
        with torch.no_grad():
            of_teacher = [cbam(getattr(teacher, tap)) for tap, cbam in zip(TAPS, self.teacher_attention, strict=True)]
        return [cbam(getattr(student, tap)) for tap, cbam in zip(TAPS, self.student_attention, strict=True)], of_teacher

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """:func:`attnfd_loss` of the student's maps, through the connectors, and the teacher's."""
        connected = [connect(x) for x, connect in zip(student, self.connectors, strict=True)]
        return attnfd_loss(connected, teacher, self.group_size)

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"attnfd": self.compare(*self.refined(batch.student, batch.teacher))}


class ConnectorState(TrainedState):
    """The connectors in training, between the networks (student, which does not learn, and teacher)."""

    def __init__(self, method: AttnFD, networks: tuple[nn.Module, nn.Module], settings: StageSettings) -> None:
        recipe = method.recipe
        super().__init__(method.connectors, settings, recipe.momentum, recipe.weight_decay, recipe.power,
                         max(recipe.iterations, settings.steps))
        self._others = method, networks  # a tuple: they are no part of the state

    def learn(self, images: tuple[Tensor, Tensor], target: Tensor, done: int) -> dict[str, Tensor]:
        """One step on this process's share of (student's, teacher's) images float [B, 3, H, W]."""
        method, networks = self._others
        seed_everything(self._settings.seed, "attnfd stage", done, rank_and_world()[0])  # of the student's dropout
        with torch.no_grad():
            student, teacher = (net(x) for net, x in zip(networks, images, strict=True))
            maps = method.refined(resize_maps(student, teacher, TAPS), teacher)
        loss = method.compare(*maps)
        self.descend(method.recipe.weight * loss, done)
        return {"attnfd": loss}
