#!/usr/bin/env python3
"""The same training under several sets of flags and seeds: losses over the run, scores and speed side by side.

    python tools/loss_curves.py --out work_dir/curves --seeds 0 1 2 --variants float32 "bf16=--amp bf16" -- \\
        --method afdcd --dataset camvid --data data/CamVid --teacher-pretrained FILE --max-iterations 300

What stands after the bare ``--`` are flags of ``train_kd.py`` for all runs. A variant is NAME or NAME=FLAGS. Finished
runs are kept and unfinished ones go on, so that an interrupted call can be repeated. Prints two Markdown tables.
"""
from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.markdown import spread
from utils.cli import parse_options, run_main
from utils.errors import UserError
from utils.files import write_json
from utils.options import OptionGroup, option

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Options(OptionGroup):
    """The command line, without the flags of the training."""
    out: str = option("work_dir/curves", "folder of the runs", metavar="DIR")
    seeds: tuple[int, ...] = option((0, 1, 2), "seeds of every variant", at_least=0, metavar="N")
    variants: tuple[str, ...] = option(("float32", "bf16=--amp bf16"), "names, each with its flags",
                                       metavar="NAME=FLAGS")
    windows: int = option(6, "equal spans of the run that the losses are averaged over", at_least=1, metavar="N")
    json: str | None = option(None, "write everything there too", metavar="FILE")


@dataclass(frozen=True)
class Curve:
    """One finished run. losses: mean of each window. scores: {split: mIoU, a fraction}. speed: median images/s."""
    losses: list[float]
    scores: dict[str, float]
    speed: float


def split_variant(text: str) -> tuple[str, list[str]]:
    """'bf16=--amp bf16' -> ('bf16', ['--amp', 'bf16'])."""
    name, _, flags = text.partition("=")
    if not name or "/" in name:
        raise UserError(f"--variants {text!r}: expected NAME or NAME=FLAGS")
    return name, shlex.split(flags)


def records(folder: Path) -> list[dict]:
    """The JSON lines of a run."""
    return [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text("utf-8").splitlines()]


def is_finished(folder: Path, flags: list[str]) -> bool:
    """Whether the run of this folder has come to its end; UserError when it was made with other flags."""
    note = folder / "flags.json"
    if note.is_file() and json.loads(note.read_text("utf-8")) != flags:
        raise UserError(f"{folder} holds a run with other flags: remove it, or choose another folder with --out")
    return (folder / "finished").is_file()


def train(folder: Path, flags: list[str]) -> None:
    """Run ``train_kd.py`` to its end, from where an interrupted run stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "flags.json", flags)
    command = [sys.executable, str(ROOT / "train_kd.py"), *flags, "--save-dir", str(folder), "--log-dir", str(folder),
               "--resume", "auto", "--no-tensorboard"]
    sys.stderr.write(f"{folder}: {shlex.join(flags)}\n")
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{folder}: train_kd.py ended with code {done.returncode}: {done.stderr.strip()[-300:]}")
    (folder / "finished").touch()


def read_curve(folder: Path, windows: int) -> Curve:
    """The curve of a finished run."""
    lines = records(folder)
    steps = [r for r in lines if r["kind"] == "train"]
    if len(steps) < windows:
        raise UserError(f"{folder}: {len(steps)} logged iterations for --windows {windows}: lower --log-iter")
    bounds = [round(i * len(steps) / windows) for i in range(windows + 1)]
    losses = [statistics.mean(r["loss"] for r in steps[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    scores = {r["split"]: r["mIoU"] for r in lines if r["kind"] in ("val", "report")}
    return Curve(losses, scores, statistics.median(r["images_per_second"] for r in steps))


def tables(curves: dict[str, list[Curve]]) -> str:
    """Losses of every window, then the last mIoU of every split and the speed: a row per variant."""
    first = next(iter(curves.values()))[0]
    parts = [f"{i + 1}/{len(first.losses)}" for i in range(len(first.losses))]
    lines = [f"| loss in part | {' | '.join(parts)} |", "|---" * (len(parts) + 1) + "|"]
    for name, runs in curves.items():
        lines.append(f"| {name} | {' | '.join(spread([r.losses[i] for r in runs]) for i in range(len(parts)))} |")
    splits = list(first.scores)
    header = " | ".join(["variant", *(f"mIoU {s} %" for s in splits), "images/s"])
    lines += ["", f"| {header} |", "|---" * (len(splits) + 2) + "|"]
    for name, runs in curves.items():
        scores = [spread([100 * r.scores[s] for r in runs], ".2f") for s in splits]
        lines.append(f"| {' | '.join([name, *scores, format(statistics.median(r.speed for r in runs), '.1f')])} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run what is not there yet and print the tables. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    own, common = (argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, [])
    options = parse_options(Options, own, prog="loss_curves.py", description="Compare trainings under several flags.")
    variants = dict(map(split_variant, options.variants))
    for seed in options.seeds:
        for name, flags in variants.items():
            folder, given = Path(options.out) / f"{name}_seed{seed}", [*common, *flags, "--seed", str(seed)]
            if not is_finished(folder, given):
                train(folder, given)
    curves = {name: [read_curve(Path(options.out) / f"{name}_seed{s}", options.windows) for s in options.seeds]
              for name in variants}
    print(tables(curves))
    if options.json:
        write_json(Path(options.json), {"flags": common, "seeds": options.seeds, "variants": variants, "curves": {
            name: [vars(run) for run in runs] for name, runs in curves.items()}})
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
