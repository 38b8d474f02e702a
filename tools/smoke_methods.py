#!/usr/bin/env python3
"""A short real run of every method from one teacher: does its loss fall, what does validation say?

    python tools/smoke_methods.py --data data/toy_streets --teacher-model deeplabv3 --teacher-backbone resnet18_w0.5 \\
        --teacher-pretrained FILE --out runs/smoke

Prints a Markdown table. A smoke test, no comparison of methods: the runs are far too short and the published weights
belong to larger maps. Finished methods are kept, so that an interrupted call can be repeated.
"""
from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from losses.distiller import methods
from utils.cli import ArgumentParser, number, run_main
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
#: options that make a run of some dozens of steps possible: short stages, discriminators on small logits
SMALL = {"maskd": ["--maskd-steps", "30", "--maskd-batch-size", "4"], "kt": ["--kt-switch", "30"],
         "freekd": ["--freekd-steps", "30", "--freekd-batch-size", "4"],
         "attnfd": ["--attnfd-connector-steps", "30"]}
SMALL_LOGITS = ["--adv-upsample"]


def command(name: str, options, folder: Path) -> list[str]:
    """The ``train_kd.py`` command of one method ('none': not distilled)."""
    words = ["--dataset", options.dataset, "--data", options.data, "--method", name, "--student-model",
             options.student_model, "--student-backbone", options.student_backbone, "--crop-size",
             *map(str, options.crop_size), "--batch-size", str(options.batch_size), "--max-iterations",
             str(options.steps), "--workers", "0", "--log-iter", "1", "--save-per-iters", str(options.steps),
             "--val-per-iters", str(options.steps), "--no-tensorboard", "--save-dir", str(folder), "--log-dir",
             str(folder)]
    if name != "none":
        words += ["--teacher-model", options.teacher_model, "--teacher-backbone", options.teacher_backbone,
                  "--teacher-pretrained", options.teacher_pretrained, "--m-ocd", "16", "--pool-size", "2",
                  "--patch-size", "2", "2", *SMALL_LOGITS, *SMALL.get(name, [])]
    return [sys.executable, str(ROOT / "train_kd.py"), *words, *(["--no-cuda"] if options.no_cuda else [])]


def read(folder: Path) -> list[dict]:
    """The JSON lines that a run wrote."""
    return [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text("utf-8").splitlines()]


def result(name: str, options) -> list[dict]:
    """Records of the method's run, made now unless a complete one is there."""
    folder = Path(options.out) / name
    records = read(folder)
    if not any(r["kind"] == "val" and r["step"] == options.steps for r in records):
        done = subprocess.run(command(name, options, folder), capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{name}: exit code {done.returncode}: {(done.stderr.strip() or done.stdout)[-300:]}")
        records = read(folder)
    return records


def row(name: str, records: list[dict]) -> str:
    """Weighted sum of the method's own terms over the first and the last tenth of the run, and validation."""
    training = [r for r in records if r["kind"] == "train"]
    own = {t.name for t in methods()[name].terms} if name != "none" else {"task", "aux"}
    values = [sum(v for k, v in r["weighted"].items() if k in own) for r in training]
    part = max(len(values) // 10, 1)
    first, last = statistics.mean(values[:part]), statistics.mean(values[-part:])
    task = statistics.mean(r["raw"]["task"] for r in training[-part:])
    (val,) = [r for r in records if r["kind"] == "val"]
    return f"| {name} | {first:.4g} | {last:.4g} | {task:.3f} | {100 * val['mIoU']:.1f} |"


def main(argv: list[str] | None = None) -> int:
    """Run the methods one after another and print the table."""
    parser = ArgumentParser(prog="smoke_methods.py", description="A short real run of every method.")
    parser.add_argument("--dataset", default="toy_streets", help="data set")
    parser.add_argument("--data", default="data/toy_streets", metavar="DIR", help="its folder")
    for role, backbone in (("teacher", "resnet18_w0.5"), ("student", "resnet18_w0.25")):
        parser.add_argument(f"--{role}-model", default="deeplabv3", help=f"architecture of the {role}")
        parser.add_argument(f"--{role}-backbone", default=backbone, help=f"backbone of the {role}")
    parser.add_argument("--teacher-pretrained", required=True, metavar="FILE", help="trained teacher")
    parser.add_argument("--crop-size", type=number(int, 32), nargs=2, default=[64, 96], metavar="N", help="crop")
    parser.add_argument("--batch-size", type=number(int, 2), default=4, help="images per step")
    parser.add_argument("--steps", type=number(int, 10), default=60, help="steps per method")
    parser.add_argument("--methods", nargs="+", default=["none", *methods()], metavar="NAME", help="which ones")
    parser.add_argument("--out", default="runs/smoke", metavar="DIR", help="folder of the runs")
    parser.boolean(parser, "--no-cuda", False, "run on the CPU although there is a GPU")
    options = parser.parse_args(argv)
    unknown = set(options.methods) - {"none", *methods()}
    if unknown:
        raise UserError(f"--methods: unknown {', '.join(sorted(unknown))}; known are {', '.join(methods())}")
    print("| method | own terms, first tenth | last tenth | task loss, last tenth | val mIoU % |\n" + "|---" * 5 + "|")
    for name in options.methods:
        print(row(name, result(name, options)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
