"""Numbers that two programs can agree on without exchanging files.

The recorded figures of this folder were taken on inputs and weights that are functions of three things only: a name,
a shape and an integer seed. Nothing depends on construction order, library version or device, so a test can rebuild
the same network and the same batch from a few words in a JSON file and compare summaries of the results.

Generators    ``raw``, ``tensor``, ``uniform``, ``labels``, ``image``
Weights       ``value`` (one entry), ``fill_named`` (a list), ``fill_module`` (a whole network)
Comparison    ``digest`` summarises an array, ``compare`` says how far two summaries are apart
"""
from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

#: Factor on the batch norm that closes a residual block; without it activations would grow with depth.
BRANCH = 0.3
#: The same for the batch norm behind the linear projection of an inverted residual block.
PROJECT = 0.7
#: First four numbers of ``raw("selfcheck", (4,), 0)``; see :func:`selfcheck`.
SELF = (0.7459023448065839, 1.4623003486083135, 0.5360948752565827, 0.5211358232847693)

_RESIDUAL_NORM = re.compile(r"(?P<block>.*layer\d+\.\d+)\.bn(?P<place>\d+)\.weight")
_INVERTED_LAYER = re.compile(r"(?P<block>.*features\.\d+\.conv)\.(?P<place>\d+)\.weight")


def _generator(name: str, seed: int) -> np.random.Generator:
    """The random stream that belongs to a name and a seed."""
    return np.random.default_rng(zlib.crc32(f"{seed}/{name}".encode()))


def raw(name: str, shape: Sequence[int], seed: int) -> np.ndarray:
    """Standard normal numbers, float64, of the given shape."""
    return _generator(name, seed).standard_normal(tuple(shape))


def _normal32(name: str, shape: Sequence[int], seed: int) -> np.ndarray:
    return np.asarray(raw(name, shape, seed), dtype=np.float32)


def tensor(name: str, shape: Sequence[int], seed: int = 0, scale: float = 1.0,
           dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers times ``scale``, rounded to float32 first and then converted to ``dtype``."""
    return torch.from_numpy(_normal32(name, shape, seed) * np.float32(scale)).to(dtype)


def uniform(name: str, shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers in [0, 1), for example to stand in for the draw of a random mask."""
    return torch.from_numpy(_generator(name, seed).random(tuple(shape)).astype(np.float32)).to(dtype)


def labels(name: str, shape: Sequence[int], num_class: int, seed: int = 0, ignore_frac: float = 0.1,
           ignore: int = -1) -> Tensor:
    """int64 label map [..., H, W] of 4x4 cells with one class each; about ``ignore_frac`` of the cells are ignored."""
    cell = 4
    height, width = shape[-2:]
    grid = (*shape[:-2], (height + cell - 1) // cell, (width + cell - 1) // cell)
    stream = _generator(name, seed)
    classes = np.floor(num_class * stream.random(grid)).astype(np.int64)
    ignored = stream.random(grid) < ignore_frac
    cells = np.where(ignored, np.int64(ignore), classes)
    full = np.repeat(np.repeat(cells, cell, axis=-1), cell, axis=-2)
    return torch.from_numpy(full[..., :height, :width].copy())


def image(name: str, shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """uint8 picture [H, W] or [H, W, C]: a slanted wave per channel over the full range, with noise on top."""
    height, width = shape[:2]
    channels = shape[2] if len(shape) > 2 else 1
    stream = _generator(name, seed)
    rows = np.arange(height, dtype=np.float64)[:, None]
    columns = np.arange(width, dtype=np.float64)[None, :]
    waves = []
    for _ in range(channels):
        down, across, phase = stream.random(3)
        turns = down * 3 * rows / height + across * 3 * columns / width + phase
        waves.append(127 + 90 * np.sin(2 * np.pi * turns))
    picture = np.stack(waves, axis=-1)
    picture = picture + 20 * stream.standard_normal(picture.shape)
    picture = np.rint(picture).clip(0, 255).astype(np.uint8)
    return picture if len(shape) > 2 else picture[..., 0]


def _branch_ends(names: set[str]) -> dict[str, float]:
    """Batch norms that close a residual branch, each with the factor that keeps the branch small."""
    last: dict[str, int] = {}
    for found in filter(None, map(_RESIDUAL_NORM.fullmatch, names)):
        last[found["block"]] = max(int(found["place"]), last.get(found["block"], 0))
    ends = {f"{block}.bn{place}.weight": BRANCH for block, place in last.items()}
    for found in filter(None, map(_INVERTED_LAYER.fullmatch, names)):
        block, place = found["block"], int(found["place"])
        is_norm = f"{block}.{place}.running_mean" in names
        followers = {f"{block}.{place + step}.weight" for step in (1, 2)}
        if is_norm and not followers & names:
            ends[found.string] = PROJECT
    return ends


def value(name: str, shape: Sequence[int], seed: int, norm: bool = False, factor: float = 1.0) -> np.ndarray:
    """The numbers of one state_dict entry, float32 (int64 for ``num_batches_tracked``).

    norm: the entry is the weight of a batch norm; factor: extra factor on such a weight.
    """
    kind = name.split(".")[-1]
    if kind == "num_batches_tracked":
        return np.zeros(tuple(shape), dtype=np.int64)
    z = _normal32(name, shape, seed)
    small = np.float32(0.1)
    if kind in ("bias", "running_mean"):
        return small * z
    if kind == "running_var":
        return np.float32(1) + small * np.abs(z)
    if norm:
        return np.float32(factor) * (np.float32(1) + small * z)
    fan_in = int(np.prod(tuple(shape)[1:]))
    return z * np.float32(np.sqrt(2.0 / fan_in))


@torch.no_grad()
def fill_named(items: Iterable[tuple[str, Tensor]], seed: int) -> None:
    """Overwrite tensors in place by name. A weight beside a ``running_mean`` is a batch norm's."""
    entries = dict(items)
    ends = _branch_ends(set(entries))
    for name, target in entries.items():
        stem, _, leaf = name.rpartition(".")
        norm = leaf == "weight" and f"{stem}.running_mean" in entries
        numbers = value(name, target.shape, seed, norm=norm, factor=ends.get(name, 1.0))
        target.copy_(torch.from_numpy(np.asarray(numbers)))


def fill_module(module: Module, seed: int) -> Module:
    """Overwrite every parameter and buffer in the module's state_dict; returns the module."""
    fill_named(module.state_dict().items(), seed)
    return module


def no_dropout(module: Module) -> Module:
    """Switch all dropout off, so that train mode is deterministic; returns the module."""
    for layer in module.modules():
        if isinstance(layer, nn.Dropout | nn.Dropout2d):
            layer.p = 0.0
    return module


def indices(n: int, k: int = 16) -> np.ndarray:
    """``k`` scattered flat positions of an array of ``n`` elements."""
    steps = np.arange(k, dtype=np.uint64)
    return ((steps * np.uint64(2654435761) + np.uint64(40503)) % np.uint64(n)).astype(np.int64)


def digest(t: Tensor | np.ndarray) -> dict[str, Any]:
    """Summary of an array: shape, mean, population std, absmax, 16 samples and a projection on a fixed random vector.

    The projection (``dot``) notices what the moments do not: a permutation or a transposition.
    """
    array = t.detach().cpu().double().numpy() if isinstance(t, Tensor) else np.asarray(t, dtype=np.float64)
    flat = np.ascontiguousarray(array).ravel()
    summary: dict[str, Any] = {"shape": list(array.shape), "mean": 0.0, "std": 0.0, "absmax": 0.0, "samples": [],
                               "dot": 0.0}
    if flat.size:
        direction = raw("digest", (flat.size,), 0)
        summary.update(mean=float(np.mean(flat)), std=float(np.std(flat)), absmax=float(np.max(np.abs(flat))),
                       samples=flat[indices(flat.size)].tolist(),
                       dot=float(flat @ direction / np.sqrt(flat.size)))
    return summary


def compare(got: Mapping[str, Any], want: Mapping[str, Any]) -> float:
    """Largest relative difference of two digests; infinite when the shapes differ or something is not finite.

    Samples and absmax are measured against the expected absmax, moments and projection against the expected RMS.
    """
    if list(got["shape"]) != list(want["shape"]):
        return float("inf")
    tiny = 1e-12
    peak = max(abs(want["absmax"]), tiny)
    rms = max(float(np.hypot(want["mean"], want["std"])), tiny)
    errors = [abs(got[key] - want[key]) / rms for key in ("mean", "std", "dot")]
    errors.append(abs(got["absmax"] - want["absmax"]) / peak)
    errors.extend(abs(a - b) / peak for a, b in zip(got["samples"], want["samples"], strict=False))
    return float(max(errors)) if np.all(np.isfinite(errors)) else float("inf")


def selfcheck() -> None:
    """Raise RuntimeError when numpy's random stream is not the one that the figures were recorded with."""
    got = raw("selfcheck", (len(SELF),), 0)
    if np.abs(got - np.asarray(SELF)).max() > 1e-12:
        raise RuntimeError(f"numpy's random stream has changed: {got.tolist()} instead of {list(SELF)}")
