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

import argparse
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses.dist import mean_over_groups
from losses.distiller import BuildContext, Distiller, Preparation, Term, check_taps, register
from losses.feature_mse import check_maps
from losses.stage import StageSettings, TrainedState, common_words, run_stage, train_mode
from losses.task import at_least_float32
from models.output import SegOutput
from utils.cli import number
from utils.distributed import place
from utils.errors import UserError
from utils.randomness import seed_everything

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
    for ours, theirs in zip(student, teacher, strict=True):
        check_maps("attnfd", ours, theirs, channels=True)
        ours, theirs = at_least_float32(ours), at_least_float32(theirs.detach())
        total = total + mean_over_groups(distance, ours, theirs, group_size)
    return total


@dataclass(frozen=True)
class ConnectorRecipe:
    """How the connectors learn beyond ``StageSettings``: SGD, and the weight of the term."""

    momentum: float = 0.9
    weight_decay: float = 5e-4
    weight: float = 2.0


class ConnectorState(TrainedState):
    """The connectors of a method in training, between a student that does not learn and its teacher."""

    def __init__(self, method: AttnFD, student: nn.Module, teacher: nn.Module, settings: StageSettings,
                 recipe: ConnectorRecipe) -> None:
        super().__init__(method.connectors, settings, recipe.momentum, recipe.weight_decay, power=0.0)
        self._others, self._weight = (method, student, teacher), recipe.weight  # a tuple: they are no part of the state

    def learn(self, images: tuple[Tensor, Tensor], target: Tensor, done: int) -> dict[str, Tensor]:
        """One step on this process's share of (student's, teacher's) images float [B, 3, H, W]."""
        method, student, teacher = self._others
        seed_everything(self._settings.seed, "attnfd stage", done, place()[0])  # of the student's dropout
        with torch.no_grad():
            ours, theirs = method.refined(student(images[0]), teacher(images[1]))
        loss = method.compare(ours, theirs)
        self.descend(self._weight * loss, done)
        return {"attnfd": loss}


@register("attnfd")
class AttnFD(Distiller):
    """The last backbone stage and the last feature before the classifier (``head``: a 3x3 block after ASPP or pyramid
    pooling, whose own output the released code takes) of both networks.

    student, teacher: (c4, head) channel counts. group_size: as in :func:`attnfd_loss`. settings, recipe: of the stage
    in which the connectors learn, its steps 0 for one epoch; None: they learn with the student.
    """

    title = "attention-guided feature distillation"
    paper = "Mansourian et al., Attention-guided Feature Distillation for Semantic Segmentation"
    year = 2024
    terms = (Term("attnfd", 0.0, "weight of AttnFD's attention-refined features"),)
    student_taps = TAPS
    teacher_taps = TAPS
    # the authors' DeepLabV3+ runs: weight 2, no KD, and a weight decay of 5e-4. They had 6 images per process, and the
    # term is divided by the images of a group: with --group-size 2 (the default) the same weight is about three times
    # as strong, and --group-size 6 on one process gives the published scale
    preset = {"*": {"lambda_attnfd": 2.0, "weight_decay": 5e-4}}
    cost = "attention on c4 and head of both networks, one 1x1 conv each; before training, an epoch of passes of both"
    quick = {"attnfd_connector_steps": 2}

    def __init__(self, student: Sequence[int], teacher: Sequence[int], group_size: int = 0,
                 settings: StageSettings | None = None, recipe: ConnectorRecipe | None = None) -> None:
        super().__init__()
        self.group_size, self.settings, self.recipe = group_size, settings, recipe or ConnectorRecipe()
        self.student_attention = nn.ModuleList(map(CBAM, student))
        self.teacher_attention = nn.ModuleList(map(CBAM, teacher)).requires_grad_(False)
        self.connectors = nn.ModuleList(map(connector, student, teacher)).requires_grad_(settings is None)

    @classmethod
    def add_arguments(cls, group: argparse._ArgumentGroup) -> None:
        group.add_argument("--attnfd-connector-steps", type=number(int, 0), default=None, metavar="N",
                           help="steps of the stage that trains the convolutions towards the teacher's width, before "
                                "they are frozen; 0: they learn with the student (default: one epoch)")

    @classmethod
    def build(cls, context: BuildContext) -> AttnFD:
        """Raises UserError when a network lacks c4 or head, or the strides differ."""
        check_taps(cls, context.student, context.teacher)
        if context.student.stride != context.teacher.stride:
            raise UserError(f"method 'attnfd': output stride {context.student.stride} of {context.student.name} and "
                            f"{context.teacher.stride} of {context.teacher.name}: expected equal numbers")
        widths = ([net.channels[tap] for tap in TAPS] for net in (context.student, context.teacher))
        o = context.options
        steps, settings = getattr(o, "attnfd_connector_steps", None), None
        recipe = ConnectorRecipe(getattr(o, "momentum", 0.9), getattr(o, "weight_decay", 5e-4),
                                 getattr(o, "lambda_attnfd", 2.0))
        if steps != 0:
            words = (*astuple(recipe), *common_words(context))
            settings = StageSettings(steps or 0, getattr(o, "batch_size", 16), 10 * getattr(o, "lr", 0.02),
                                     train_mode=True, seed=getattr(o, "seed", 0), words=words,
                                     save_every=getattr(o, "save_per_iters", 800), method="attnfd", result="connectors",
                                     shared_norm=getattr(o, "sync_bn", True), lr_option="lr")
        return cls(*widths, getattr(o, "group_size", 2), settings, recipe)

    def prepare(self, stage: Preparation) -> None:
        """Train the connectors for an epoch, or take them from the cache (:func:`losses.stage.run_stage`)."""
        if self.settings is None:
            return
        steps = self.settings.steps or max(stage.images // self.settings.batch_size, 1)
        seen = (repr(getattr(net, "preprocess", None)) for net in (stage.student, stage.teacher))
        settings = replace(self.settings, steps=steps, words=(*self.settings.words, *seen))
        state = ConnectorState(self, stage.student, stage.teacher, settings, self.recipe)
        with train_mode(stage.student):
            run_stage(stage, state, nn.ModuleList([stage.student, stage.teacher, self]), settings, role="both")
        state.freeze()

    def refined(self, student: SegOutput, teacher: SegOutput) -> tuple[list[Tensor], list[Tensor]]:
        """The maps of both networks after attention; the teacher's without a graph."""
        with torch.no_grad():
            theirs = [refine(getattr(teacher, tap)) for tap, refine in zip(TAPS, self.teacher_attention, strict=True)]
        return [refine(getattr(student, tap)) for tap, refine in zip(TAPS, self.student_attention, strict=True)], theirs

    def compare(self, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
        """:func:`attnfd_loss` of the student's maps, through the connectors, and the teacher's."""
        connected = [connect(x) for x, connect in zip(ours, self.connectors, strict=True)]
        return attnfd_loss(connected, theirs, self.group_size)

    def forward(self, student: SegOutput, teacher: SegOutput, target: Tensor, step: int,
                generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"attnfd": self.compare(*self.refined(student, teacher))}
