"""What a machine can do: the rate of a large convolution and of a large matrix product, in float32 and in bf16."""
from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from tools.bench.measure import synchronize

#: per device, in full and in short: images, channels, height and width of the convolution, side of the matrices,
#: repetitions
SIZES = {"cpu": ((2, 512, 64, 64, 2048, 1), (1, 128, 32, 32, 512, 1)),
         "cuda": ((16, 512, 64, 128, 8192, 10), (4, 256, 64, 64, 2048, 5))}
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}


def rates(device: str, small: bool) -> Callable[[], dict[str, float]]:
    """A function that measures {precision: FLOP/s} of the fastest: 3x3 convolution in either memory format, product."""
    images, channels, height, width, side, repeat = SIZES[device][small]
    work = {}
    for name, dtype in PRECISIONS.items():
        x, weight = torch.randn(images, channels, height, width), torch.randn(channels, channels, 3, 3)
        matrix = torch.randn(side, side).to(device, dtype)
        convolution = 2 * 9 * images * channels ** 2 * height * width
        formats = [[t.to(device, dtype, memory_format=layout) for t in (x, weight)]
                   for layout in (torch.contiguous_format, torch.channels_last)]
        work[name] = [*((convolution, lambda pair=pair: F.conv2d(*pair, padding=1)) for pair in formats),
                      (2 * side ** 3, lambda matrix=matrix: matrix @ matrix)]

    @torch.no_grad()
    def measure() -> dict[str, float]:
        return {name: max(flops / seconds(run, repeat, device) for flops, run in pieces)
                for name, pieces in work.items()}

    return measure


def seconds(run: Callable[[], object], repeat: int, device: str) -> float:
    """Of the fastest of two rounds of ``repeat`` calls, per call; the first of all does not count."""
    run()
    best = float("inf")
    for _ in range(2):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeat):
            run()
        synchronize(device)
        best = min(best, (time.perf_counter() - start) / repeat)
    return best
