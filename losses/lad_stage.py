"""The stage before training of LAD: a teacher whose input has the label as a fourth channel.

A step shows it the same images with two label channels, whose codes and noise are independent, and minimises

    CE(z_1) + CE(z_2) + 0.4 (CE(aux_1) + CE(aux_2)) + 5 (CWD(z_1, z_2) + CWD(z_2, z_1))

where CWD takes its second argument as constant. ``stage.py`` has the loop, the cache and the resume.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from losses.cwd import cwd_loss
from losses.label_channel import random_codes, with_labels
from losses.stage import StageSettings, TrainedState
from losses.task import SegCrossEntropyLoss, task_loss
from models.output import SegOutput
from models.weights import load_weights, save_state_dict
from utils.distributed import place
from utils.randomness import seed_everything, step_generator

NOISE, AUX_WEIGHT, CONSISTENCY_WEIGHT = 0.03, 0.4, 5.0


@dataclass(frozen=True)
class TeacherRecipe:
    """How the teacher learns beyond ``StageSettings``: SGD, the exponent of the learning rate's decay, the scale of the
    label channel, the label of ignored pixels, the images over whose labelled pixels the cross entropies are averaged
    (0 = all)."""

    momentum: float = 0.9
    weight_decay: float = 1e-4
    power: float = 0.9
    scale: float = 100.0
    ignore_label: int = -1
    group_size: int = 0


def teacher_losses(one: SegOutput, two: SegOutput, target: Tensor, ignore_label: int = -1,
                   group_size: int = 0) -> dict[str, Tensor]:
    """{"task", "aux", "consistency"}: the unweighted scalars of the two outputs for labels int64 [B, H, W]; "aux" only
    where there is an auxiliary head."""
    criterion = SegCrossEntropyLoss(ignore_label, group_size)
    first, second = (task_loss(output, target, criterion) for output in (one, two))
    terms = {name: first[name] + second[name] for name in first}
    return {**terms, "consistency": cwd_loss(one.logits, two.logits) + cwd_loss(two.logits, one.logits)}


class TeacherState(TrainedState):
    """The network in training, on its device."""

    def __init__(self, network: nn.Module, settings: StageSettings, recipe: TeacherRecipe) -> None:
        super().__init__(network.train(), settings, recipe.momentum, recipe.weight_decay, recipe.power)
        self._recipe = recipe

    def learn(self, images: Tensor, target: Tensor, done: int) -> dict[str, Tensor]:
        """One step on this process's share: images float [B, 3, H, W], target int64 [B, H, W]."""
        recipe, network = self._recipe, self.module
        seed, (rank, _) = self._settings.seed, place()
        seed_everything(seed, "lad stage", done, rank)  # of dropout
        generator = step_generator(images.device, seed, "lad stage noise", done, rank)
        outputs = []
        for _ in range(2):
            codes = random_codes(len(images), network.num_class, generator, images.device)
            outputs.append(network(with_labels(images, target, codes, NOISE, recipe.scale, recipe.ignore_label,
                                               generator)))
        terms = teacher_losses(*outputs, target, recipe.ignore_label, recipe.group_size)
        weights = {"aux": AUX_WEIGHT, "consistency": CONSISTENCY_WEIGHT}
        self.descend(sum(weights.get(name, 1.0) * value for name, value in terms.items()), done)
        return terms

    def save_result(self, path: Path) -> None:
        """The network alone, as a plain weights file."""
        save_state_dict(self.module, path)

    def load_result(self, path: Path, steps: int) -> None:
        """A weights file of :meth:`save_result`."""
        load_weights(self.module, path)
        self.step.fill_(steps)
