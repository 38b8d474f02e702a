#!/usr/bin/env python3
"""What ``tools/gpu_day.sh`` runs beside the benchmark; each part leaves a JSON file. PyTorch and numpy are enough.

    python tools/gpu_day.py {report,check,profile,train} --out DIR [--short]

report: the machine. check: every method, fast forms against plain twins and this device against the CPU, and no wait of
the host. profile: which kernels a training step spends its time in. train: a short training on painted images of
CamVid's kind, in full and in half precision.
"""
from __future__ import annotations

import importlib.util
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import tools.absent
from engine.run import Run, train_batch
from engine.settings import Settings
from losses.core import methods
from tools.simulate_memory import build, loader_batch, settings_of
from utils.cli import parse_options, run_main
from utils.distributed import init_distributed
from utils.errors import UserError
from utils.files import write_json
from utils.options import OptionGroup, option
from utils.score import SegmentationMetric

CUDA = torch.cuda.is_available()
PRECISIONS = {"float32": ["--amp", "off"], "bf16": ["--amp", "bf16", "--channels-last"]}


@dataclass(frozen=True)
class Options(OptionGroup):
    """The command line after the name of the part."""

    out: str = option("gpu_day", "folder of the JSON files", metavar="DIR")
    short: bool = option(False, "small sizes: shows that it runs")


def report(options: Options) -> dict[str, Any]:
    """Machine, versions, and which of the optional packages are there."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
             "cudnn": torch.backends.cudnn.version(), "numpy": np.__version__, "threads": torch.get_num_threads(),
             "packages": {name: name not in tools.absent.MISSING and importlib.util.find_spec(name) is not None
                          for name in (*tools.absent.OPTIONAL, "triton", "torchvision", "pytest")}}
    if CUDA:
        gpu = torch.cuda.get_device_properties(0)
        found["gpu"] = {"name": gpu.name, "memory": gpu.total_memory, "capability": [gpu.major, gpu.minor],
                        "processors": gpu.multi_processor_count, "count": torch.cuda.device_count()}
    return found


def relative(x: Tensor, y: Tensor) -> float:
    """Distance of two tensors, relative to the second."""
    x, y = x.detach().double().cpu(), y.detach().double().cpu()
    return float((x - y).norm() / y.norm().clamp(min=1e-30))


def method_results(name: str, device: str, *flags: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Terms of a method on fixed random maps, and the gradients that reach the student's."""
    from method_cases import STUDENT, TEACHER, build, labels, outputs, run, smallest_crop
    crop = smallest_crop(name)
    distiller = build(name, crop, flags=flags).to(device)
    student, teacher = (outputs(i, crop, seed=n, device=device) for n, i in enumerate((STUDENT, TEACHER)))
    terms = run(distiller, student, teacher, labels(crop, device=device))
    leaves = [x for x in student if x is not None]
    grads = torch.autograd.grad(sum(terms.values()), leaves, allow_unused=True)
    return terms, [g for g in grads if g is not None]


def check_fast_against_plain(name: str) -> None:
    """Fast form and plain twin on this device."""
    fast, plain = (method_results(name, DEVICE, flag) for flag in ("--fast", "--no-fast"))
    compare(fast, plain, 1e-4)


def check_against_cpu(name: str) -> None:
    """The same numbers as on the CPU. A method with random numbers of its own draws others there."""
    first, again = (method_results(name, "cpu", "--no-fast") for _ in range(2))
    compare(again, first, 0.0)
    if name in ("afdcd", "mgd", "cirkd", "cirkdv2", "lad", "skd", "ifvd"):
        return  # masks, queues, noise: another stream of random numbers on another device
    compare(method_results(name, DEVICE, "--no-fast"), first, 1e-3)


def compare(one: tuple[dict, list], two: tuple[dict, list], tolerance: float) -> None:
    """Raise AssertionError unless terms and gradients agree."""
    assert one[0].keys() == two[0].keys() and len(one[1]) == len(two[1])
    for term, value in two[0].items():
        assert relative(one[0][term], value) <= tolerance, f"{term}: {float(one[0][term])} and {float(value)}"
    for i, (g, h) in enumerate(zip(one[1], two[1], strict=True)):
        assert relative(g, h) <= 10 * tolerance, f"gradient {i} differs by {relative(g, h):.2g}"


def check_no_wait(name: str) -> None:
    """A second step on a GPU does not make the host wait."""
    if not CUDA:
        return
    from method_cases import STUDENT, TEACHER, batch, build, images_like, labels, outputs, smallest_crop, train
    crop = smallest_crop(name)
    distiller = build(name, crop).cuda()
    train(distiller, crop, range(1), device="cuda")
    student, teacher = (outputs(i, crop, seed=n, device="cuda") for n, i in enumerate((STUDENT, TEACHER)))
    target, generator = labels(crop, device="cuda"), torch.Generator("cuda").manual_seed(0)
    given = batch(student, teacher, target, images=images_like(student, target))
    torch.cuda.set_sync_debug_mode("error")
    try:
        sum(distiller(given, generator).values()).backward()
        distiller.after_step(0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


DEVICE = "cuda" if CUDA else "cpu"
CHECKS: tuple[Callable[[str], None], ...] = (check_fast_against_plain, check_against_cpu, check_no_wait)


def check(options: Options) -> dict[str, Any]:
    """Every check of every method: "passed", or what went wrong."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    results = {}
    for name in ("kd", "afdcd", "fitnet") if options.short else methods():
        for test in CHECKS:
            try:
                test(name)
                said = "passed"
            except Exception as error:  # the others shall run all the same
                said = f"{type(error).__name__}: {error}"[:500]
            results[f"{test.__name__}[{name}]"] = said
            if said != "passed":
                print(f"{test.__name__}[{name}]: {said}", flush=True)
    return {"device": DEVICE, "results": results, "failed": sum(said != "passed" for said in results.values())}


def small(settings: Settings, options: Options) -> Settings:
    """With --short, settings with crops that take seconds."""
    return replace(settings, data=replace(settings.data, crop_size=(96, 96))) if options.short else settings


def small_or_published(options: Options, folder: str, batch: int, *flags: str) -> Run:
    """The run of a published row of Af-DCD: Cityscapes, or with --short CamVid with narrow networks."""
    row = "camvid-r18" if options.short else "citys-mbv2"
    settings = small(settings_of(row, "afdcd", 2 if options.short else batch, list(flags), options.short, folder),
                     options)
    return build(settings, init_distributed().device)


def timed_steps(run: Run, count: int) -> float:
    """Seconds per step."""
    batch = pinned(loader_batch(run.settings))
    start = time.perf_counter()
    for _ in range(count):
        train_batch(run, batch)
        run.step += 1
    if CUDA:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def pinned(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As the loader hands it over."""
    return {name: x.pin_memory() if CUDA else x for name, x in batch.items()}


def kernels(events: Any) -> list[dict[str, Any]]:
    """{name, calls, device and host microseconds} of the operations that take longest on the device."""
    own = [{"name": e.key[:120], "calls": e.count, "device_us": e.self_device_time_total,
            "host_us": e.self_cpu_time_total} for e in events]
    return sorted(own, key=lambda e: -(e["device_us"] if CUDA else e["host_us"]))[:40]


def profile_steps(options: Options) -> dict[str, Any]:
    """Three steps of Af-DCD in full and in half precision under the profiler: kernels, img/s, peak memory."""
    found = {}
    for name, flags in PRECISIONS.items():
        run = small_or_published(options, options.out, 16, *flags)
        timed_steps(run, 1 if options.short else 3)
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        seconds = timed_steps(run, 1 if options.short else 5)
        peak = torch.cuda.max_memory_allocated() if CUDA else None
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]) as recorded:
            timed_steps(run, 1 if options.short else 3)
        events = recorded.key_averages()
        images = run.settings.optimization.batch_size
        found[name] = {"images": images, "images_per_second": images / seconds, "peak_memory": peak,
                       "flop_per_image": run.step_fn.flops, "kernels": kernels(events)}
        order = "self_device_time_total" if CUDA else "self_cpu_time_total"
        Path(options.out, f"profile-{name}.txt").write_text(events.table(sort_by=order, row_limit=40))
        print(f"{name}: {images / seconds:.1f} img/s", flush=True)
        del run, recorded
        torch.cuda.empty_cache()
    return found


def painted(count: int, size: tuple[int, int], classes: int) -> tuple[Tensor, Tensor]:
    """uint8 images [N, 3, H, W] and int16 labels [N, H, W]: blocks whose color tells the class, with noise on it."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (-(-side // 40) for side in size)
    label = torch.randint(0, classes, (count, rows, columns), generator=generator)
    label = label.repeat_interleave(40, 1).repeat_interleave(40, 2)[:, :size[0], :size[1]]
    colors = torch.randint(40, 216, (classes, 3), generator=generator)
    image = colors[label].permute(0, 3, 1, 2) + torch.randn(count, 3, *size, generator=generator) * 20
    return image.clamp(0, 255).to(torch.uint8), label.to(torch.int16)


def batches(images: Tensor, label: Tensor, size: int, steps: int) -> Iterator[dict[str, Tensor]]:
    """Random batches as the loader delivers them."""
    generator = torch.Generator().manual_seed(1)
    valid = torch.tensor([0, images.shape[2], 0, images.shape[3]]).int().expand(size, 4).contiguous()
    for _ in range(steps):
        chosen = torch.randint(0, len(images), (size,), generator=generator)
        yield pinned({"image": images[chosen], "valid": valid, "label": label[chosen]})


@torch.no_grad()
def score(run: Run, images: Tensor, label: Tensor) -> float:
    """mIoU of the student on the painted images."""
    student, device = run.student.eval(), run.distributed.device
    metric = SegmentationMetric(student.num_class, device=device)
    for image, its_label in zip(images.split(4), label.split(4), strict=True):
        logits = student(student.preprocess(image.to(device))).logits
        logits = torch.nn.functional.interpolate(logits.float(), its_label.shape[-2:], mode="bilinear")
        metric.update(logits, its_label.to(device))
    student.train()
    return metric.result()["mIoU"]


def train(options: Options) -> dict[str, Any]:
    """Af-DCD on painted images at CamVid's size, from the same start in full and half precision: losses and mIoU."""
    steps, count, found = (6, 4, {}) if options.short else (120, 64, {})
    for name, flags in PRECISIONS.items():
        settings = small(settings_of("camvid-r18", "afdcd", 2 if options.short else 8, [
            *flags, "--max-iterations", str(steps)], options.short, options.out), options)
        run = build(settings, init_distributed().device)
        images, label = painted(count, settings.data.crop_size, run.student.num_class)
        losses, start = [], time.perf_counter()
        for batch in batches(images, label, settings.optimization.batch_size, steps):
            losses.append(train_batch(run, batch).weighted)
            run.step += 1
        if fault := run.step_fn.find_fault():
            raise UserError(f"--{name}: {fault}")
        seconds = time.perf_counter() - start
        curve = [{term: float(value) for term, value in one.items()} for one in losses]
        found[name] = {"steps": steps, "images_per_second": steps * settings.optimization.batch_size / seconds,
                       "losses": curve, "mIoU": score(run, images, label)}
        print(f"{name}: loss {sum(curve[0].values()):.3f} -> {sum(curve[-1].values()):.3f}, "
              f"mIoU {found[name]['mIoU']:.3f}", flush=True)
    return found


PARTS: Mapping[str, Callable[[Options], dict[str, Any]]] = {
    "report": report, "check": check, "profile": profile_steps, "train": train}


def main(argv: list[str] | None = None) -> int:
    """Run one part. Returns the exit code: 1 when a check failed."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in PARTS:
        sys.stderr.write(f"gpu_day.py: error: expected one of {', '.join(PARTS)} first\n")
        return 2
    options = parse_options(Options, argv[1:], prog=f"gpu_day.py {argv[0]}", description=__doc__.split("\n")[0])
    Path(options.out).mkdir(parents=True, exist_ok=True)
    found = PARTS[argv[0]](options)
    write_json(Path(options.out, f"{argv[0]}.json"), found)
    return 1 if found.get("failed") else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
