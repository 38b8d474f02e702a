"""The stage before training of MasKD and FreeKD: learning the tokens of their masks on the frozen teacher.

``stage.py`` has the loop, the cache and the resume.
"""
from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from losses.distiller import Preparation
from losses.stage import StageSettings, StageState, read_file, run_stage, train_mode
from models.output import SegOutput
from utils.distributed import average_gradients, place
from utils.errors import UserError
from utils.randomness import seed_everything, step_generator
from utils.step import poly_lr

MOMENTUM, WEIGHT_DECAY, POWER = 0.9, 1e-3, 0.9
#: standard deviation of the tokens at the start
INITIAL_STD = 0.01

StageLoss = Callable[[SegOutput, Tensor, Tensor], dict[str, Tensor]]


class TokenState(StageState):
    """Tokens [..., K], their momentum [..., K] and the number of steps done, as buffers.

    loss(teacher output, tokens, target) -> {name: scalar}, whose sum is minimised.
    """

    def __init__(self, tokens: Tensor, teacher: nn.Module, settings: StageSettings, loss: StageLoss) -> None:
        super().__init__()
        self.register_buffer("tokens", tokens.detach().clone())
        self.register_buffer("velocity", torch.zeros_like(tokens))
        self._teach, self._loss, self._settings = teacher.__call__, loss, settings  # the teacher is no part of it

    def learn(self, images: Tensor, target: Tensor, done: int) -> dict[str, Tensor]:
        """One step of SGD with momentum and weight decay."""
        settings = self._settings
        if settings.train_mode:
            seed_everything(settings.seed, f"{settings.method} stage", done, place()[0])  # of the teacher's dropout
        with torch.no_grad():
            output = self._teach(images)
        tokens = nn.Parameter(self.tokens.clone())
        values = self._loss(output, tokens, target)
        sum(values.values()).backward()
        average_gradients([tokens])
        with torch.no_grad():
            self.velocity.mul_(MOMENTUM).add_(tokens.grad + WEIGHT_DECAY * self.tokens)
            self.tokens.sub_(poly_lr(settings.lr, done, settings.steps, POWER) * self.velocity)
            self.step += 1
        return values


def initial_tokens(count: int, classes: int, seed: int) -> Tensor:
    """Small normal numbers [count, classes], a function of the seed alone."""
    generator = step_generator(torch.device("cpu"), seed, "maskd tokens")
    return INITIAL_STD * torch.randn(count, classes, generator=generator)


def learn_tokens(stage: Preparation, tokens: Tensor, settings: StageSettings, loss: StageLoss) -> Tensor:
    """The learned tokens [..., K]: from the cache in ``stage.directory``, or trained from ``tokens`` on.

    loss: see :class:`TokenState`. Called by every process. Raises UserError as :func:`losses.stage.run_stage` does.
    """
    settings = replace(settings, words=(*settings.words, *tokens.shape))
    state = TokenState(tokens, stage.teacher, settings, loss).to(stage.device)
    with train_mode(stage.teacher) if settings.train_mode else nullcontext():
        run_stage(stage, state, stage.teacher, settings)
    return state.tokens


def find_tokens(path: Path, flag: str, axes: int) -> Tensor:
    """The tokens in a file of this stage (``tokens``) or of the reference (``mask_token``), of the default float type.

    axes: how many the tensor has. flag: what the file was given by. Raises UserError when there is no such tensor.
    """
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    state = read_file(path)
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    found = [v for k, v in state.items() if str(k).split(".")[-1] in ("tokens", "mask_token")]
    if len(found) != 1 or not isinstance(found[0], Tensor) or found[0].ndim != axes or not len(found[0]):
        kind = "matrix" if axes == 2 else f"tensor of {axes} axes"
        raise UserError(f"{flag} {path}: expected one {kind} named tokens or mask_token")
    return found[0].to(torch.get_default_dtype())


def read_tokens(path: Path, classes: int) -> Tensor:
    """MasKD's tokens [T, classes] from a file (:func:`find_tokens`).

    Raises UserError when there are none, or they are for another number of classes.
    """
    tokens = find_tokens(path, "--maskd-masks", 2)
    if tokens.shape[1] != classes:
        raise UserError(f"--maskd-masks {path}: tokens of {tokens.shape[1]} classes, the data set has {classes}")
    return tokens
