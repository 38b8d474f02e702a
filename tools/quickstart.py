#!/usr/bin/env python3
"""The main job in small: toy streets, a teacher, the same student without and with Af-DCD, a table and a picture.

    python tools/quickstart.py                  one seed, a few minutes on two CPU cores
    python tools/quickstart.py --seeds 0 1 2    the figures of the README

Safe to interrupt and to run again: finished parts are kept, an unfinished training goes on where it stopped.
"""
from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from dataset import SegmentationDataset, get_dataset_spec
from dataset.toy_streets import write_toy_streets
from engine.evaluate import evaluate
from models import get_segmentation_model
from utils.cli import parse_options, run_main
from utils.distributed import available_cpus
from utils.errors import UserError
from utils.files import write_json
from utils.options import OptionGroup, option
from utils.visualize import comparison, save_rgb

ROOT = Path(__file__).resolve().parent.parent
ROLES = ("teacher", "plain", "afdcd")
TITLES = {"teacher": "teacher", "plain": "student, plain", "afdcd": "student, Af-DCD"}


@dataclass(frozen=True)
class Recipe:
    """Sizes, iterations and weights. Everything but the seeds."""
    height: int = 120
    width: int = 160
    train: int = 400
    val: int = 40
    test: int = 100
    crop: tuple[int, int] = (96, 128)
    batch: int = 4
    teacher: tuple[str, str] = ("deeplabv3", "resnet18_w0.5")
    student: tuple[str, str] = ("deeplabv3", "resnet18_w0.25")
    teacher_iterations: int = 1000
    student_iterations: int = 600
    teacher_lr: float = 0.05
    student_lr: float = 0.02
    lambda_kd: float = 2.0
    lambda_fd: float = 2e-5
    lambda_ctr: float = 1e-3
    pool_size: int = 2
    patch_size: tuple[int, int] = (2, 2)

    def network(self, role: str) -> tuple[str, str]:
        """(model, backbone) of a role."""
        return self.teacher if role == "teacher" else self.student

    def schedule(self, role: str) -> tuple[int, float]:
        """(iterations, learning rate) of a role."""
        teacher, student = (self.teacher_iterations, self.teacher_lr), (self.student_iterations, self.student_lr)
        return teacher if role == "teacher" else student


SHORT = replace(Recipe(), height=72, width=96, train=24, val=4, test=8, crop=(64, 96), teacher_iterations=12,
                student_iterations=8)


def run(arguments: list[str]) -> None:
    """Run a program of this repository with this Python, its output on our terminal; stop when it fails."""
    print("\n$ python " + " ".join(arguments), flush=True)
    if code := subprocess.run([sys.executable, *arguments], cwd=ROOT).returncode:
        raise UserError(f"{arguments[0]} failed with exit code {code}: its message is above")


def weights(out: Path, role: str, seed: int, recipe: Recipe) -> Path:
    """File of a role's final network."""
    return out / f"{role}_seed{seed}" / f"kd_{'_'.join(recipe.network(role))}_toy_streets.pth"


def is_trained(out: Path, role: str, seed: int, recipe: Recipe) -> bool:
    """True when the role's last iteration is done and its network written."""
    network = weights(out, role, seed, recipe)
    state, steps = network.with_name(f"{network.stem}_state.pth"), recipe.schedule(role)[0]
    return network.is_file() and state.is_file() and torch.load(state, weights_only=True, mmap=True)["step"] == steps


def training(out: Path, data: Path, role: str, seed: int, recipe: Recipe) -> list[str]:
    """The command that trains one network, or finishes the training that an interrupted run began."""
    (model, backbone), (steps, lr) = recipe.network(role), recipe.schedule(role)
    folder = str(out / f"{role}_seed{seed}")
    command = ["train_kd.py", "--dataset", "toy_streets", "--data", str(data), "--no-cuda", "--resume", "auto",
               "--student-model", model, "--student-backbone", backbone, "--crop-size", *map(str, recipe.crop),
               "--batch-size", str(recipe.batch), "--max-iterations", str(steps), "--lr", str(lr),
               "--workers", "1", "--seed", str(seed), "--save-dir", folder, "--log-dir", folder, "--log-iter", "50",
               "--save-per-iters", "100", "--skip-val", "--no-tensorboard"]
    if role != "afdcd":
        return [*command, "--method", "none"]
    return [*command, "--method", "afdcd", "--teacher-model", recipe.teacher[0], "--teacher-backbone",
            recipe.teacher[1], "--teacher-pretrained", str(weights(out, "teacher", seed, recipe)),
            "--lambda-kd", str(recipe.lambda_kd), "--lambda-fd", str(recipe.lambda_fd), "--lambda-ctr",
            str(recipe.lambda_ctr), "--pool-size", str(recipe.pool_size), "--patch-size", *map(str, recipe.patch_size)]


def test(out: Path, data: Path, role: str, seed: int, recipe: Recipe) -> dict:
    """Evaluate the final network of a role on the test images with ``eval.py``; its JSON."""
    model, backbone = recipe.network(role)
    answer = out / f"{role}_seed{seed}" / "test.json"
    run(["eval.py", "--model", model, "--backbone", backbone, "--dataset", "toy_streets", "--data", str(data),
         "--pretrained", str(weights(out, role, seed, recipe)), "--split", "test", "--no-cuda", "--workers", "1",
         "--json", str(answer)])
    return json.loads(answer.read_text(encoding="utf-8"))


def table(results: dict[int, dict[str, dict]], recipe: Recipe) -> str:
    """mIoU and pixel accuracy on the test images, in percent, per seed and on average."""
    lines = [f"Toy streets, {recipe.test} test images, in percent", "",
             f"{'':18s}{'network':38s}{'mIoU':>14s}{'pixel accuracy':>18s}"]
    for role in ROLES:
        cells = []
        for key in ("mIoU", "pixAcc"):
            values = [100 * r[role][key] for r in results.values()]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        lines.append(f"{TITLES[role]:18s}{'-'.join(recipe.network(role)):38s}{cells[0]:>14s}{cells[1]:>18s}")
    if len(results) > 1:
        lines += ["", f"mean ± standard deviation over seeds {', '.join(map(str, results))}"]
    return "\n".join(lines)


def picture(out: Path, data: Path, seed: int, recipe: Recipe, results: dict[str, dict]) -> Path:
    """One row per test image: image, truth, teacher, plain student, distilled student."""
    spec = get_dataset_spec("toy_streets", data)
    split = SegmentationDataset(spec, data, "test", train=False, limit=4)
    items = [split[i] for i in range(len(split))]
    predictions: list[list[np.ndarray]] = [[] for _ in ROLES]
    for role, own in zip(ROLES, predictions, strict=True):
        model, backbone = recipe.network(role)
        net = get_segmentation_model(model=model, backbone=backbone, num_class=spec.num_class,
                                     pretrained=str(weights(out, role, seed, recipe)))
        evaluate(net, split, device=torch.device("cpu"), on_prediction=lambda x, _, own=own: own.append(x.numpy()))
    images = [np.ascontiguousarray(item["image"].permute(1, 2, 0).numpy()[..., ::-1]) for item in items]
    titles = [f"{TITLES[role]}\nmIoU {100 * results[role]['mIoU']:.1f} %" for role in ROLES]
    panel = comparison(images, [item["label"].numpy() for item in items], predictions, titles, palette=spec.palette,
                       classes=spec.classes, heading=f"Toy streets, {recipe.test} test images")
    save_rgb(out / "panel.png", panel)
    return out / "panel.png"


@dataclass(frozen=True)
class Options(OptionGroup):
    """The command line."""
    seeds: tuple[int, ...] = option((0,), "one complete run per seed", at_least=0, metavar="N")
    out: str | None = option(None, "folder of the runs (default: runs/quickstart)", metavar="DIR")
    short: bool = option(False, "a few iterations on a few images: shows that everything works")


def main(argv: list[str] | None = None) -> int:
    """Run the whole quickstart; returns the exit code."""
    options = parse_options(Options, argv, prog="quickstart.py", description="Distil a small network on toy streets.")
    recipe = SHORT if options.short else Recipe()
    folder = options.out or ROOT / "runs" / ("quickstart_short" if options.short else "quickstart")
    out = Path(folder).expanduser().resolve()
    note, wanted = out / "recipe.json", json.loads(json.dumps(asdict(recipe)))
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) != wanted:
        raise UserError(f"{out} holds runs of another recipe: remove it, or choose another folder with --out")
    start = time.perf_counter()
    data = ROOT / "data" / f"toy_streets_{recipe.height}x{recipe.width}_{recipe.train}"
    if not data.is_dir():
        print(f"painting {recipe.train + recipe.val + recipe.test} toy streets into {data} ...", flush=True)
    write_toy_streets(str(data), train=recipe.train, val=recipe.val, test=recipe.test, height=recipe.height,
                      width=recipe.width, workers=available_cpus())
    write_json(note, wanted)
    results: dict[int, dict[str, dict]] = {}
    for seed in options.seeds:
        for role in ROLES:  # what is not trained yet: the teacher, then the student without and with it
            if is_trained(out, role, seed, recipe):
                print(f"{TITLES[role]} (seed {seed}) is trained already: {out / f'{role}_seed{seed}'}")
            else:
                run(training(out, data, role, seed, recipe))
        results[seed] = {role: test(out, data, role, seed, recipe) for role in ROLES}
    path = picture(out, data, options.seeds[0], recipe, results[options.seeds[0]])
    print(f"\n{table(results, recipe)}\n\nPictures: {path}\nRuns:     {out}\n"
          f"Time:     {(time.perf_counter() - start) / 60:.1f} min")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
