"""AttnFD's stage before training: the convolutions towards the teacher's width (connectors) learn alone.

``stage.py`` has the loop, the cache and the resume.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from losses.stages.stage import StageSettings, TrainedState
from models.output import SegOutput
from utils.distributed import rank_and_world
from utils.randomness import seed_everything

Maps = tuple[list[Tensor], list[Tensor]]


@dataclass(frozen=True)
class ConnectorRecipe:
    """How the connectors learn beyond ``StageSettings``: SGD, and the weight of the term."""

    momentum: float
    weight_decay: float
    weight: float


class ConnectorState(TrainedState):
    """Connectors in training, between a student that does not learn and its teacher.

    refine(student's output, teacher's output): the maps of either that are compared. compare(maps, maps): the loss,
    through the connectors.
    """

    def __init__(self, connectors: nn.Module, networks: tuple[nn.Module, nn.Module],
                 refine: Callable[[SegOutput, SegOutput], Maps], compare: Callable[..., Tensor],
                 settings: StageSettings, recipe: ConnectorRecipe) -> None:
        super().__init__(connectors, settings, recipe.momentum, recipe.weight_decay, power=0.0)
        self._networks, self._weight = networks, recipe.weight  # a tuple: they are no part of the state
        self._refine, self._compare = refine, compare

    def learn(self, images: tuple[Tensor, Tensor], target: Tensor, done: int) -> dict[str, Tensor]:
        """One step on this process's share of (student's, teacher's) images float [B, 3, H, W]."""
        seed_everything(self._settings.seed, "attnfd stage", done, rank_and_world()[0])  # of the student's dropout
        with torch.no_grad():
            maps = self._refine(*(net(x) for net, x in zip(self._networks, images, strict=True)))
        loss = self._compare(*maps)
        self.descend(self._weight * loss, done)
        return {"attnfd": loss}
