"""Random numbers that are a function of (seed, step, rank), so that nothing random has to be saved for a resume."""
from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any sequence of numbers and words; different sequences give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def seed_everything(*parts: int | str) -> None:
    """Seed Python, numpy and torch (CPU and GPU) from ``derive_seed(*parts)``."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def step_generator(device: torch.device, *parts: int | str) -> torch.Generator:
    """A generator on ``device`` seeded from ``derive_seed(*parts)``."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))


@contextmanager
def random_numbers_kept(device: torch.device) -> Iterator[None]:
    """The streams of Python, numpy and torch (CPU and ``device``) go on afterwards as if nothing had been drawn."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
