"""The stage before training of MasKD and FreeKD: learning the tokens of their masks on the frozen teacher, cached and
resumable.

The result lies in ``<method>_masks_<digest>.pth``, where the digest covers the teacher's weights and every setting that
the tokens depend on; a stage that was cut off lies beside it as ``..._partial.pth`` and goes on from there.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor, nn

from losses.distiller import Preparation
from models.output import SegOutput
from utils.distributed import average_gradients, broadcast_buffers, is_distributed, reduce_mean
from utils.errors import UserError
from utils.files import write_atomically
from utils.randomness import seed_everything, step_generator

MOMENTUM, WEIGHT_DECAY, POWER = 0.9, 1e-3, 0.9
#: standard deviation of the tokens at the start
INITIAL_STD = 0.01

StageLoss = Callable[[SegOutput, Tensor, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class StageSettings:
    """What the tokens depend on besides the teacher, and how often to save (which they do not depend on).

    steps, batch_size (all processes together), lr: of the stage. train_mode: the teacher normalises by the statistics
    of the batch and drops out, as in the released code. data: words that tell one training set from another, and
    whatever else the loss depends on. method: names files, messages and flags.
    """

    steps: int = 10000
    batch_size: int = 16
    lr: float = 0.1
    train_mode: bool = False
    seed: int = 0
    data: tuple = ()
    save_every: int = 800
    method: str = "maskd"


class StageState(nn.Module):
    """Tokens [..., K], their momentum [..., K] and the number of steps done, as buffers."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.register_buffer("tokens", tokens.detach().clone())
        self.register_buffer("velocity", torch.zeros_like(tokens))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, gradient: Tensor, lr: float) -> None:
        """One step of SGD with momentum and weight decay."""
        self.velocity.mul_(MOMENTUM).add_(gradient + WEIGHT_DECAY * self.tokens)
        self.tokens.sub_(lr * self.velocity)
        self.step += 1


def initial_tokens(count: int, classes: int, seed: int) -> Tensor:
    """Small normal numbers [count, classes], a function of the seed alone."""
    generator = step_generator(torch.device("cpu"), seed, "maskd tokens")
    return INITIAL_STD * torch.randn(count, classes, generator=generator)


def learn_tokens(stage: Preparation, tokens: Tensor, settings: StageSettings, loss: StageLoss) -> Tensor:
    """The learned tokens [..., K]: from the cache in ``stage.directory``, or trained from ``tokens`` on.

    loss(teacher output, tokens, target) -> {name: scalar}, whose sum is minimised. Called by every process; only the
    main one reads and writes files. Raises UserError when the tokens become infinite or a file is not readable.
    """
    _check_shares(settings)
    state = StageState(tokens).to(stage.device)
    final = partial = None
    if stage.is_main:
        name = f"{settings.method}_masks_{stage_digest(stage.teacher, settings, tokens.shape)}"
        final, partial = stage.directory / f"{name}.pth", stage.directory / f"{name}_partial.pth"
        _restore(state, final, partial, settings.method, stage.log)
    broadcast_buffers(state)
    if int(state.step) < settings.steps:
        with _mode(stage.teacher, settings.train_mode):
            _train(stage, state, settings, loss, partial)
        if stage.is_main:
            _save(state, final)
            partial.unlink(missing_ok=True)
            stage.log(f"{settings.method}: tokens in {final}")
    return state.tokens


def _train(stage: Preparation, state: StageState, settings: StageSettings, loss: StageLoss,
           partial: Path | None) -> None:
    done, log_every = int(state.step), max(1, settings.steps // 100)
    rank = torch.distributed.get_rank() if is_distributed() else 0
    for images, target in stage.batches(settings.steps, settings.batch_size, done):
        if settings.train_mode:
            seed_everything(settings.seed, f"{settings.method} stage", done, rank)  # of the teacher's dropout
        with torch.no_grad():
            output = stage.teacher(images)
        tokens = nn.Parameter(state.tokens.clone())
        values = loss(output, tokens, target)
        sum(values.values()).backward()
        average_gradients([tokens])
        state.update(tokens.grad, settings.lr * (1 - done / settings.steps) ** POWER)
        done += 1
        if done % log_every == 0 or done == settings.steps:
            mean = reduce_mean(torch.stack([v.detach() for v in values.values()])).tolist()
            shown = "  ".join(f"{name} {value:.4f}" for name, value in zip(values, mean, strict=True))
            stage.log(f"{settings.method}: masks, step {done}/{settings.steps}  {shown}")
            if not torch.isfinite(state.tokens).all():
                raise UserError(f"{settings.method}: the tokens became NaN or infinite by step {done} of the mask "
                                f"learning: try a lower --{settings.method}-lr")
        if partial is not None and done % settings.save_every == 0 and done < settings.steps:
            _save(state, partial)


def _check_shares(settings: StageSettings) -> None:
    world = torch.distributed.get_world_size() if is_distributed() else 1
    flag = f"--{settings.method}-batch-size {settings.batch_size}"
    if settings.batch_size % world:
        raise UserError(f"{flag} does not divide by {world} processes: use a multiple of {world}")
    if settings.train_mode and settings.batch_size // world < 2:
        raise UserError(f"{flag}: with --compat reference the teacher's batch norm needs at least 2 images per process "
                        "while the masks are learned")


@contextmanager
def _mode(teacher: nn.Module, training: bool) -> Iterator[None]:
    """The teacher in eval mode (or train mode); afterwards its mode and its statistics are what they were."""
    before = [(m, m.training) for m in teacher.modules()]
    kept = [(b, b.clone()) for b in teacher.buffers()] if training else []
    teacher.train(training)
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
        for module, mode in before:
            module.training = mode


def stage_digest(teacher: nn.Module, settings: StageSettings, shape: tuple[int, ...]) -> str:
    """16 hexadecimal digits of the teacher's weights, the settings and the shape of the tokens."""
    known = {k: v for k, v in asdict(settings).items() if k != "save_every"}
    known |= {"shape": list(shape), "preprocess": repr(getattr(teacher, "preprocess", None))}
    found = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode())
    for name, tensor in sorted(teacher.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def _save(state: StageState, path: Path) -> None:
    write_atomically(path, lambda p: torch.save(state.state_dict(), p))


def _restore(state: StageState, final: Path, partial: Path, method: str, log: Callable[[str], None]) -> None:
    for path in (final, partial):
        if path.is_file():
            saved = _read(path)
            try:
                state.load_state_dict(saved)
            except (RuntimeError, AttributeError, TypeError) as error:
                raise UserError(f"{path}: not a state of the mask-learning stage; delete it to learn anew") from error
            log(f"{method}: tokens of step {int(state.step)} from {path}")
            return


def _read(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the reader raise nearly anything
        raise UserError(f"{path}: not readable as a file of tokens") from error


def find_tokens(path: Path, flag: str, axes: int) -> Tensor:
    """The tokens in a file of this stage (``tokens``) or of the reference (``mask_token``), of the default float type.

    axes: how many the tensor has. flag: what the file was given by. Raises UserError when there is no such tensor.
    """
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    state = _read(path)
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
