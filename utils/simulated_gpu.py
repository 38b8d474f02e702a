"""A GPU that is not there: tensors with shapes, types and a CUDA device but without values, on any build of PyTorch.

    with simulated_gpu() as device:
        net.to(device)(torch.rand(2, 3, 64, 64, device=device)).sum().backward()

Whatever asks a tensor for its values (``item``, ``if tensor``, ``nonzero``, a boolean index) raises, since there are
none. :class:`NoHostWaits` refuses what would run but make the host wait for a real GPU or fail on one. Based on
PyTorch's fake tensors, which lack three things: a build without CUDA has no device guard, so that autograd and indexing
fail, no generators on the device, and no autocast (``utils/simulated_autocast.py``).
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._foreach_utils import _foreach_supported_types
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from utils.simulated_autocast import simulated_autocast

DEVICE = torch.device("cuda", 0)
#: what C++ is told instead of DEVICE: a device without guard, streams and threads of its own
_STAND_IN = torch.device("meta")
aten = torch.ops.aten
_GPU_TO_HOST_OR_BACK = (aten._to_copy.default, aten.copy_.default)
_FUSED_STEPS = (aten._fused_sgd_.default, aten._fused_sgd_.tensor_lr)
_INDEXED_WRITES = (aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class HostWait(RuntimeError):
    """The host would wait for the GPU."""


class WrongDevice(RuntimeError):
    """Tensors or generators of different devices meet."""


class _Mode(FakeTensorMode):
    """Fake tensors whose device is a GPU for Python, and the stand-in for C++."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=False)
        # it would keep weak references to parameters, which can then not be moved to the device
        self.fake_tensor_converter.set_tensor_memo = lambda tensor, fake: None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            device = args[0].fake_device
            return _STAND_IN if device.type == DEVICE.type else device
        if func is aten._local_scalar_dense.default and args[0].device.type == "cpu" and args[0].constant is None:
            return 1  # the host has it at hand: no wait, and any number will do (Adam's count of steps)
        if func in _FUSED_STEPS:
            return None  # they change values only
        if kwargs.get("device") == _STAND_IN:
            kwargs = {**kwargs, "device": DEVICE}
        return super().__torch_dispatch__(func, types, args, kwargs)


class _OnGPU(TorchFunctionMode):
    """What C++ would decide by the devices of tensors and generators, which it does not know."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func == Tensor.is_cuda.__get__:
            return args[0].device.type == DEVICE.type
        if func == Tensor.is_meta.__get__:
            return False
        if func is Tensor.__setitem__ and isinstance(args[2], (bool, int, float)):
            args = (*args[:2], torch.tensor(args[2], dtype=args[0].dtype))  # stays on the CPU, as with a real GPU
        result, generator = func(*args, **(kwargs or {})), (kwargs or {}).get("generator")
        if generator is not None and isinstance(result, Tensor) and result.device.type != generator.device.type:
            raise WrongDevice(f"{func}: a generator on {generator.device} for a tensor on {result.device}")
        return result


class _Generator(torch.Generator):
    """A generator that says it is on the GPU."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        if torch.device(device).type != DEVICE.type:
            return _REAL_GENERATOR(device)
        return super().__new__(cls)

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:
        """The simulated GPU."""
        return DEVICE


_REAL_GENERATOR = torch.Generator


@contextmanager
def simulated_gpu() -> Iterator[torch.device]:
    """Inside, new tensors have no values and the yielded device can be used. Not to be nested. Raises
    :class:`WrongDevice` for a generator that is not on the device of the tensor that it fills."""
    with ExitStack() as stack:
        for target, name, value in (
                (torch, "Generator", _Generator), (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
                (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)):
            stack.enter_context(mock.patch.object(target, name, value))
        _foreach_supported_types.append(FakeTensor)  # optimizers then work as on tensors of a real GPU
        stack.callback(_foreach_supported_types.remove, FakeTensor)
        stack.enter_context(simulated_autocast())
        stack.enter_context(_Mode())
        stack.enter_context(_OnGPU())
        yield DEVICE


class NoHostWaits(TorchDispatchMode):
    """Within :func:`simulated_gpu`: raises :class:`HostWait` for copies that wait (to the host; from the host unless
    ``non_blocking``) and for writing a tensor through a boolean mask, :class:`WrongDevice` where tensors of different
    devices meet (a scalar tensor of the CPU may meet any)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_gpu = [x.device.type == DEVICE.type for x in given]
        if func in _GPU_TO_HOST_OR_BACK:
            self._check_copy(func, args, kwargs)
        elif any(on_gpu) and any(not gpu and x.ndim for x, gpu in zip(given, on_gpu, strict=True)):
            shapes = [f"{x.device.type} {list(x.shape)}" for x in given]
            raise WrongDevice(f"{func}: tensors of different devices: {', '.join(shapes)}")
        if func in _INDEXED_WRITES:
            self._check_mask(func, *args)
        return func(*args, **kwargs)

    @staticmethod
    def _check_copy(func: Any, args: tuple, kwargs: dict) -> None:
        if func is aten.copy_.default:
            target, source = args[0].device, args[1].device
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            moved = args[1]
        else:
            source, target = args[0].device, torch.device(kwargs.get("device") or args[0].device)
            waits, moved = not kwargs.get("non_blocking"), args[0]
        if target in (_STAND_IN, source) or source.type == target.type:  # C++ asks for the stand-in
            return
        if target.type == "cpu" or waits:
            raise HostWait(f"{func}: {list(moved.shape)} goes from {source.type} to {target.type}")

    @staticmethod
    def _check_mask(func: Any, target: Tensor, indices: Any, values: Tensor, *_: Any) -> None:
        masked = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        fills = values.numel() == 1 and values.device.type == "cpu"  # then PyTorch calls masked_fill
        if target.device.type == DEVICE.type and masked and not fills:
            raise HostWait(f"{func}: a boolean index has to be counted")
