"""Queues of teacher vectors that outlive a step, for CIRKD and CIRKDv2, and the class means and pixels that fill them.

A queue belongs to a class and is written in the order of the images. Here all images and classes are written at once,
with the same result, and every process writes the vectors of all, so that the queues stay equal without being sent
around. Nothing here waits for the device or loops over classes or images.
"""
from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from losses.core.checks import at_least_float32, full_precision
from utils.distributed import is_distributed, rank_and_world
from utils.errors import UserError
from utils.randomness import step_generator

PRIORITIES = 2 ** 32  # random numbers below this order the pixels of a class


def gather_batch(x: Tensor) -> Tensor:
    """The tensors [B, ...], equally shaped, of all processes as one [processes * B, ...], in rank order, no graph."""
    if not is_distributed():
        return x.detach()
    x = x.detach().contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def random_unit_vectors(shape: tuple[int, ...], dtype: torch.dtype = torch.float32,
                        generator: torch.Generator | None = None) -> Tensor:
    """Vectors of length 1 along the last axis, in uniformly random directions, on the CPU."""
    vectors = torch.empty(math.prod(shape[:-1]), shape[-1], dtype=dtype)
    for part in vectors.split(65536):  # the queues of 182 classes have 4 million rows: no second copy in float32
        part.copy_(F.normalize(torch.randn(part.shape, generator=generator, dtype=torch.float32), dim=1))
    return vectors.view(shape)


def push_positions(pointer: Tensor, count: Tensor, size: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where pushes one after another go: (first slot int64 [N, K], pointer afterwards [K], bool [K] reached the end).

    pointer: int64 [K], below ``size``. count: int64 [N, K], the vectors of push i into queue k, at most ``most``. One
    that reaches the end (pointer + count >= size) takes the last ``count`` slots, and the pointer goes back to 0."""
    end = pointer + count.cumsum(0)
    restarted = torch.zeros_like(count, dtype=torch.bool)
    for _ in range(1 + (len(count) - 1) // math.ceil(size / most)):  # that often the end can be reached
        beyond = end >= size
        first = beyond & (beyond.cumsum(0) == 1)
        end = end - beyond * (end * first).sum(0)
        restarted |= first
    return torch.where(restarted, size, end) - count, end[-1], restarted.any(0)


class FeatureQueue(nn.Module):
    """One ring of ``size`` unit vectors per class, all buffers: ``queue`` [K, size, C], random at first, ``pointer``
    and ``filled`` (slots written since) [K]. classes: None = a single ring, with ``queue`` [size, C]."""

    def __init__(self, size: int, channels: int, classes: int | None = None, dtype: torch.dtype = torch.float32,
                 generator: torch.Generator | None = None) -> None:
        super().__init__()
        shape = (size, channels) if classes is None else (classes, size, channels)
        self.size = size
        self.register_buffer("queue", random_unit_vectors(shape, dtype, generator))
        for name in ("pointer", "filled"):
            self.register_buffer(name, torch.zeros(classes or 1, dtype=torch.long))

    @torch.no_grad()
    def push(self, rows: Tensor, count: Tensor) -> None:
        """Append, image after image, the first ``count[i, k]`` of ``rows[i, k]`` to the ring of class k. rows: float
        [N, K, n, C], UserError when n is above the size; count: int64 [N, K]."""
        images, classes, most, channels = rows.shape
        if most > self.size:
            raise UserError(f"a queue of {self.size} vectors cannot take {most} at once: expected {most} slots or more")
        start, pointer, restarted = push_positions(self.pointer, count, self.size, most)
        turn = torch.arange(most, device=rows.device)
        ring = torch.arange(classes, device=rows.device)[:, None] * self.size
        slot = ((start[..., None] + turn).clamp(max=self.size - 1) + ring).flatten()
        order = torch.arange(slot.numel(), dtype=torch.int32, device=rows.device)
        order = order.masked_fill((turn >= count[..., None]).flatten(), -1)
        # the last writer of a slot wins; places without a vector repeat what their slot gets anyway
        last = order.new_full((classes * self.size,), -1).scatter_reduce_(0, slot, order, "amax")[slot].long()
        table = self.queue.view(-1, channels)
        written = rows.reshape(-1, channels).to(table.dtype)[last.clamp(min=0)]
        table[slot] = torch.where(last[:, None] >= 0, written, table[slot])
        self.filled.copy_(torch.where(restarted, self.size, torch.maximum(self.filled, pointer)))
        self.pointer.copy_(pointer)

    def sample(self, order: Tensor, most: int, only_filled: bool = False) -> tuple[Tensor, Tensor | None]:
        """(vectors [K * n, C], usable bool [K * n] or None for all), n = min(most, size), classes one after another.

        order: a permutation of the slots, int64 [size], of which every class gives the first ones; only_filled: the
        first of its written ones, and where these are fewer than n, the surplus is marked unusable."""
        table = self.queue.view(len(self.filled), self.size, -1)
        most = min(most, self.size)
        if not only_filled:
            return table[:, order[:most]].flatten(0, 1), None
        written = order < self.filled[:, None]
        turn = torch.arange(self.size, device=order.device)
        first = (turn + self.size * ~written).topk(most, dim=1, largest=False, sorted=True).indices
        vectors = table.gather(1, order[first].unsqueeze(-1).expand(-1, -1, table.shape[-1]))
        return vectors.flatten(0, 1), written.gather(1, first).flatten()

    def filled_share(self) -> Tensor:
        """Scalar: written slots over all slots, 0 at the start."""
        return self.filled.float().mean() / self.size


def queue_names(module: nn.Module) -> set[str]:
    """Names in the state_dict of ``module`` of everything that belongs to a :class:`FeatureQueue`."""
    return {f"{name}.{buffer}" for name, queue in module.named_modules() if isinstance(queue, FeatureQueue)
            for buffer, _ in queue.named_buffers()}


def class_means(features: Tensor, members: Tensor) -> Tensor:
    """Mean direction [B, K, C] of each class in each image, of unit length; 0 where the class is absent. features:
    [B, P, C]; members: bool [B, K, P]."""
    features = at_least_float32(features)
    with full_precision(features):
        sums = members.to(features.dtype) @ features
        return F.normalize(sums / members.sum(-1, keepdim=True).clamp(min=1), dim=-1)


def pick_pixels(labels: Tensor, members: Tensor, most: int, priority: Tensor,
                as_released: bool = False) -> tuple[Tensor, Tensor]:
    """Up to ``most`` pixels per image and class: (position int64 [B, K, most], number of them int64 [B, K]).

    labels: int64 [B, P] of ``position_labels``; members: their ``class_members``. priority: int64 [B, P] in [0, 2^32);
    the lowest of a class are picked. Entries beyond the number hold any position. as_released: the published code draws
    from 0 .. pixels of the class - 1 but takes that for a position in the whole map: mostly pixels of other classes."""
    classes, positions = members.shape[1:]
    count = members.sum(-1)
    key = torch.where(labels < 0, classes, labels) * PRIORITIES + priority
    order = key.argsort(dim=-1)
    index = (count.cumsum(1) - count)[..., None] + torch.arange(most, device=labels.device)
    pixel = order.gather(1, index.clamp(max=positions - 1).flatten(1))
    if as_released:
        pixel = ((members.cumsum(-1) * members).sum(1) - 1).gather(1, pixel).clamp(min=0)
    return pixel.view(index.shape), count.clamp(max=most)


def take_pixels(features: Tensor, pixel: Tensor) -> Tensor:
    """The vectors [B, K, n, C] of features [B, P, C] at positions int64 [B, K, n]."""
    index = pixel.flatten(1).unsqueeze(-1).expand(-1, -1, features.shape[-1])
    return features.gather(1, index).view(*pixel.shape, -1)


def random_priorities(batch: int, positions: int, device: torch.device,
                      generator: torch.Generator | None = None) -> Tensor:
    """Int64 [batch, positions] for :func:`pick_pixels` on this process's images: its rows of what is drawn for all
    processes, so that with equally seeded generators an image's numbers do not depend on the number of processes."""
    rank, processes = rank_and_world()
    draw = torch.randint(PRIORITIES, (processes * batch, positions), device=device, generator=generator)
    return draw[rank * batch:(rank + 1) * batch]


def draw_slots(size: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """The order int64 [size] in which this process takes the slots of a queue: as released, every process draws its
    own. generator: equally seeded on all of them, and as far on afterwards; the first process takes what it draws."""
    order, rank = torch.randperm(size, device=device, generator=generator), rank_and_world()[0]
    if rank == 0 or generator is None:
        return order
    own = step_generator(device, generator.initial_seed(), "slots", rank)
    return order[torch.randperm(size, device=device, generator=own)]
