"""What the tests of all methods share: options, network descriptions, tensors that stand for two networks' outputs."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import torch
from helpers import train_arguments
from torch import Tensor, nn

from engine.build import run_facts
from engine.method_list import unallocated_network
from engine.presets import published
from engine.settings import Settings, parse_settings
from losses.core import Batch, Distiller, Needs, NetInfo, OptionGroup, Preparation, RunFacts, methods
from losses.core.needs import check_needs
from losses.core.objective import build_distillers
from models import NetworkChoice, get_segmentation_model
from models.output import SegOutput
from models.weights import save_state_dict
from utils.errors import UserError

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
def _parsed(words: tuple[str, ...]) -> Settings:
    return parse_settings(["--teacher-pretrained", "teacher.pth", *words])


def settings_of(name: str, crop: tuple[int, int], dataset: str = "citys", *flags: str) -> Settings:
    """The parsed command line of ``--method name`` with its trial settings."""
    return _parsed(("--method", name, "--dataset", dataset, "--crop-size", *map(str, crop),
                    *as_flags(methods()[name].trial), "--student-model", RUN_STUDENT[0], "--student-backbone",
                    RUN_STUDENT[1], *flags))


def facts(num_class: int = CLASSES, **changes) -> RunFacts:
    """The facts of a run with the program's defaults, but for ``changes``."""
    return replace(run_facts(_parsed(()), num_class), **changes)


def options_of_method(name: str, **changes) -> OptionGroup:
    """The method's options at their defaults, but for ``changes``."""
    return replace(methods()[name].Options(), **changes)


def make(name: str, student: NetInfo, teacher: NetInfo | None, *flags: str, active: Iterable[str] | None = None,
         crop: tuple[int, int] = (512, 1024), **changes) -> Distiller:
    """Build a method as the program does: defaults, but for command-line words and for single settings or facts.

    active: its terms that count, with weight 1 or as {term: weight}; all of them by default.
    """
    cls = methods()[name]
    parsed = _parsed(tuple(flags))
    own = {f.name for f in fields(cls.Options)} & set(changes)
    options = replace(parsed.method_options[name], **{k: changes.pop(k) for k in own})
    terms = [t.name for t in cls.terms] if active is None else active
    weights = dict(terms) if isinstance(terms, Mapping) else dict.fromkeys(terms, 1.0)
    facts = {"active": weights, "crop_size": crop, **changes}
    run = replace(run_facts(parsed, student.num_class), **facts)
    check_needs(name, cls.requires(options, run, student, teacher), student, teacher, run.crop_size)
    return cls.build(options, run, student, teacher)


def batch(student: SegOutput, teacher: SegOutput | None, target: Tensor | None = None, step: int = 0,
          images: Tensor | None = None) -> Batch:
    """A batch for ``Distiller.forward``. target: by default no pixel has a label, at eight times the size of a map."""
    if target is None:
        one = next(x for x in (student.logits, student.head, student.c4, student.aux) if x is not None)
        target = torch.full((len(one), 8 * one.shape[-2], 8 * one.shape[-1]), -1)
    return Batch(student, teacher, target, images, step)


class Case:
    """A method as ``--method name`` builds it, and what it is built from. terms: the active ones, by default those of
    the preset."""

    def __init__(self, name: str, crop: tuple[int, int], *, terms: frozenset[str] | None = None,
                 dataset: str = "citys", flags: tuple[str, ...] = (), student: NetInfo = STUDENT,
                 teacher: NetInfo = TEACHER, ignore_label: int = -1) -> None:
        settings = settings_of(name, crop, dataset, *flags)
        self.cls, self.options = methods()[name], settings.method_options
        self.student, self.teacher = student, teacher
        self.run = replace(run_facts(settings, student.num_class), ignore_label=ignore_label)
        if terms is not None:
            self.run = replace(self.run, active=dict.fromkeys(terms, 1.0))

    @property
    def active(self) -> frozenset[str]:
        """The terms that count."""
        return frozenset(self.run.active)

    @property
    def needs(self) -> Needs:
        """What the method requires."""
        return self.cls.requires(self.options[self.cls.method], self.run, self.student, self.teacher)

    def build(self) -> Distiller:
        """The method itself, after the check of its needs."""
        check_needs(self.cls.method, self.needs, self.student, self.teacher, self.run.crop_size)
        return self.cls.build(self.options[self.cls.method], self.run, self.student, self.teacher)


def build(name: str, crop: tuple[int, int], seed: int = 0, **more) -> Distiller:
    """The method with random weights; keyword arguments as in :class:`Case`."""
    torch.manual_seed(seed)
    return Case(name, crop, **more).build()


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


def own_terms(name: str, active: Iterable[str]) -> set[str]:
    """The active terms that belong to the method itself and are losses."""
    return {t.name for t in methods()[name].terms if not t.scales_task} & set(active)


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
    return distiller(Batch(student, teacher, target, images_like(student, target, step), step), generator)


def images_like(student: SegOutput, target: Tensor, seed: int = 0) -> Tensor:
    """Random images [B, 3, H, W] for labels, in the precision of the student's output."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn((len(target), 3, *target.shape[1:]), generator=generator, dtype=torch.float64)
    dtype = next(x for x in student if x is not None).dtype
    return (50 * images).to(target.device, dtype)


def check_gradients(name: str, distiller: Distiller, student: SegOutput, teacher: SegOutput, terms: dict) -> None:
    """Backward of the sum: finite, into the student and every trained parameter, not into the teacher."""
    assert all(v.shape == () and v.isfinite() for v in terms.values()), terms
    sum(terms.values()).backward()
    reached = [t for t in student if t is not None and t.grad is not None]
    assert reached and all(t.grad.isfinite().all() for t in reached)
    assert all(t is None or t.grad is None for t in teacher)
    for parameter, value in distiller.named_parameters():
        if parameter not in distiller.unsynchronized() and value.requires_grad:
            assert value.grad is not None and value.grad.isfinite().all(), (
                f"{name}: {parameter} got no gradient from {', '.join(terms)}: build only what run.active needs "
                "(docs/extending.md)")


def train(distiller: Distiller, crop: tuple[int, int], steps: range, info: tuple[NetInfo, NetInfo] = (STUDENT, TEACHER),
          device: str = "cpu") -> list[dict[str, float]]:
    """Short training of the method alone on fixed random maps; the terms of every step."""
    own = distiller.trained_parameters()
    history = []
    for step in steps:
        student, teacher = (outputs(i, crop, seed=step + n, device=device) for n, i in enumerate(info))
        terms = run(distiller, student, teacher, labels(crop, seed=step, device=device), step)
        sum(terms.values()).backward()
        with torch.no_grad():
            for parameter in own:
                parameter -= 1e-3 * parameter.grad / (1 + parameter.grad.norm())
                parameter.grad = None
        distiller.after_step(step)
        history.append(values(terms))
    return history


@cache
def run_networks() -> tuple[NetInfo, NetInfo]:
    """Descriptions of student and teacher of short runs."""
    return tuple(unallocated_network(NetworkChoice(*net), CLASSES) for net in (RUN_STUDENT, RUN_TEACHER))


@cache
def trial_flags(name: str) -> tuple[str, ...]:
    """Flags of a short run of the method: its preset, or that of camvid where only this one fits small crops."""
    student, teacher = run_networks()
    for crop in CROPS:
        for weights in ("citys", "camvid"):
            chosen = as_flags(published(name, weights, RUN_STUDENT[1]))
            try:
                case = Case(name, crop, flags=tuple(chosen), student=student, teacher=teacher, dataset="toy_streets")
                build_distillers(case.options, case.run, student, teacher)
            except UserError as error:
                refusal = error
                continue
            return ("--method", name, *chosen, "--crop-size", *map(str, crop), *as_flags(methods()[name].trial))
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


def preparation(teacher: nn.Module | None, directory: Path, batches, log=lambda line: None, *, main: bool = True,
                data: str = "", images: int = 0, student: nn.Module | None = None) -> Preparation:
    """What a stage before training is given, on the CPU."""
    return Preparation(student, teacher, torch.device("cpu"), directory, main, batches, log, data, images)
