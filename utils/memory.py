"""Bytes of the tensors that are alive on a device, and their peak, counted operation by operation."""
from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: what PyTorch's allocator of GPU memory rounds up to
BLOCK = 512


def _cdist_buffer(gradient: Tensor, x1: Tensor, *_: Any) -> int:
    """CUDA expands the differences of all pairs of rows, [..., Q, Q, D], before it adds them up."""
    return gradient.numel() * x1.shape[-1] * x1.element_size()


#: memory that an operation on a GPU takes while it runs: what is known from PyTorch's source and large here
WORKSPACES: dict[Any, Callable[..., int]] = {torch.ops.aten._cdist_backward.default: _cdist_buffer}


class MemoryTracker(TorchDispatchMode):
    """Context that follows the storages of new tensors until they are freed. now, peak: bytes; each storage is rounded
    up to ``BLOCK``. Storages made before are not counted unless one is put out by an operation, as by a view.

    device_type: of the tensors that count. known: tensors made before that never count. workspaces: count the known
    ones of operations (:data:`WORKSPACES`). Not counted: other workspaces (cuDNN's), gaps between blocks, the CUDA
    context."""

    def __init__(self, device_type: str, workspaces: bool = True, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._known = {x.untyped_storage()._cdata for x in known}
        self.device_type, self.workspaces = device_type, workspaces
        self.now = self.peak = 0
        self._alive: dict[int, tuple[int, weakref.ref]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.device.type == self.device_type:
                self._follow(x.untyped_storage())
        if self.workspaces and func in WORKSPACES:
            self.peak = max(self.peak, self.now + WORKSPACES[func](*args, **(kwargs or {})))
        return result

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive and key not in self._known:
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            self._alive[key] = size, weakref.ref(storage, partial(self._freed, key))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _freed(self, key: int, _: weakref.ref) -> None:
        self.now -= self._alive.pop(key)[0]
