"""Counting floating-point operations, and the peak of a device to compare them with."""
from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry

#: dense peaks in TFLOP/s by a part of the device's name: half precision, float32 through TF32, plain float32. Of two
#: that fit, the first counts
GPU_PEAKS = {"H200": (989, 495, 67), "H100 PCIe": (756, 378, 51), "H100 NVL": (835, 418, 60), "H100": (989, 495, 67),
             "A100": (312, 156, 19.5), "V100": (125, 15.7, 15.7)}
MEASURING = 0.15  # seconds


def _convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, *more: Any, **_: Any) -> int:
    """As many operations as forward for each of the gradients of input and weight; torch's own count is wrong for
    convolutions in groups."""
    transposed, wanted = more[4], more[7]
    return conv_flop_count(x.shape, weight.shape, gradient.shape, transposed) * sum(wanted[:2])


#: counts in place of torch's
COUNTS = {torch.ops.aten.convolution_backward: _convolution_backward}


class FlopCounter(TorchDispatchMode):
    """Context that adds up the operations of convolutions and matrix products, forward and backward, in ``total``: a
    multiplication and an addition are two. Changes nothing else. Code that ``torch.compile`` has made is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = COUNTS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **kwargs, out_val=result)
        return result


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that the device reaches at most in convolutions of ``dtype``: of a GPU from a table, None for one that is
    not in it; of a CPU measured within a second, with the threads of this process."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peaks = next((peaks for part, peaks in GPU_PEAKS.items() if part in name), None)
        kind = 0 if dtype in (torch.bfloat16, torch.float16) else 1 if torch.backends.cudnn.allow_tf32 else 2
        return None if peaks is None else peaks[kind] * 1e12
    return _measured_peak(dtype) if device.type == "cpu" else None


@torch.no_grad()
def _measured_peak(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of several 3x3 convolutions of 256 channels, in CPU time of this thread: with the loading
    processes starting beside it, time on the clock showed a third of the peak."""
    channels, side = 256, 64
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(dtype, memory_format=torch.channels_last)
    x = torch.ones(1, channels, side, side, dtype=dtype).to(memory_format=torch.channels_last)
    conv(x)
    best, end = float("inf"), time.perf_counter() + MEASURING
    while time.perf_counter() < end:
        start = time.thread_time()
        conv(x)
        best = min(best, time.thread_time() - start)
    return 2 * 9 * (channels * side) ** 2 / best
