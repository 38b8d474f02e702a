"""The stage before training (see ``stage.py``) of MasKD and FreeKD: tokens of masks, learned on the frozen teacher."""
from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from losses.core.facts import Preparation
from losses.stages.stage import StageSettings, StageState, run_stage
from models.output import SegOutput
from utils.distributed import average_gradients, rank_and_world, synchronize_batch_norm
from utils.errors import UserError
from utils.randomness import seed_everything, step_generator
from utils.schedule import poly_lr
from utils.tensor_files import load_tensors

MOMENTUM, WEIGHT_DECAY, POWER = 0.9, 1e-3, 0.9
StageLoss = Callable[[SegOutput, Tensor, Tensor], dict[str, Tensor]]


class TokenState(StageState):
    """Tokens and their momentum [..., K], as buffers. loss(teacher output, tokens, target): scalars, to be summed."""

    def __init__(self, tokens: Tensor, teacher: nn.Module, settings: StageSettings, loss: StageLoss) -> None:
        super().__init__()
        self.register_buffer("tokens", tokens.detach().clone())
        self.register_buffer("velocity", torch.zeros_like(tokens))
        self._others, self._settings = (teacher, loss), settings  # a tuple: the teacher is no part of the state

    def learn(self, images: Tensor, target: Tensor, done: int) -> dict[str, Tensor]:
        """One step of SGD with momentum and weight decay."""
        settings, (teacher, loss) = self._settings, self._others
        if settings.train_mode:  # the teacher's dropout
            seed_everything(settings.seed, f"{settings.method} stage", done, rank_and_world()[0])
        with torch.no_grad():
            output = teacher(images)
        tokens = nn.Parameter(self.tokens.clone())
        values = loss(output, tokens, target)
        sum(values.values()).backward()
        average_gradients([tokens])
        with torch.no_grad():
            self.velocity.mul_(MOMENTUM).add_(tokens.grad + WEIGHT_DECAY * self.tokens)
            self.tokens.sub_(poly_lr(settings.lr, done, settings.steps, POWER) * self.velocity)
            self.step += 1
        return values


def initial_tokens(shape: tuple[int, ...], seed: int, method: str) -> Tensor:
    """Normal numbers of standard deviation 0.01 and a shape [..., K], a function of the seed and the method alone."""
    generator = step_generator(torch.device("cpu"), seed, f"{method} tokens")
    return 0.01 * torch.randn(*shape, generator=generator)


def learn_tokens(stage: Preparation, tokens: Tensor, settings: StageSettings, loss: StageLoss) -> Tensor:
    """The learned tokens [..., K]: from the cache, or trained from ``tokens`` on; see :func:`run_stage`."""
    settings = replace(settings, depends_on=(*settings.depends_on, *tokens.shape))
    state = TokenState(tokens, shown_teacher(stage, settings), settings, loss).to(stage.device)
    run_stage(stage, state, stage.teacher, settings)
    return state.tokens


def shown_teacher(stage: Preparation, settings: StageSettings) -> nn.Module:
    """The teacher as the stage runs it: as it is, or in train mode a copy, whose statistics may drift."""
    if not settings.train_mode:
        return stage.teacher
    teacher = copy.deepcopy(stage.teacher).train()
    return synchronize_batch_norm(teacher, stage.device) if settings.shared_norm else teacher


def hold_tokens(method: nn.Module, tokens: Tensor) -> None:
    """Make tokens [..., T, K] the buffer ``tokens`` of a method. The number T of a state that is loaded wins."""
    method.register_buffer("tokens", tokens)
    method._register_load_state_dict_pre_hook(_take_number, with_module=True)


def _take_number(method: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    own, saved = method.tokens, state.get(f"{prefix}tokens")
    if saved is not None and saved.ndim == own.ndim and saved.any():  # all 0: of a run whose weight for them was 0
        own.resize_(*own.shape[:-2], saved.shape[-2], own.shape[-1])  # in place: DDP knows this very tensor


def read_tokens(path: Path, shape: tuple[int | None, ...], setting: str) -> Tensor:
    """The tokens in a file of this stage (``tokens``) or of the reference (``mask_token``), of the default float type.
    shape: what is expected, None for any number. setting: of the file. UserError without such a tensor."""
    content = load_tensors(path.expanduser(), "file of tokens", [setting])
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = [v for k, v in content.items() if str(k).split(".")[-1] in ("tokens", "mask_token")]
    expected = "x".join("T" if side is None else str(side) for side in shape)
    if len(tensors) != 1 or not isinstance(tensors[0], Tensor) or tensors[0].ndim != len(shape) or not len(tensors[0]):
        raise UserError(f"{path}: expected one tensor {expected} named tokens or mask_token", settings=[setting])
    if any(side is not None and side != size for side, size in zip(shape, tensors[0].shape, strict=True)):
        raise UserError(f"{path}: tokens {'x'.join(map(str, tensors[0].shape))}, expected {expected} for this teacher "
                        "and data set", settings=[setting])
    return tensors[0].to(torch.get_default_dtype())
