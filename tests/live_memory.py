"""How much memory tensors hold at a time, counted operator by operator."""
from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of every tensor that operators make, for as long as something refers to it; real and fake ones.
    What an operator needs and frees inside is not seen."""

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.changes: list[tuple[int, int]] = []  # (number of the storage, bytes more or less), in order
        self.numbers = {x.untyped_storage()._cdata: -1 for x in inputs}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.numbers:
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        number = self.numbers[storage._cdata] = len(self.changes)
        self.changes.append((number, storage.nbytes()))
        weakref.finalize(storage, self._drop, storage._cdata, number, storage.nbytes())

    def _drop(self, key: int, number: int, size: int) -> None:
        del self.numbers[key]
        self.changes.append((number, -size))

    def peak(self, without: Iterable[Tensor] = ()) -> int:
        """The largest sum of bytes, without the inputs and some of what was made, such as gradients of parameters."""
        left_out = {self.numbers[x.untyped_storage()._cdata] for x in without}
        live = most = 0
        for number, size in self.changes:
            live += 0 if number in left_out else size
            most = max(most, live)
        return most
