"""The work that a benchmark measures, built from a description that travels as JSON.

Runs in the child process, with the code of this checkout or of an older one: it uses what the programs themselves use,
and asks before it uses what was added later. Networks have random weights, images are noise: neither matters to the
cost (but for denormal numbers on a CPU, ``utils/cpu.py``).
"""
from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import nn

import dataset as data
import engine.build
import eval as evaluation
from engine.build import build_run, run_facts
from engine.run import run_stages, train_batch, training_batches
from engine.settings import Settings, from_flat, parse_settings
from losses.afdcd import omni_contrastive_loss
from losses.core.facts import Batch, NetInfo
from losses.core.objective import build_distillers
from models import SegOutput, get_segmentation_model
from tools.bench.peak import rates
from tools.flags import parsed
from utils.distributed import Distributed, init_distributed
from utils.randomness import step_generator


@dataclass(frozen=True)
class Work:
    """run: does it once, for so many ``images`` (0: it has none). precision: of its convolutions, "float32" or "bf16".
    facts: figures that do not depend on time, such as the number of parameters."""

    run: Callable[[], Any]
    images: int = 1
    precision: str = "float32"
    facts: Mapping[str, float] = field(default_factory=dict)


def train_settings(flags: Sequence[str], trial: bool = False) -> Settings:
    """Settings of ``train_kd.py`` for a teacher with random weights. trial: with the methods' own short stages."""
    settings = parsed(parse_settings, ["--teacher-pretrained", "random", *flags])
    if trial:
        for cls in settings.methods.values():
            settings = from_flat({**settings.flat(), **cls.trial})
    return replace(settings, networks=replace(settings.networks, teacher_pretrained=None))


def added_since(name: str) -> Callable[..., Any] | None:
    """``module.function`` of the measured code, None in a version that does not have the module."""
    module, _, function = name.rpartition(".")
    module = engine.__name__.removesuffix("engine") + module  # in the installed package, below it
    return getattr(importlib.import_module(module), function) if importlib.util.find_spec(module) else None


def set_up_cpu() -> None:
    """What the programs of the measured version do on a CPU."""
    for name in ("utils.cpu.prepare_cpu", "utils.allocator.keep_freed_memory"):
        if set_up := added_since(name):
            set_up()
            return


def start(settings: Settings | evaluation.EvalSettings, device: str) -> Distributed:
    """What a program does before it builds anything."""
    if speed_setting(settings, "fast") and device == "cpu":
        set_up_cpu()
    return init_distributed(no_cuda=device == "cpu")


def speed_setting(settings: Settings | evaluation.EvalSettings, name: str) -> Any:
    """A setting of the group ``speed``, None in a version that does not have it."""
    return getattr(getattr(settings, "speed", None), name, None)


def half_precision(settings: Settings | evaluation.EvalSettings) -> torch.dtype | None:
    """What autocast is asked for; None in float32."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(speed_setting(settings, "amp"))


def precision(settings: Settings | evaluation.EvalSettings) -> str:
    """Which of the machine's peaks the work can reach at most."""
    return "float32" if half_precision(settings) is None else "bf16"


def memory_format(settings: Settings, device: str) -> torch.memory_format:
    """How the maps and weights of methods are laid out."""
    wants_plain_maps = getattr(engine.build, "wants_plain_maps", None)  # a version without it has no other layout
    plain = wants_plain_maps is None or wants_plain_maps(settings, device)
    return torch.contiguous_format if plain else torch.channels_last


def build_step(job: Mapping[str, Any]) -> Work:
    """A step of ``train_kd.py`` on a batch of its loader. without_terms: nothing is made of the teacher's pass."""
    settings = train_settings(job["flags"], job.get("trial", False))
    run = build_run(settings, start(settings, job["device"]))
    if job.get("without_terms"):
        run.objective.distillers.clear()
    run_stages(run)
    if get_ready := added_since("engine.ready.get_ready"):
        get_ready(run)
    batch = next(training_batches(run))
    extra = run.objective.distillers
    kept = [*extra.buffers(), *(p for p in extra.parameters() if not p.requires_grad)]

    def step() -> None:
        train_batch(run, batch)
        run.step += 1

    return Work(step, settings.optimization.batch_size, precision(settings), {
        "parameters": sum(p.numel() for p in extra.parameters() if p.requires_grad),
        "state": sum(t.numel() * t.element_size() for t in kept)})


def random_maps(net: NetInfo, images: int, crop: tuple[int, int], device: str,
                layout: torch.memory_format) -> SegOutput:
    """What a network would return for a batch: noise."""
    sides = {tap: 4 if tap == "c1" else net.stride for tap in SegOutput._fields}
    maps = {tap: torch.randn(images, net.channels[tap], *(-(-side // sides[tap]) for side in crop), device=device)
            for tap in SegOutput._fields if tap in net.channels}
    return SegOutput(**{tap: maps[tap].contiguous(memory_format=layout) if tap in maps else None
                        for tap in SegOutput._fields})


def build_criterion(job: Mapping[str, Any]) -> Work:
    """Forward and backward of the methods alone, on random maps of both networks."""
    settings, device = train_settings(job["flags"]), job["device"]
    start(settings, device)
    crop, images = settings.data.crop_size, settings.optimization.batch_size
    classes = data.get_dataset_spec(settings.data.dataset).num_class
    with torch.device("meta"):
        infos = [NetInfo.of(choice.build(classes)) for choice in (settings.networks.student, settings.networks.teacher)]
    layout = memory_format(settings, device)
    distillers = build_distillers(settings.method_options, run_facts(settings, classes), *infos).train()
    distillers.to(device, memory_format=layout)
    student, teacher = (random_maps(info, images, crop, device, layout) for info in infos)
    leaves = [x.requires_grad_() for x in student if x is not None] + list(distillers.parameters())
    target = torch.randint(0, classes, (images, *crop), device=device)
    batch = Batch(student, teacher, target, torch.randn(images, 3, *crop, device=device), 0)
    half = half_precision(settings)

    def step() -> None:
        generator = step_generator(torch.device(device), 0)
        with torch.autocast(device, half, enabled=half is not None):
            terms = [pair for one in distillers.values() for pair in one(batch, generator).items()]
        sum(settings.weights[name] * value for name, value in terms).backward()
        for leaf in leaves:
            leaf.grad = None

    return Work(step, images, precision(settings))


def build_contrast(job: Mapping[str, Any]) -> Work:
    """Af-DCD's contrast alone, forward and backward, of maps that make up so many patches."""
    settings, device = train_settings(job["flags"]), job["device"]
    start(settings, device)
    options = settings.options["afdcd"]
    height, width = options.patch_size
    student, teacher = (torch.randn(1, job["channels"], height, width * job["patches"], device=device)
                        for _ in range(2))
    student.requires_grad_()
    form = {}
    if "implementation" in inspect.signature(omni_contrastive_loss).parameters:  # an older version has only one
        form = {"implementation": "auto" if speed_setting(settings, "fast") else "plain"}

    def step() -> None:
        omni_contrastive_loss(student, teacher, options.tau_ocd, options.m_ocd, (height, width), **form).backward()
        student.grad = None

    return Work(step, images=0)


def build_loader(job: Mapping[str, Any]) -> Work:
    """Training samples of the data set, one by one in this process; other ones at every turn."""
    cv2.setNumThreads(0)  # as in a loading process
    settings = train_settings(job["flags"])
    samples = build_run(settings, start(settings, "cpu")).train_set
    done = 0

    def load() -> None:
        nonlocal done
        for ordinal in range(done, done + job["samples"]):
            samples[ordinal % len(samples), ordinal]
        done += job["samples"]

    return Work(load, job["samples"])


class CaughtError(Exception):
    """Ends ``eval.py`` where it would evaluate."""


def build_eval(job: Mapping[str, Any]) -> Work:
    """The call of ``evaluate`` that ``eval.py`` makes with these flags, caught before it takes place."""
    settings = parsed(evaluation.parse_settings, job["flags"])
    evaluate, calls = evaluation.evaluate, []

    def remember(*args: Any, **more: Any) -> None:
        calls.append((args, more))
        raise CaughtError

    evaluation.evaluate = remember
    try:
        with contextlib.suppress(CaughtError):
            evaluation.run(settings, start(settings, job["device"]))
    finally:
        evaluation.evaluate = evaluate
    ((args, more),) = calls
    return Work(lambda: evaluate(*args, **more), job["images"], precision(settings))


def build_form(job: Mapping[str, Any]) -> Work:
    """Forward and backward of one loss; which: 0 its slow form, 1 the one in ``losses/``."""
    from tests.slow_forms import FORMS, make_maps

    classes = data.get_dataset_spec(job["dataset"]).num_class
    with torch.device("meta"):
        widths = tuple(network(name, classes).channels["head"] for name in job["networks"])
    maps = make_maps(job["batch"], tuple(-(-side // 8) for side in job["crop"]), classes, widths, device=job["device"])
    return Work(lambda: FORMS[job["name"]][job["which"]](maps).backward(), job["batch"])


def network(name: str, classes: int) -> nn.Module:
    """A network with random weights from "model-backbone"."""
    model, _, backbone = name.partition("-")
    return get_segmentation_model(model=model, backbone=backbone, num_class=classes)


def build_forward(job: Mapping[str, Any]) -> Work:
    """A forward pass of a network with random weights, up to its logits. form: as ``eval.py`` asks it, or that of a
    file that ``tools/export.py`` can write."""
    from engine.evaluate import prepare_for_inference
    from tools.exporting.check import load_onnx, load_pt2

    device, form = job["device"], job["form"]
    start_device(device)
    x = torch.randn(job["batch"], 3, *job["size"], device=device)
    facts: dict[str, float] = {}
    if form == "pytorch":
        net = get_segmentation_model(job["model"], job["backbone"], job["num_class"], aux=False,
                                     head_width=job.get("head_width"),
                                     architecture=json.loads(job.get("architecture") or "null"))
        facts["parameters"] = sum(p.numel() for p in net.parameters())
        ask = prepare_for_inference(net.to(device))
    elif form == "torch-export":
        ask = load_pt2(Path(job["file"]), device)
    else:
        ask = load_onnx(Path(job["file"]), device, job["threads"] or torch.get_num_threads())

    @torch.no_grad()
    def run() -> None:
        ask(x)

    return Work(run, job["batch"], facts=facts)


def start_device(device: str) -> None:
    """What ``eval.py`` does before it builds anything."""
    if device == "cpu":
        set_up_cpu()
    init_distributed(no_cuda=device == "cpu")


def build_peak(job: Mapping[str, Any]) -> Work:
    """What the machine can do; ``run`` returns it."""
    return Work(rates(job["device"], job["small"]))


BUILDERS = {"step": build_step, "criterion": build_criterion, "contrast": build_contrast, "loader": build_loader,
            "eval": build_eval, "form": build_form, "forward": build_forward, "peak": build_peak}


def build(job: Mapping[str, Any]) -> Work:
    """The work of a description. Raises UserError for flags that do not exist and settings that do not fit."""
    torch.manual_seed(0)
    return BUILDERS[job["kind"]](job)
