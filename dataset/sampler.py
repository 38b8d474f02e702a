"""Which sample comes when: a function of (seed, step), not of the number of workers or processes."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from utils.errors import UserError

MODES = ("reference", "epoch")
ORDER_STREAM = 0x0DE4  # keeps the order's random stream apart from that of the augmentation, which is (seed, ordinal)
UNLABELED_STREAM = 0x0DE5  # of the order of images without labels
FIRST_UNLABELED = 2**40  # ordinal of the first image without labels: no run has so many labeled samples


class TrainSampler(Sampler[list[tuple[int, int]]]):
    """Batch sampler of a whole training run, for ``DataLoader(batch_sampler=...)``.

    The run is one sequence of steps x B samples, numbered by their ordinal. The global batch of step s holds the
    ordinals [s·B, (s+1)·B); process r of w takes the rows [r·B/w, (r+1)·B/w) of it.

    length: number of images. batch_size: B, all processes together. steps: of the whole run (not of what is left).
    start_step: first step to yield, for a resumed run. mode: "reference": the list is repeated to steps x B entries
    and shuffled as a whole, so that images are not balanced over short spans; "epoch": every image once, in a new
    order, before any comes again. stream: tells orders of the same seed apart. Raises UserError for a value out of
    range or a batch that w does not divide.
    """

    def __init__(self, length: int, *, batch_size: int, steps: int, rank: int = 0, world_size: int = 1, seed: int = 0,
                 start_step: int = 0, mode: str = "reference", stream: int = ORDER_STREAM) -> None:
        if mode not in MODES:
            raise UserError(f"sampling mode '{mode}'; expected one of {', '.join(MODES)}")
        for name, value, least in (("number of images", length, 1), ("batch size", batch_size, 1), ("steps", steps, 0),
                                   ("seed", seed, 0), ("first step", start_step, 0), ("world size", world_size, 1)):
            if value < least:
                raise UserError(f"{name} {value}; expected at least {least}")
        if batch_size % world_size:
            raise UserError(f"batch size {batch_size} with {world_size} processes; expected a multiple of {world_size}")
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank}; expected 0..{world_size - 1}")
        self.length, self.batch_size, self.steps, self.seed = length, batch_size, steps, seed
        self.rank, self.world_size, self.start_step, self.mode = rank, world_size, start_step, mode
        self.stream = stream

    def __len__(self) -> int:
        """Number of steps that are left."""
        return max(self.steps - self.start_step, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch_size // self.world_size
        pick = self._reference_order() if self.mode == "reference" else self._epoch_order()
        for step in range(self.start_step, self.steps):
            first = step * self.batch_size + self.rank * share
            yield [(pick(ordinal), ordinal) for ordinal in range(first, first + share)]

    def _rng(self, *more: int) -> np.random.Generator:
        return np.random.default_rng((self.stream, self.seed, *more))

    def _reference_order(self) -> Callable[[int], int]:
        """The function ordinal -> image index."""
        order = self._rng().permutation(self.steps * self.batch_size)
        return lambda ordinal: int(order[ordinal]) % self.length

    def _epoch_order(self) -> Callable[[int], int]:
        current: dict[int, np.ndarray] = {}

        def pick(ordinal: int) -> int:
            epoch, position = divmod(ordinal, self.length)
            if epoch not in current:
                current.clear()
                current[epoch] = self._rng(epoch).permutation(self.length)
            return int(current[epoch][position])

        return pick


class MixedSampler(Sampler[list[tuple[int, int]]]):
    """Batches of a labeled set with images without labels behind them, for ``MixedDataset``.

    labeled: of the one set. unlabeled: of the other, as :class:`TrainSampler` for the same steps and processes; its
    order and the augmentation of its images are a stream of their own, so that those of the labeled images stay what
    they are. parts: a step goes through its batch in so many parts, and each has its share of either, labeled first.
    """

    def __init__(self, labeled: TrainSampler, unlabeled: TrainSampler, parts: int = 1) -> None:
        self.labeled, self.unlabeled, self.parts = labeled, unlabeled, parts

    def __len__(self) -> int:
        """Number of steps that are left."""
        return len(self.labeled)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for labeled, unlabeled in zip(self.labeled, self.unlabeled, strict=True):
            behind = [(self.labeled.length + index, FIRST_UNLABELED + ordinal) for index, ordinal in unlabeled]
            shares = zip(self._shares(labeled), self._shares(behind), strict=True)
            yield [key for share in shares for part in share for key in part]

    def _shares(self, keys: Sequence[tuple[int, int]]) -> list[Sequence[tuple[int, int]]]:
        size = len(keys) // self.parts
        return [keys[part * size:(part + 1) * size] for part in range(self.parts)]


class EvalSampler(Sampler[int]):
    """Every index exactly once over all processes: rank, rank + world_size, ...; none is repeated to even them out."""

    def __init__(self, length: int, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank} of {world_size} processes; expected 0..{world_size - 1}")
        self.indices = range(rank, length, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
