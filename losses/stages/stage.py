"""A stage before training (masks of MasKD and FreeKD, connectors of AttnFD, teacher of LAD): loop, cache, resume.

The result lies in ``<method>_<result>_<digest>.pth``, where the digest covers the network that the stage starts from
and every setting that the result depends on; a stage that was cut off goes on from ``..._partial.pth`` beside it.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from losses.core.facts import Preparation, RunFacts
from utils.distributed import average_gradients, barrier, broadcast_state, rank_and_world, reduce_mean
from utils.errors import UserError
from utils.module_state import add_weights
from utils.schedule import poly_lr
from utils.tensor_files import load_tensors, save_tensors

VERSION = 1  #: to be raised when a stage computes something else from the same settings


@dataclass(frozen=True)
class StageSettings:
    """What the result depends on besides the network, and how often to save (which it does not depend on). batch_size:
    of all processes together. train_mode: a network normalizes by the statistics of the batch (shared_norm: of all
    processes) and drops out. method, result: name files and messages. lr_setting: of lr, if not <method>_lr."""
    steps: int
    batch_size: int
    lr: float
    train_mode: bool = False
    seed: int = 0
    depends_on: tuple = ()
    save_every: int = 0
    method: str = "stage"
    result: str = "result"
    shared_norm: bool = False
    lr_setting: str = ""


def stage_settings(run: RunFacts, method: str, result: str, steps: int, batch_size: int, lr: float,
                   *depends_on: object, **more) -> StageSettings:
    """Settings that hold what every stage depends on beside ``depends_on``, network and data."""
    depends_on = (*depends_on, run.sampling, run.ignore_label, run.group_size)
    return StageSettings(steps, batch_size, lr, seed=run.seed, depends_on=depends_on, save_every=run.save_per_iters,
                         method=method, result=result, **more)


class StageState(nn.Module):
    """Base of what a stage learns: parameters, buffers (step: steps done), with momentum and all else of a resume."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def learn(self, images: Tensor, target: Tensor, done: int) -> dict[str, Tensor]:
        """Step number ``done`` (from 0) on this process's share of a batch of ``Preparation.batches``, which adds 1 to
        ``step``. Returns {name: scalar} of the losses."""
        raise NotImplementedError

    def save_result(self, path: Path) -> None:
        """Write what :meth:`load_result` reads; by default the whole state."""
        self.save(path)

    def load_result(self, path: Path, steps: int) -> None:
        """Take over a finished result of so many steps. Raises UserError for another file."""
        self.restore(path)

    def save(self, path: Path) -> None:
        """Write the state of an unfinished stage, atomically. Raises UserError when it cannot be written."""
        save_tensors(path, self.state_dict())

    def restore(self, path: Path) -> None:
        """Go on from a file of :meth:`save`. Raises UserError for another one."""
        saved = load_tensors(path, "state of a stage before training")
        try:
            self.load_state_dict(saved)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise UserError(f"{path}: not a state of this stage; delete it to learn anew") from error


class TrainedState(StageState):
    """A module in training by SGD, on its device, with momentum in buffers. power: exponent of the decay of lr, to 0 at
    the end of so many iterations (default: of the stage)."""

    def __init__(self, module: nn.Module, settings: StageSettings, momentum: float, weight_decay: float,
                 power: float, iterations: int | None = None) -> None:
        super().__init__()
        self.module, self._settings = module.requires_grad_(True), settings
        self._decay = iterations or settings.steps, power
        self.step = self.step.to(next(module.parameters()).device)
        self._optimizer = torch.optim.SGD(module.parameters(), settings.lr, momentum, weight_decay=weight_decay)
        for i, parameter in enumerate(module.parameters()):
            self.register_buffer(f"momentum_{i}", torch.zeros_like(parameter))
            # the optimizer adds to this very tensor, so that saving and restoring the buffers is enough
            self._optimizer.state[parameter]["momentum_buffer"] = self.get_buffer(f"momentum_{i}")

    def descend(self, loss: Tensor, done: int) -> None:
        """One step of all processes against the mean of their losses, which adds 1 to ``step``."""
        self._optimizer.param_groups[0]["lr"] = poly_lr(self._settings.lr, done, *self._decay)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self.module.parameters())
        self._optimizer.step()
        self.step += 1

    def freeze(self) -> None:
        """End of the training: no gradients, neither asked for nor kept."""
        self.module.requires_grad_(False).zero_grad(set_to_none=True)


@contextmanager
def train_mode(net: nn.Module) -> Iterator[None]:
    """A network in train mode; afterwards its mode and its buffers (statistics) are what they were."""
    before = [(m, m.training) for m in net.modules()]
    kept = [(b, b.clone()) for b in net.buffers()]
    net.train()
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
        for module, mode in before:
            module.training = mode


def run_stage(stage: Preparation, state: StageState, net: nn.Module, settings: StageSettings,
              role: str = "teacher") -> None:
    """Bring ``state`` (on ``stage.device``) to its last step: from the cache in ``stage.directory``, or by training.
    net: the network that the result depends on, as it is before the stage. role: whose images the batches hold. Called
    by every process; the main one reads and writes files. UserError: an infinite result, an unreadable file."""
    partial = None
    if stage.is_main_process:
        name = f"{settings.method}_{settings.result}_{stage_digest(net, settings, stage.data)}"
        final, partial = stage.directory / f"{name}.pth", stage.directory / f"{name}_partial.pth"
        if final.is_file():
            state.load_result(final, settings.steps)
        elif partial.is_file():
            state.restore(partial)
        if int(state.step):
            stage.log(f"{settings.method}: {settings.result} of step {int(state.step)} from "
                      f"{final if final.is_file() else partial}")
    broadcast_state(state)
    if int(state.step) < settings.steps:
        _train(stage, state, settings, partial, role)
        broadcast_state(state)  # statistics of a batch norm may have gone apart
        if stage.is_main_process:
            state.save_result(final)
            partial.unlink(missing_ok=True)
            stage.log(f"{settings.method}: {settings.result} in {final}")


def _train(stage: Preparation, state: StageState, settings: StageSettings, partial: Path | None, role: str) -> None:
    done, log_every = int(state.step), max(1, settings.steps // 100)
    for images, target in _until_stopped(stage, state, settings, partial, role):
        values = state.learn(images, target, done)
        done += 1
        logs = done % log_every == 0 or done == settings.steps
        saves = settings.save_every and done % settings.save_every == 0 and done < settings.steps
        if logs:
            mean = reduce_mean(torch.stack([v.detach() for v in values.values()])).tolist()
            shown = "  ".join(f"{name} {value:.4f}" for name, value in zip(values, mean, strict=True))
            stage.log(f"{settings.method}: {settings.result}, step {done}/{settings.steps}  {shown}")
        if logs or saves:
            _check_finite(state, settings, done)
        if saves and partial is not None:
            state.save(partial)


def _until_stopped(stage: Preparation, state: StageState, settings: StageSettings, partial: Path | None,
                   role: str) -> Iterator[tuple[Tensor | tuple[Tensor, Tensor], Tensor]]:
    """The remaining batches. SystemExit between two of them, in every process, ends the stage: its state is saved."""
    try:
        yield from stage.batches(settings.steps, settings.batch_size, int(state.step), role)
    except SystemExit:
        _check_finite(state, settings, int(state.step))
        if partial is not None:
            state.save(partial)
            stage.log(f"{settings.method}: {settings.result} of step {int(state.step)} in {partial}")
        barrier()  # a launcher may end all processes when the first one has ended
        raise


def _check_finite(state: StageState, settings: StageSettings, done: int) -> None:
    if not all(t.isfinite().all() for t in (*state.parameters(), *state.buffers())):
        raise UserError(f"{settings.method}: the {settings.result} became NaN or infinite by step {done} of the stage "
                        "before training: try a lower learning rate",
                        settings=[settings.lr_setting or f"{settings.method}_lr"])


def check_shares(settings: StageSettings) -> StageSettings:
    """The settings. UserError when the processes cannot share the batches, or batch norm cannot train on a share."""
    world, batch = rank_and_world()[1], settings.batch_size
    where, setting = f"{settings.method}: the stage before training", [f"{settings.method}_batch_size"]
    if batch % world:
        raise UserError(f"{where}: a batch of {batch} does not divide by {world} processes: use a multiple of {world}",
                        settings=setting)
    together = batch // (1 if settings.shared_norm and world > 1 else world)
    if settings.train_mode and together < 2:
        raise UserError(f"{where}: a batch of {batch} leaves one image per batch norm: expected at least 2 per process",
                        settings=setting)
    return settings


def stage_digest(net: nn.Module, settings: StageSettings, data: str) -> str:
    """16 hexadecimal digits of a network's weights, the settings and the training set."""
    known = asdict(settings)
    del known["save_every"]
    # the names of the first release: a digest finds the files of earlier runs
    known |= {"words": known.pop("depends_on"), "lr_option": known.pop("lr_setting"),
              "preprocess": repr(getattr(net, "preprocess", None)), "data": data, "version": VERSION}
    if settings.train_mode and not settings.shared_norm:  # batch norm sees the images of one process
        known["processes"] = rank_and_world()[1]
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode())
    add_weights(digest, net.state_dict())
    return digest.hexdigest()[:16]
