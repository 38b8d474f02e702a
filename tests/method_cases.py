"""What the tests of all methods share: options, network descriptions, tensors that stand for two networks' outputs."""
from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from helpers import train_arguments
from torch import Tensor

from losses.composition import active_terms, build_distillers
from losses.distiller import BuildContext, Distiller, NetInfo, check_taps, methods
from models import get_segmentation_model
from models.output import SegOutput
from models.weights import save_state_dict
from utils.config import parse_config, published
from utils.errors import UserError
from utils.method_list import described_network

CLASSES = 5
STUDENT = NetInfo("small-net", {"logits": CLASSES, "aux": CLASSES, "c1": 8, "c2": 16, "c3": 24, "c4": 32, "head": 16},
                  CLASSES)
TEACHER = NetInfo("large-net", {"logits": CLASSES, "aux": CLASSES, "c1": 16, "c2": 16, "c3": 32, "c4": 48, "head": 32},
                  CLASSES)
#: (model, backbone) of the real networks that short runs train and distil from
RUN_STUDENT, RUN_TEACHER = ("psp", "resnet18_w0.125"), ("psp", "resnet18_w0.25")
#: training crops to try, smallest first: some methods need maps of a certain size
CROPS = ((64, 64), (128, 128), (512, 512))


def as_flags(options: Mapping[str, object]) -> list[str]:
    """Option values by name as command-line words."""
    words = []
    for name, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        words += ["--" + name.replace("_", "-"), *(str(v).lower() if isinstance(v, bool) else str(v) for v in values)]
    return words


@cache
def _parsed(words: tuple[str, ...]) -> argparse.Namespace:
    return parse_config(["--teacher-pretrained", "teacher.pth", *words])


def options(name: str, crop: tuple[int, int], dataset: str = "citys", *flags: str) -> argparse.Namespace:
    """The parsed command line of ``--method name`` with its quick options."""
    words = ("--method", name, "--dataset", dataset, "--crop-size", *map(str, crop), *as_flags(methods()[name].quick),
             "--student-model", RUN_STUDENT[0], "--student-backbone", RUN_STUDENT[1])
    return argparse.Namespace(**vars(_parsed((*words, *flags))))


def context(name: str, crop: tuple[int, int], *, terms: frozenset[str] | None = None, dataset: str = "citys",
            flags: tuple[str, ...] = (), student: NetInfo = STUDENT, teacher: NetInfo = TEACHER,
            ignore_label: int = -1) -> BuildContext:
    """What ``--method name`` is built from. terms: the active ones, by default those of the preset."""
    parsed = options(name, crop, dataset, *flags)
    return BuildContext(student, teacher, student.num_class, ignore_label,
                        active_terms(parsed) if terms is None else terms, crop, dataset, parsed)


def build(name: str, crop: tuple[int, int], seed: int = 0, **more) -> Distiller:
    """The method with random weights; keyword arguments as in :func:`context`."""
    torch.manual_seed(seed)
    where = context(name, crop, **more)
    distiller = methods()[name].build(where)
    check_taps(distiller, where.student, where.teacher)
    return distiller


@cache
def smallest_crop(name: str, terms: frozenset[str] | None = None) -> tuple[int, int]:
    """The first of ``CROPS`` that the method accepts; fails with its last refusal when there is none."""
    for crop in CROPS:
        try:
            build(name, crop, terms=terms)
            return crop
        except UserError as error:
            refusal = error
    raise AssertionError(f"{name} refuses every crop of {CROPS}: {refusal}")


def own_terms(name: str, active: frozenset[str]) -> set[str]:
    """The active terms that belong to the method itself."""
    return {t.name for t in methods()[name].terms} & active


def outputs(info: NetInfo, crop: tuple[int, int], batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32,
            device: str = "cpu") -> SegOutput:
    """Random leaves in the shapes of a network's output (features are not negative), all of them with a gradient."""
    generator = torch.Generator().manual_seed(seed)
    maps: dict[str, Tensor | None] = {}
    for tap in SegOutput._fields:
        stride = 4 if tap == "c1" else info.stride
        shape = (batch, info.channels.get(tap, 1), *(-(-side // stride) for side in crop))
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        values = 2 * values if tap in ("logits", "aux") else values.relu()
        maps[tap] = values.to(device, dtype).requires_grad_() if tap in info.channels else None
    return SegOutput(**maps)


def labels(crop: tuple[int, int], batch: int = 2, seed: int = 0, ignored: float = 0.2, ignore_label: int = -1,
           device: str = "cpu") -> Tensor:
    """int64 [B, H, W]: blocks of 16 pixels, a share of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (-(-side // 16) for side in crop)
    blocks = torch.randint(0, CLASSES, (batch, rows, columns), generator=generator)
    blocks[torch.rand(blocks.shape, generator=generator) < ignored] = ignore_label
    whole = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)
    return whole[:, :crop[0], :crop[1]].contiguous().to(device)


def values(terms: Mapping[str, Tensor]) -> dict[str, float]:
    """The terms of one step as numbers."""
    return {name: value.item() for name, value in terms.items()}


def run(distiller: Distiller, student: SegOutput, teacher: SegOutput, target: Tensor, step: int = 0,
        seed: int = 0) -> dict[str, Tensor]:
    """One forward pass with a seeded generator; the default generator is set elsewhere, it must not matter."""
    generator = torch.Generator(target.device).manual_seed(1000 * seed + step)
    more = {"images": images_like(student, target, step)} if distiller.uses_images else {}
    return distiller(student, teacher, target, step, generator, **more)


def images_like(student: SegOutput, target: Tensor, seed: int = 0) -> Tensor:
    """Random images [B, 3, H, W] for labels, in the precision of the student's output."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn((len(target), 3, *target.shape[1:]), generator=generator, dtype=torch.float64)
    return (50 * images).to(target.device, student.logits.dtype)


def check_gradients(name: str, distiller: Distiller, student: SegOutput, teacher: SegOutput, terms: dict) -> None:
    """Backward of the sum: finite, into the student and every trained parameter, not into the teacher."""
    assert all(v.shape == () and v.isfinite() for v in terms.values()), terms
    sum(terms.values()).backward()
    reached = [t for t in student if t is not None and t.grad is not None]
    assert reached and all(t.grad.isfinite().all() for t in reached)
    assert all(t is None or t.grad is None for t in teacher)
    for parameter, value in distiller.named_parameters():
        if parameter not in distiller.unsynchronised() and value.requires_grad:
            assert value.grad is not None and value.grad.isfinite().all(), f"{name}: {parameter} got no gradient"


def train(distiller: Distiller, crop: tuple[int, int], steps: range, info: tuple[NetInfo, NetInfo] = (STUDENT, TEACHER),
          device: str = "cpu") -> list[dict[str, float]]:
    """Short training of the method alone on fixed random maps; the terms of every step."""
    own = distiller.trained_parameters()
    found = []
    for step in steps:
        student, teacher = (outputs(i, crop, seed=step + n, device=device) for n, i in enumerate(info))
        terms = run(distiller, student, teacher, labels(crop, seed=step, device=device), step)
        sum(terms.values()).backward()
        with torch.no_grad():
            for parameter in own:
                parameter -= 1e-3 * parameter.grad / (1 + parameter.grad.norm())
                parameter.grad = None
        distiller.after_step(step)
        found.append(values(terms))
    return found


@cache
def trial_flags(name: str) -> tuple[str, ...]:
    """Flags of a short run of the method: its preset, or that of camvid where only this one fits small crops."""
    student, teacher = (described_network(*net, CLASSES) for net in (RUN_STUDENT, RUN_TEACHER))
    for crop in CROPS:
        for weights in ("citys", "camvid"):
            chosen = as_flags(published(name, weights, RUN_STUDENT[1]))
            try:
                build_distillers(context(name, crop, flags=tuple(chosen), student=student, teacher=teacher,
                                         dataset="toy_streets"))
            except UserError as error:
                refusal = error
                continue
            return ("--method", name, *chosen, "--crop-size", *map(str, crop), *as_flags(methods()[name].quick))
    raise AssertionError(f"{name} refuses every crop of {CROPS}: {refusal}")


def run_arguments(name: str, data: Path, teacher: Path, save: Path, *more: str) -> list[str]:
    """Two steps on the folder data set, with a training state after the first; ``more`` comes last and wins."""
    return train_arguments(
        data, save, "--student-model", RUN_STUDENT[0], "--student-backbone", RUN_STUDENT[1], "--teacher-model",
        RUN_TEACHER[0], "--teacher-backbone", RUN_TEACHER[1], "--teacher-pretrained", str(teacher), "--skip-val",
        "--max-iterations", "2", "--save-per-iters", "1", *trial_flags(name), *more)


def write_run_teacher(path: Path) -> Path:
    """A random teacher for :func:`run_arguments`."""
    torch.manual_seed(0)
    save_state_dict(get_segmentation_model(model=RUN_TEACHER[0], backbone=RUN_TEACHER[1], num_class=CLASSES), path)
    return path
