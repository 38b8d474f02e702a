"""LAD's teacher: a network whose input has the label as a fourth channel, and the stage in which it learns.

A step shows it the same images with two label channels, whose codes and noise are independent, and minimizes

    CE(z_1) + CE(z_2) + 0.4 (CE(aux_1) + CE(aux_2)) + 5 (CWD(z_1, z_2) + CWD(z_2, z_1))

where CWD takes its second argument as constant. See ``stage.py``.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from losses.core.logit_losses import cwd_loss
from losses.core.task import SegCrossEntropyLoss, task_loss
from losses.stages.stage import StageSettings, TrainedState
from models.output import SegOutput
from models.preprocess import Preprocess
from models.weights import load_weights, save_state_dict
from utils.distributed import rank_and_world
from utils.randomness import seed_everything, step_generator

NOISE, AUX_WEIGHT, CONSISTENCY_WEIGHT = 0.03, 0.4, 5.0
PIXEL_SCALE = 100.0  #: size of a code of 1, in units of a pixel value 0..255


def fixed_codes(num_class: int) -> Tensor:
    """[K + 1] evenly spaced codes, the last one for "ignored": (k - (K + 1) / 2) / 10, for 21 classes as released;
    closer where they would leave [-2, 2], as the codes that the teacher learns with do."""
    count = num_class + 1
    return (torch.arange(count) - count / 2) * min(0.1, 4 / count)


def random_codes(batch: int, num_class: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """[B, K + 1] standard normal numbers: codes that every image has for itself."""
    return torch.randn(batch, num_class + 1, generator=generator, device=device)


def channel_scale(preprocess: Preprocess) -> float:
    """``PIXEL_SCALE`` in units of the preprocessed images: 100 for BGR minus mean, about 1.7 for RGB mean/std."""
    return PIXEL_SCALE / (preprocess.scale * sum(preprocess.std) / len(preprocess.std))


def with_labels(images: Tensor, target: Tensor, codes: Tensor, noise: float, scale: float | Tensor,
                ignore_label: int = -1, generator: torch.Generator | None = None) -> Tensor:
    """Images and, as fourth channel, ``scale * (code of the pixel's class + noise * n)``: float [B, 4, H, W]. images:
    float [B, 3, H, W]. target: int64 [B, H, W], classes 0..K-1 or ``ignore_label``. codes: [K + 1] or, one row per
    image, [B, K + 1]; the last one is for ignored pixels. n: a standard normal number per pixel, in float32."""
    ignored = codes.shape[-1] - 1
    index = torch.where(target == ignore_label, ignored, target).flatten(1)
    painted = codes.expand(len(target), -1).gather(1, index).view(target.shape)
    normal = torch.randn(target.shape, generator=generator, device=target.device)
    return torch.cat([images, (scale * (painted + noise * normal)).unsqueeze(1).to(images.dtype)], dim=1)


@dataclass(frozen=True)
class TeacherRecipe:
    """How the teacher learns beyond ``StageSettings``. power: exponent of the decay of lr; scale: of the label
    channel; group_size: images over whose labeled pixels the cross entropies are averaged (0 = all)."""
    momentum: float
    weight_decay: float
    power: float
    scale: float = PIXEL_SCALE
    ignore_label: int = -1
    group_size: int = 0


def teacher_losses(one: SegOutput, two: SegOutput, target: Tensor, ignore_label: int = -1,
                   group_size: int = 0) -> dict[str, Tensor]:
    """{"task", "aux" where there is such a head, "consistency"}: unweighted scalars; target: int64 [B, H, W]."""
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
        seed, (rank, _) = self._settings.seed, rank_and_world()
        seed_everything(seed, "lad stage", done, rank)  # of dropout
        generator = step_generator(images.device, seed, "lad stage noise", done, rank)
        outputs = []
        for _ in range(2):
            codes = random_codes(len(images), network.num_class, generator, images.device)
            labeled = with_labels(images, target, codes, NOISE, recipe.scale, recipe.ignore_label, generator)
            outputs.append(network(labeled))
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
