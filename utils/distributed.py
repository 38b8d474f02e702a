"""Processes, devices and the few collective operations that training and evaluation need."""
from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # now: imported later, it would keep the group of that moment as a default
from torch import Tensor, nn

from utils.errors import UserError


@dataclass(frozen=True)
class Distributed:
    """Rank and device of this process. ``world_size`` 1 means that no process group exists."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main_process(self) -> bool:
        """True on the one process that prints and writes files."""
        return self.rank == 0


def init_distributed(no_cuda: bool = False, gpu: int | None = None, timeout: float = 1800) -> Distributed:
    """Join the process group that ``torchrun`` describes in the environment (NCCL with one GPU per process, gloo on
    CPU), or stand alone. gpu: of a single process. timeout: seconds that a process waits for another. UserError when a
    node has more processes than GPUs, or the environment describes half a group."""
    check_environment()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0 if gpu is None else gpu))
    cuda = torch.cuda.is_available() and not no_cuda
    if cuda and local >= torch.cuda.device_count():
        raise UserError(f"process {rank} wants GPU {local} but this node has {torch.cuda.device_count()}: "
                        "start as many processes per node as there are GPUs (or pass --no-cuda)")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
        limit, store = timedelta(seconds=timeout), None
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun keeps its store after a restart: addresses of processes that have gone must not be found in it
            attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
            server = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=limit)
            store = dist.PrefixStore(attempt, server)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=limit, store=store,
                                **({} if store is None else {"rank": rank, "world_size": world}))
    return Distributed(rank, world, local, device)


def check_environment() -> None:
    """UserError for several processes without a launcher: variables that somebody has set, or left behind."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        if not os.environ.get(name, "0").isdecimal():
            raise UserError(f"environment variable {name}={os.environ[name]!r}: expected a number; torchrun sets it")
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if os.environ.get("WORLD_SIZE", "1") != "1" and missing:
        world, program = os.environ["WORLD_SIZE"], os.path.basename(sys.argv[0])
        raise UserError(f"WORLD_SIZE={world} is set, but not {', '.join(missing)}: start with torchrun "
                        f"--nproc_per_node {world} {program} ..., or unset WORLD_SIZE for a single process")


def cleanup() -> None:
    """Leave the process group, if there is one, when every process has come here and nothing uses it any more.

    gloo's threads let go of the tensors of an operation after the operation has ended, for which they need the
    interpreter's lock: while Python shuts down, that aborts the process. They end with the group, so every reference to
    it has to go: that of DDP, which hangs in a cycle, and ours last, since only Python's own wrapper waits for the
    threads without holding the lock. A caller must not hold a DDP module."""
    barrier()
    if dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
        dist.destroy_process_group()
        gc.collect()
        del group


def is_distributed() -> bool:
    """True when a process group with more than one process exists."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank_and_world() -> tuple[int, int]:
    """(rank, number of processes) of this process; (0, 1) when it stands alone."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def available_cpus() -> int:
    """Number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def barrier() -> None:
    """Wait for every process."""
    if is_distributed():
        dist.barrier()


def reduce_mean(values: Tensor) -> Tensor:
    """Mean of a tensor over the processes (a new tensor; the input itself when standing alone)."""
    if not is_distributed():
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def gathered(value: Any) -> list[Any]:
    """What every process calls this with, by rank; plain values."""
    found = [value]
    if is_distributed():
        found *= dist.get_world_size()
        dist.all_gather_object(found, value)
    return found


def same_everywhere(number: int, device: torch.device) -> bool:
    """True when every process calls this with the same number."""
    if not is_distributed():
        return True
    both = torch.tensor([number, -number], device=device)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return bool(both[0] == -both[1])


class LargestEverywhere:
    """Largest of the numbers that the processes call this with, at the same places of the program.

    On GPUs the answer is that of the call before (0 at first): waiting for the present one would keep the processes
    from preparing the next step while the device works."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None

    def __call__(self, number: int) -> int:
        if not is_distributed():
            return number
        value = self._reduced(number)
        if self.device.type != "cuda":
            return int(value)
        host = torch.empty(1, dtype=torch.int32, pin_memory=True).copy_(value, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        before, self._pending = self._pending, (host, event)
        if before is None:
            return 0
        before[1].synchronize()
        return int(before[0])

    def now(self, number: int) -> int:
        """The present answer; on a GPU it waits for the device."""
        return int(self._reduced(number)) if is_distributed() else number

    def _reduced(self, number: int) -> Tensor:
        value = torch.full((1,), number, dtype=torch.int32, device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return value


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace the gradients by their mean over the processes (for parameters that DDP does not look after)."""
    if is_distributed():
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def keep_strides(module: nn.Module) -> None:
    """Have gradients come with the strides of their parameters, which DDP compares. Where a dimension has size 1 (1x1
    and depthwise convolutions), oneDNN writes other ones for the same order in memory, and DDP would warn of them."""
    for parameter in module.parameters():
        if parameter.requires_grad and 1 in parameter.shape and parameter.is_contiguous():
            parameter.register_hook(lambda gradient: gradient.reshape(-1).view(gradient.shape))


def send_in_bf16(_, bucket):  # no annotations: DDP refuses them as text
    """Hook of DDP: from a ``GradBucket`` to a future of the mean over the processes, rounded to bfloat16 on the way.
    (torch's own works with NCCL only.)"""
    sent = bucket.buffer().to(torch.bfloat16).div_(dist.get_world_size())
    future = dist.all_reduce(sent, async_op=True).get_future()
    return future.then(lambda done: bucket.buffer().copy_(done.value()[0]))


class MeanInOneOrder:
    """Hook of DDP like :func:`send_in_bf16`, for a mean that is the same to the last bit however DDP divides the
    gradients: it does so in another way after the first step of a process, and in which order a sum of more than two is
    made depends on where in its part a value lies. So all are sent as one, in the order of the parameters.

    dtype: what they are rounded to on the way, None for none."""

    def __init__(self, parameters: Iterable[nn.Parameter], dtype: torch.dtype | None = None) -> None:
        self._place, self._dtype = {id(p): i for i, p in enumerate(parameters)}, dtype
        self._waiting = []  # (part of the gradients, what DDP waits for), since the first of this step

    def mean(self, _, bucket):  # no annotations, as above
        """The future of a part; all of them end with the last."""
        future = torch.futures.Future()
        self._waiting.append((bucket, future))
        if bucket.is_last():
            waiting, self._waiting = self._waiting, []
            self._average([part for part, _ in waiting])
            for part, done in waiting:
                done.set_result(part.buffer())
        return future

    def _average(self, buckets: Iterable[dist.GradBucket]) -> None:
        found = [(self._place[id(p)], values) for bucket in buckets for p, values in zip(
            bucket.parameters(), bucket.buffer().split([p.numel() for p in bucket.parameters()]), strict=True)]
        ordered = [values for _, values in sorted(found, key=lambda one: one[0])]
        sent = torch.cat(ordered).to(self._dtype or ordered[0].dtype).div_(dist.get_world_size())
        dist.all_reduce(sent)
        for values, mean in zip(ordered, sent.split([len(values) for values in ordered]), strict=True):
            values.copy_(mean)


def broadcast_buffers(module: nn.Module) -> None:
    """Give every process rank 0's buffers (batch-norm statistics that were not synchronized)."""
    if is_distributed():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def broadcast_state(module: nn.Module) -> None:
    """Give every process rank 0's parameters and buffers."""
    broadcast_buffers(module)
    if is_distributed():
        for parameter in module.parameters():
            dist.broadcast(parameter.data, 0)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes. Its gradient is the sum of theirs, and has one itself."""

    @staticmethod
    def forward(_, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_, gradient: Tensor) -> Tensor:
        return _SumOverProcesses.apply(gradient)


def centered_over_processes(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x - mean, mean [C], variance [C], count) of [B, C, h, w] over images and positions of every process, in float32
    or wider. Gradients, also second ones, equal those of one process with the whole batch."""
    def total(values: Tensor) -> Tensor:
        return _SumOverProcesses.apply(values) if is_distributed() else values

    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    sums = total(torch.cat([wide.sum((0, 2, 3)), wide.new_full((1,), wide.numel() / wide.shape[1])]))
    mean, count = sums[:-1] / sums[-1], sums[-1].detach()
    centered = wide - mean[:, None, None]
    return centered, mean, total(centered.square().sum((0, 2, 3))) / count, count


class CrossProcessBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the images of every process, for CPUs, where torch has no ``SyncBatchNorm``.

    Input [B, C, h, w]. Statistics and gradients equal those of one process that holds the whole batch (up to rounding).
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and is_distributed()):
            return super().forward(x)
        centered, mean, var, count = centered_over_processes(x)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((var * count / (count - 1)).to(self.running_var.dtype), self.momentum)
        scale = (self.weight * torch.rsqrt(var + self.eps))[:, None, None]
        return (centered * scale + self.bias[:, None, None]).to(x.dtype)


def synchronize_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Make every batch norm of a module use the statistics of all processes. Parameters and names stay the same."""
    if device.type == "cuda":
        hooks = {name: (child._forward_pre_hooks, child._forward_pre_hooks_with_kwargs, child._forward_hooks)
                 for name, child in module.named_modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)}
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        for name, child in module.named_modules():
            if name in hooks:  # which the new modules come without
                child._forward_pre_hooks, child._forward_pre_hooks_with_kwargs, child._forward_hooks = hooks[name]
        return module
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = CrossProcessBatchNorm2d
    return module
