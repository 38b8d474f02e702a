"""What a module holds: besides its parameters, remembered and put back; all of it, in a digest."""
from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class HeldState:
    """Buffers (batch-norm statistics, queues) and attributes of a module and its children, as they are now.

    Parameters are not copied, and attributes that are changed in place only where they are dicts or lists. device: of
    the copies of buffers; default: each where it is. The queues of some methods take gigabytes."""

    def __init__(self, module: nn.Module, device: str | None = None) -> None:
        self._buffers = [(buffer, buffer.detach().to(device or buffer.device, copy=True))
                         for buffer in module.buffers()]
        self._attributes = [(child, vars(child).copy()) for child in module.modules()]
        self._containers = [(value, value.copy()) for _, held in self._attributes for value in held.values()
                            if isinstance(value, (dict, list))]

    def restore(self) -> None:
        """Put everything back."""
        for child, held in self._attributes:
            vars(child).clear()
            vars(child).update(held)
        for value, held in self._containers:
            value.clear()
            (value.update if isinstance(value, dict) else value.extend)(held)
        with torch.no_grad():
            for buffer, held in self._buffers:
                buffer.copy_(held)


@contextmanager
def modules_kept(module: nn.Module) -> Iterator[None]:
    """Afterwards the module holds what it holds now, see :class:`HeldState`; the copies are on the CPU."""
    held = HeldState(module, "cpu")
    try:
        yield
    finally:
        held.restore()


def weights_digest(tensors: Mapping[str, Tensor], *also: object) -> str:
    """The first 16 hexadecimal digits of a digest of a state dict, as in :func:`add_weights`, and of the texts of other
    values."""
    digest = hashlib.sha256("".join(map(repr, also)).encode())
    add_weights(digest, tensors)
    return digest.hexdigest()[:16]


def add_weights(digest: hashlib._Hash, tensors: Mapping[str, Tensor]) -> None:
    """Let a digest depend on the names, shapes and values of a state dict."""
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
