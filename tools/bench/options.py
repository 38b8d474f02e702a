"""The command lines of ``tools/benchmark.py``, one dataclass per benchmark. ``SHORT``: what ``--short`` sets."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from losses.core import methods
from utils.options import OptionGroup, option


@dataclass(frozen=True)
class Common(OptionGroup):
    """What every benchmark has."""

    SHORT: ClassVar[Mapping[str, Any]] = {"repeats": 2}

    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda", choices=("cpu", "cuda"))
    threads: int | None = option(None, "threads of the measured processes (default: torch's)", at_least=1)
    repeats: int = option(5, "rounds over all variants", at_least=1, metavar="N")
    steps: int | None = option(None, "steps of a turn, of which the mean counts (default: 1, on a GPU 10)", at_least=1,
                               metavar="N")
    seconds: float | None = option(None, "no new round after so many of each table", above=0, metavar="S")
    json: str | None = option(None, "write all figures and the machine there", metavar="FILE")
    short: bool = option(False, "a few seconds with small sizes: shows that it runs, measures nothing of interest")


@dataclass(frozen=True)
class Compared(Common):
    """What benchmarks of variants have. VARIANTS: {name: flags} that it knows; USUAL: those that are measured unless
    others are asked for."""

    VARIANTS: ClassVar[Mapping[str, str]] = {}
    USUAL: ClassVar[tuple[str, ...]] = ()

    variants: tuple[str, ...] | None = option(None, "which ones, the first is what the others are compared with",
                                              metavar="NAME")
    variant: tuple[str, ...] = option((), "one more variant and its flags, may be repeated", nargs="append",
                                      metavar="NAME=FLAGS")
    against: str | None = option(None, "compare with the code of a git revision or of another checkout, which gets no "
                                       "flags of a variant", metavar="REV|DIR")
    fresh: bool = option(False, "a new process for every turn: slower, but only one at a time is in memory")


@dataclass(frozen=True)
class Networks(OptionGroup):
    """Which job of distillation."""

    student: str = option("deeplabv3-resnet18", "MODEL-BACKBONE of the student", metavar="NET")
    teacher: str = option("deeplabv3-resnet101", "MODEL-BACKBONE of the teacher; step takes SOURCE:NAME too",
                          metavar="NET")
    dataset: str = option("citys", "whose presets and number of classes")
    batch: int = option(2, "images per step", at_least=2, metavar="N")


SMALL = {"student": "psp-resnet18_w0.125", "teacher": "psp-resnet18_w0.25"}
TRAINING = {"plain": "--no-fast", "fast": "--fast", "bf16": "--fast --amp bf16 --channels-last",
            "compile": "--fast --compile"}


@dataclass(frozen=True)
class Step(Compared, Networks):
    """A whole training step."""

    SHORT: ClassVar = {**Common.SHORT, **SMALL, "crop": (128, 128)}
    VARIANTS: ClassVar = TRAINING
    USUAL: ClassVar = ("plain", "fast", "bf16")

    method: str = option("afdcd", "preset that is trained", choices=lambda: ("none", *methods()), metavar="NAME")
    projector: tuple[str, ...] = option(("plain",), "of afdcd: plain, enhanced, or both one after another",
                                        choices=("plain", "enhanced"))
    crop: tuple[int, int] = option((512, 1024), "training crop", at_least=32, metavar=("H", "W"))
    data: str | None = option(None, "images of this folder (default: noise)", metavar="DIR")
    teacher_pretrained: str | None = option(None, "weights of the teacher (default: random)", metavar="FILE")


@dataclass(frozen=True)
class Criterion(Compared, Networks):
    """A method alone, forward and backward on random maps."""

    SHORT: ClassVar = {**Common.SHORT, **SMALL, "maps": ("16x16",)}
    VARIANTS: ClassVar = {name: TRAINING[name] for name in ("plain", "fast", "bf16")}
    USUAL: ClassVar = ("plain", "fast", "bf16")

    method: str = option("afdcd", "which one; terms of others, as kd's, are left out", choices=lambda: tuple(methods()),
                         metavar="NAME")
    projector: tuple[str, ...] = option(("plain", "enhanced"), "of afdcd", choices=("plain", "enhanced"))
    maps: tuple[str, ...] = option(("64x64", "64x128"), "sizes of the maps at the output stride", metavar="HxW")


@dataclass(frozen=True)
class Contrast(Compared):
    """Af-DCD's contrast operator alone."""

    SHORT: ClassVar = {**Common.SHORT, "patches": (4,), "channels": 256}
    VARIANTS: ClassVar = {"plain": "--no-fast", "fast": "--fast"}
    USUAL: ClassVar = ("plain", "fast")

    patches: tuple[int, ...] = option((32, 121), "an image of 512x1024 has 32, pooled by 4; one of CamVid 121",
                                      at_least=1, metavar="P")
    channels: int = option(2048, "of the maps", at_least=16, metavar="N")


@dataclass(frozen=True)
class Loader(Compared):
    """Training samples of the data set, in one process without workers."""

    SHORT: ClassVar = {**Common.SHORT, "samples": 4, "crop": (64, 64), "size": (128, 256)}
    VARIANTS: ClassVar = {"plain": "--no-fast", "fast": "--fast", "cache": "--fast --cache {folder}/cache"}
    USUAL: ClassVar = ("plain", "fast", "cache")

    dataset: str = option("citys", "data set")
    data: str | None = option(None, "its folder (default: noise of --size)", metavar="DIR")
    size: tuple[int, int] = option((1024, 2048), "of the noise", at_least=32, metavar=("H", "W"))
    crop: tuple[int, int] = option((512, 1024), "training crop", at_least=1, metavar=("H", "W"))
    samples: int = option(16, "samples of a turn", at_least=1, metavar="N")


@dataclass(frozen=True)
class Eval(Compared):
    """Evaluation of whole images."""

    SHORT: ClassVar = {**Common.SHORT, "network": "psp-resnet18_w0.125", "size": (64, 128), "images": 1}
    VARIANTS: ClassVar = {"plain": "--no-fast", "fast": "--fast", "bf16": "--fast --amp bf16 --channels-last"}
    USUAL: ClassVar = ("plain", "fast", "bf16")

    network: str = option("deeplabv3-resnet18", "MODEL-BACKBONE", metavar="NET")
    dataset: str = option("citys", "data set")
    data: str | None = option(None, "its folder (default: noise of --size)", metavar="DIR")
    size: tuple[int, int] = option((1024, 2048), "of the noise", at_least=32, metavar=("H", "W"))
    images: int = option(2, "images of a turn", at_least=1, metavar="N")


@dataclass(frozen=True)
class Methods(Common, Networks):
    """What every method adds to plain training."""

    SHORT: ClassVar = {**Common.SHORT, **SMALL, "crop": (128, 128), "methods": ("kd", "fitnet"), "steps": 1}

    repeats: int = option(3, "rounds over all methods", at_least=1, metavar="N")
    steps: int = option(3, "steps per measurement, after a warm-up", at_least=1, metavar="N")
    crop: tuple[int, int] = option((512, 1024), "training crop", at_least=32, metavar=("H", "W"))
    methods: tuple[str, ...] = option(tuple(methods()), "which ones (default: all)", choices=lambda: tuple(methods()),
                                      metavar="NAME")


@dataclass(frozen=True)
class SlowForms(Common, Networks):
    """Five losses against the form that the formulas suggest."""

    SHORT: ClassVar = {**Common.SHORT, **SMALL, "crop": (64, 64), "steps": 1}

    repeats: int = option(3, "rounds over all losses", at_least=1, metavar="N")
    steps: int = option(3, "steps per measurement, after a warm-up", at_least=1, metavar="N")
    crop: tuple[int, int] = option((512, 1024), "training crop", at_least=32, metavar=("H", "W"))
