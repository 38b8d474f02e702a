"""What every method costs on this machine: parameters, peak memory and time per step beside plain training.

    python tools/benchmark_methods.py
    python tools/benchmark_methods.py --methods kd afdcd --crop 256 512 --batch 2 --steps 5 --json costs.json
    python tools/benchmark_methods.py --slow-forms

Every measurement has a process of its own, and the repetitions go round all methods, so that a machine that slows down
slows all of them. Networks have random weights and images are noise: neither matters to the cost. Stages before
training run with their ``trial`` settings and are not counted. ``none`` trains the student alone; ``teacher`` runs the
teacher too and distils nothing, so that what a method itself adds is the difference to ``teacher``.
"""
from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from dataset import get_dataset_spec
from engine.build import build_objective, build_optimizer
from engine.settings import from_flat, parse_settings
from engine.step import TrainStep
from losses.core import Preparation, methods
from losses.core.objective import Objective
from models import get_segmentation_model
from utils.cli import parse_options, run_main
from utils.errors import UserError
from utils.options import OptionGroup, option

BASELINES = ("none", "teacher")
MARK = "measured: "


@dataclass(frozen=True)
class Options(OptionGroup):
    """The command line."""

    student: str = option("deeplabv3-resnet18", "MODEL-BACKBONE of the student", metavar="NET")
    teacher: str = option("deeplabv3-resnet101", "MODEL-BACKBONE of the teacher", metavar="NET")
    dataset: str = option("citys", "whose presets and number of classes")
    crop: tuple[int, int] = option((512, 1024), "training crop", at_least=1, metavar=("H", "W"))
    batch: int = option(2, "images per step", at_least=2, metavar="N")
    steps: int = option(3, "steps per measurement, after a warm-up", at_least=1, metavar="N")
    repeats: int = option(3, "rounds over all methods", at_least=1, metavar="N")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")
    methods: tuple[str, ...] = option(tuple(methods()), "which ones (default: all)", choices=lambda: tuple(methods()),
                                      metavar="NAME")
    json: str | None = option(None, "write the figures there too", metavar="FILE")
    slow_forms: bool = option(False, "measure the losses of five methods against their slow forms instead")
    job: str | None = option(None, hidden=True)  # the one measurement of a child process


# -- one measurement, in a process of its own -------------------------------------------------------------------------

def reset_peak(device: torch.device) -> None:
    """Forget the peak so far (on Linux; elsewhere the peak of a CPU process cannot be forgotten)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes: what the allocator held at most on a GPU, the largest resident size of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # not ru_maxrss where there is a choice: it starts from the size of the process that started this one
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def timed(work: Callable[[int], object], steps: int, device: torch.device) -> dict[str, float]:
    """Median seconds of ``work(i)`` for i = 1 to steps, after one that does not count, and the peak of memory."""
    reset_peak(device)
    seconds = []
    for step in range(steps + 1):
        start = time.perf_counter()
        work(step)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[1:]), "peak": peak_memory(device)}


def network(name: str, num_class: int) -> nn.Module:
    """A network with random weights from "model-backbone"."""
    model, dash, backbone = name.partition("-")
    if not dash:
        raise UserError(f"network {name!r}: expected MODEL-BACKBONE, for example deeplabv3-resnet18")
    return get_segmentation_model(model=model, backbone=backbone, num_class=num_class)


def random_batches(options: Options, num_class: int) -> Callable[..., Iterator[tuple[Tensor, Tensor]]]:
    """What ``Preparation.batches`` asks for, with noise as images and random labels."""

    def batches(steps: int, batch_size: int, start: int, role: str) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(start, steps):
            images = torch.randn(batch_size, 3, *options.crop, device=options.device)
            yield ((images, images) if role == "both" else images,
                   torch.randint(0, num_class, (batch_size, *options.crop), device=options.device))

    return batches


def prepare(objective: Objective, teacher: nn.Module | None, options: Options, num_class: int) -> None:
    """Run the methods' stages before training, on noise."""
    with tempfile.TemporaryDirectory() as folder:
        stage = Preparation(objective.student, teacher, torch.device(options.device), Path(folder), True,
                            random_batches(options, num_class), lambda text: None, data="noise", images=options.batch)
        for distiller in objective.distillers.values():
            distiller.prepare(stage)


def measure_method(name: str, options: Options) -> dict[str, float]:
    """Seconds per training step and peak memory of one method or baseline; its parameters and bytes of state."""
    device = torch.device(options.device)
    num_class = get_dataset_spec(options.dataset).num_class
    method = "none" if name in BASELINES else name
    model, _, backbone = options.student.partition("-")
    settings = parse_settings(["--method", method, "--dataset", options.dataset, "--crop-size", *map(str, options.crop),
                           "--student-model", model, "--student-backbone", backbone,
                           "--batch-size", str(options.batch), "--teacher-pretrained", "random"])
    if method != "none":
        settings = from_flat({**settings.flat(), **methods()[method].trial})
    torch.manual_seed(0)
    student = network(options.student, num_class).train()
    teacher = None
    if name == "teacher" or settings.needs_teacher:
        teacher = network(options.teacher, num_class).eval().requires_grad_(False).to(device)
    objective = build_objective(settings, student, teacher).to(device)
    step_fn = TrainStep(objective, teacher, build_optimizer(settings, objective), lr=1e-4, max_iterations=10**6)
    images = torch.randn(options.batch, 3, *options.crop, device=device)
    target = torch.randint(0, num_class, (options.batch, *options.crop), device=device)
    if method != "none":
        prepare(objective, teacher, options, num_class)
    found = timed(lambda step: step_fn(images, images, target, step), options.steps, device)
    extra = objective.distillers
    kept = [*extra.buffers(), *(p for p in extra.parameters() if not p.requires_grad)]
    return {**found, "parameters": sum(p.numel() for p in extra.parameters() if p.requires_grad),
            "state": sum(t.numel() * t.element_size() for t in kept)}


def measure_form(name: str, which: int, options: Options) -> dict[str, float]:
    """Seconds and memory beyond the inputs of forward and backward of one loss: 0 the slow form, 1 ours."""
    from tests.slow_forms import FORMS, make_maps

    device = torch.device(options.device)
    num_class = get_dataset_spec(options.dataset).num_class
    with torch.device("meta"):
        widths = tuple(network(n, num_class).channels["head"] for n in (options.student, options.teacher))
    maps = make_maps(options.batch, tuple(-(-side // 8) for side in options.crop), num_class, widths, device=device)
    reset_peak(device)
    before = peak_memory(device)
    found = timed(lambda _: FORMS[name][which](maps).backward(), options.steps, device)
    return {**found, "peak": found["peak"] - before}


# -- all measurements -------------------------------------------------------------------------------------------------

def in_own_process(job: list, argv: list[str]) -> dict:
    """Run this program once more for one measurement. Returns its figures, or {"refused": reason}."""
    command = [sys.executable, __file__, *argv, "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [x for x in done.stdout.splitlines() if x.startswith(MARK)]
    if lines:
        return json.loads(lines[-1][len(MARK):])
    reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
    return {"refused": reason.removeprefix("benchmark_methods.py: error: ")}


def measure_all(jobs: list[list], repeats: int, argv: list[str]) -> list[dict]:
    """The median figures of every job, from ``repeats`` rounds over all of them; refused jobs are not repeated."""
    found: list[list[dict]] = [[] for _ in jobs]
    for repeat in range(repeats):
        for job, results in zip(jobs, found, strict=True):
            if results and "refused" in results[0]:
                continue
            sys.stderr.write(f"round {repeat + 1} of {repeats}: {' '.join(map(str, job[1:]))}\n")
            results.append(in_own_process(job, argv))
    return [r[0] if "refused" in r[0] else {k: statistics.median(x[k] for x in r) for k in r[0]} for r in found]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    line = "|".join(("-" if i == 0 else "") + "-" * (w + 1) + (":" if i else "") for i, w in enumerate(widths))
    body = [[cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
            for row in (header, *rows)]
    text = ["| " + " | ".join(cells) + " |" for cells in body]
    return "\n".join([text[0], f"|{line}|", *text[1:]])


def method_rows(results: Mapping[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the methods' table, relative to the two baselines."""
    header = ["method", "parameters (M)", "state (MB)", "memory (MB)", "beyond none", "beyond teacher", "s/step",
              "x none", "x teacher"]
    none, teacher = (results[name] for name in BASELINES)
    rows = []
    for name, r in results.items():
        if "refused" in r:
            rows.append([name, *["-"] * 8])
            continue
        memory = [r["peak"], r["peak"] - none["peak"], r["peak"] - teacher["peak"]]
        times = [f"{r['seconds']:.3g}", *(f"{r['seconds'] / b['seconds']:.2f}" for b in (none, teacher))]
        rows.append([name, f"{r['parameters'] / 1e6:.2f}", f"{r['state'] / 1e6:.0f}",
                     *(f"{m / 1e6:.0f}" for m in memory), *times])
    return header, rows


def form_rows(results: Mapping[str, list[dict]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of slow forms: forward and backward of one loss, memory beyond its inputs."""
    header = ["loss", "slow form (s)", "ours (s)", "speed-up", "slow form (MB)", "ours (MB)"]
    rows = []
    for name, (slow, ours) in results.items():
        if "refused" in slow or "refused" in ours:
            rows.append([name, *["-"] * 5])
            continue
        rows.append([name, f"{slow['seconds']:.3g}", f"{ours['seconds']:.3g}",
                     f"{slow['seconds'] / ours['seconds']:.1f}x", f"{slow['peak'] / 1e6:.0f}",
                     f"{ours['peak'] / 1e6:.0f}"])
    return header, rows


def refusals(results: Mapping[str, dict | list[dict]]) -> list[tuple[str, str]]:
    """(name, reason) of everything that could not be measured."""
    flat = [(name, r) for name, found in results.items() for r in (found if isinstance(found, list) else [found])]
    return [(name, r["refused"]) for name, r in flat if "refused" in r]


def parse(argv: list[str] | None) -> Options:
    """The command line."""
    return parse_options(Options, argv, prog="benchmark_methods.py", description=__doc__.split("\n")[0])


def measure_job(job: list, options: Options) -> dict[str, float]:
    """The figures of ["method", name] or ["form", name, 0 | 1] (slow form, ours), measured in this process."""
    return measure_method(job[1], options) if job[0] == "method" else measure_form(job[1], job[2], options)


def main(argv: list[str] | None = None) -> int:
    """Measure and print one Markdown table. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    if options.job is not None:
        print(MARK + json.dumps(measure_job(json.loads(options.job), options)))
        return 0
    for name in (options.student, options.teacher):
        with torch.device("meta"):
            network(name, 2)
    if options.slow_forms:
        from tests.slow_forms import FORMS

        measured = measure_all([["form", n, which] for n in FORMS for which in (0, 1)], options.repeats, argv)
        results = {n: measured[2 * i:2 * i + 2] for i, n in enumerate(FORMS)}
        header, rows = form_rows(results)
    else:
        names = [*BASELINES, *options.methods]
        results = dict(zip(names, measure_all([["method", n] for n in names], options.repeats, argv), strict=True))
        for name in BASELINES:
            if "refused" in results[name]:
                raise UserError(f"the baseline {name!r} could not be measured: {results[name]['refused']}")
        header, rows = method_rows(results)
    print(f"{options.teacher} -> {options.student}, {options.dataset}, crop {options.crop[0]}x{options.crop[1]}, batch "
          f"{options.batch}, {options.device}, median of {options.repeats} x {options.steps} steps\n")
    print(table(header, rows))
    for name, reason in refusals(results):
        print(f"\n{name}: not measured: {reason}")
    if options.json:
        settings = {k: v for k, v in asdict(options).items() if k not in ("job", "json")}
        Path(options.json).write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
