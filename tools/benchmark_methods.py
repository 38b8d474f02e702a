"""What every method costs on this machine: parameters, peak memory and time per step beside plain training.

    python tools/benchmark_methods.py
    python tools/benchmark_methods.py --methods kd afdcd --crop 256 512 --batch 2 --steps 5 --json costs.json
    python tools/benchmark_methods.py --slow-forms

Every measurement has a process of its own, and the repetitions go round all methods, so that a machine that slows down
slows all of them. Networks have random weights, images are noise: neither matters to the cost. Stages before training
run with their ``trial`` settings and are not counted. ``none`` trains the student alone; ``teacher`` runs the teacher
too and distils nothing, so that what a method itself adds is the difference to ``teacher``.
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
    """The command line; ``job``: the one measurement of a child process."""
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
    job: str | None = option(None, hidden=True)


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
    status = Path("/proc/self/status")
    if status.is_file():  # rather than ru_maxrss, which starts from the size of the process that started this one
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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


def random_batch(images: int, options: Options, num_class: int) -> tuple[Tensor, Tensor]:
    """Noise and random labels."""
    return (torch.randn(images, 3, *options.crop, device=options.device),
            torch.randint(0, num_class, (images, *options.crop), device=options.device))


def prepare(objective: Objective, teacher: nn.Module | None, options: Options, num_class: int) -> None:
    """Run the methods' stages before training, on noise."""
    def batches(steps: int, batch_size: int, start: int, role: str) -> Iterator[tuple]:
        for _ in range(start, steps):
            images, target = random_batch(batch_size, options, num_class)
            yield (images, images) if role == "both" else images, target

    with tempfile.TemporaryDirectory() as folder:
        stage = Preparation(objective.student, teacher, torch.device(options.device), Path(folder), True, batches,
                            lambda text: None, data="noise", images=options.batch)
        for distiller in objective.distillers.values():
            distiller.prepare(stage)


def measure_method(name: str, options: Options) -> dict[str, float]:
    """Seconds per training step and peak memory of one method or baseline; its parameters and bytes of state."""
    device = torch.device(options.device)
    num_class = get_dataset_spec(options.dataset).num_class
    method = "none" if name in BASELINES else name
    model, _, backbone = options.student.partition("-")
    settings = parse_settings([
        "--method", method, "--dataset", options.dataset, "--crop-size", *map(str, options.crop), "--batch-size",
        str(options.batch), "--student-model", model, "--student-backbone", backbone, "--teacher-pretrained", "random"])
    if method != "none":
        settings = from_flat({**settings.flat(), **methods()[method].trial})
    torch.manual_seed(0)
    student = network(options.student, num_class).train()
    has_teacher = name == "teacher" or settings.needs_teacher
    teacher = network(options.teacher, num_class).eval().requires_grad_(False).to(device) if has_teacher else None
    objective = build_objective(settings, student, teacher).to(device)
    step_fn = TrainStep(objective, teacher, build_optimizer(settings, objective), lr=1e-4, max_iterations=10**6)
    images, target = random_batch(options.batch, options, num_class)
    if method != "none":
        prepare(objective, teacher, options, num_class)
    costs = timed(lambda step: step_fn(images, images, target, step), options.steps, device)
    extra = objective.distillers
    kept = [*extra.buffers(), *(p for p in extra.parameters() if not p.requires_grad)]
    return {**costs, "parameters": sum(p.numel() for p in extra.parameters() if p.requires_grad),
            "state": sum(t.numel() * t.element_size() for t in kept)}


def measure_form(name: str, which: int, options: Options) -> dict[str, float]:
    """Seconds and memory beyond the inputs of forward and backward of one loss; which: 0 the slow form, 1 this form."""
    from tests.slow_forms import FORMS, make_maps
    device = torch.device(options.device)
    num_class = get_dataset_spec(options.dataset).num_class
    with torch.device("meta"):
        widths = tuple(network(n, num_class).channels["head"] for n in (options.student, options.teacher))
    maps = make_maps(options.batch, tuple(-(-side // 8) for side in options.crop), num_class, widths, device=device)
    reset_peak(device)
    before = peak_memory(device)
    costs = timed(lambda _: FORMS[name][which](maps).backward(), options.steps, device)
    return {**costs, "peak": costs["peak"] - before}


def in_own_process(job: list, argv: list[str]) -> dict:
    """Run this program once more for one measurement. Returns its figures, or {"refused": reason}."""
    done = subprocess.run([sys.executable, __file__, *argv, "--job", json.dumps(job)], capture_output=True, text=True)
    lines = [x for x in done.stdout.splitlines() if x.startswith(MARK)]
    if lines:
        return json.loads(lines[-1][len(MARK):])
    reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
    return {"refused": reason.removeprefix("benchmark_methods.py: error: ")}


def measure_all(jobs: list[list], repeats: int, argv: list[str]) -> list[dict]:
    """The median figures of every job, from ``repeats`` rounds over all of them; refused jobs are not repeated."""
    rounds: list[list[dict]] = [[] for _ in jobs]
    for repeat in range(repeats):
        for job, results in zip(jobs, rounds, strict=True):
            if not results or "refused" not in results[0]:
                sys.stderr.write(f"round {repeat + 1} of {repeats}: {' '.join(map(str, job[1:]))}\n")
                results.append(in_own_process(job, argv))
    return [r[0] if "refused" in r[0] else {k: statistics.median(x[k] for x in r) for k in r[0]} for r in rounds]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    head, *body = (" | ".join([first.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])
                   for first, *cells in (header, *rows))
    rule = "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])])
    return "\n".join([f"| {head} |", f"|{rule}|", *(f"| {line} |" for line in body)])


def method_rows(results: Mapping[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the methods' table, relative to the two baselines."""
    header = ["method", "parameters (M)", "state (MB)", "memory (MB)", "beyond none", "beyond teacher", "s/step",
              "x none", "x teacher"]
    none, teacher = (results[name] for name in BASELINES)
    rows = []
    for name, r in results.items():
        cells = ["-"] * 8
        if "refused" not in r:
            memory = (r["peak"], r["peak"] - none["peak"], r["peak"] - teacher["peak"])
            cells = [f"{r['parameters'] / 1e6:.2f}", *(f"{size / 1e6:.0f}" for size in (r["state"], *memory)),
                     f"{r['seconds']:.3g}", *(f"{r['seconds'] / base['seconds']:.2f}" for base in (none, teacher))]
        rows.append([name, *cells])
    return header, rows


def form_rows(results: Mapping[str, list[dict]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of slow forms: forward and backward of one loss, memory beyond its inputs."""
    header = ["loss", "slow form (s)", "this form (s)", "speed-up", "slow form (MB)", "this form (MB)"]
    rows = []
    for name, pair in results.items():
        cells = ["-"] * 5
        if not any("refused" in r for r in pair):
            slow, fast = (r["seconds"] for r in pair)
            cells = [f"{slow:.3g}", f"{fast:.3g}", f"{slow / fast:.1f}x", *(f"{r['peak'] / 1e6:.0f}" for r in pair)]
        rows.append([name, *cells])
    return header, rows


def parse(argv: list[str] | None) -> Options:
    """The command line."""
    return parse_options(Options, argv, prog="benchmark_methods.py", description=__doc__.split("\n")[0])


def measure_job(job: list, options: Options) -> dict[str, float]:
    """The figures of ["method", name] or ["form", name, 0 | 1] (slow form, this), measured in this process."""
    return measure_method(job[1], options) if job[0] == "method" else measure_form(job[1], job[2], options)


def main(argv: list[str] | None = None) -> int:
    """Measure and print one Markdown table. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    if options.job is not None:
        print(MARK + json.dumps(measure_job(json.loads(options.job), options)))
        return 0
    with torch.device("meta"):
        for name in (options.student, options.teacher):
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
    for name, costs in results.items():
        for reason in (r["refused"] for r in (costs if isinstance(costs, list) else [costs]) if "refused" in r):
            print(f"\n{name}: not measured: {reason}")
    if options.json:
        settings = {k: v for k, v in asdict(options).items() if k not in ("job", "json")}
        Path(options.json).write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
