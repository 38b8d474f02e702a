#!/usr/bin/env python3
"""A short real run of every method from one teacher: does its loss fall, what does validation say?

    python tools/smoke_methods.py --no-cuda      from the quickstart's teacher, on the streets of the plan toy-full

Prints a Markdown table. A smoke test, no comparison of methods: the runs are far too short and the published weights
belong to other networks. Finished methods are kept, so that an interrupted call can be repeated; those of other
settings, or of another teacher's file, are an error.
"""
from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from losses.core import methods
from models.published import local
from tools.planning.painting import paint
from tools.planning.plan import ROOT, read_plan
from utils.cli import parse_options, run_main
from utils.errors import UserError
from utils.files import sha256, write_json
from utils.options import OptionGroup, option

#: short stages, and for MGD a lower weight: with its own, this teacher's features let a run diverge at once
SMALL = {"maskd": ["--maskd-steps", "30", "--maskd-batch-size", "4"], "kt": ["--kt-switch", "30"],
         "freekd": ["--freekd-steps", "30", "--freekd-batch-size", "4"], "attnfd": ["--attnfd-connector-steps", "30"],
         "mgd": ["--lambda-mgd", "1e-3"]}


@dataclass(frozen=True, kw_only=True)
class Settings(OptionGroup):
    """The command line."""
    dataset: str = option("toy_streets", "data set")
    data: str | None = option(None, "its folder (default: the toy streets of the plan toy-full, painted unless they "
                                    "are there)", metavar="DIR")
    teacher_model: str = option("deeplabv3", "architecture of the teacher")
    teacher_backbone: str = option("resnet18_w0.375", "backbone of the teacher")
    student_model: str = option("deeplabv3", "architecture of the student")
    student_backbone: str = option("resnet18_w0.25", "backbone of the student")
    teacher_pretrained: str = option(str(ROOT / "pretrained_ckpt" / "toy_streets_teacher.pth"), "trained teacher",
                                     metavar="FILE")
    crop_size: tuple[int, int] = option((64, 96), "crop", at_least=32, metavar="N")
    batch_size: int = option(4, "images per step", at_least=2)
    steps: int = option(60, "steps per method", at_least=10)
    methods: tuple[str, ...] = option(("none", *methods()), "which ones", metavar="NAME",
                                      choices=lambda: ("none", *methods()))
    out: str = option("runs/smoke", "folder of the runs", metavar="DIR")
    no_cuda: bool = option(False, "run on the CPU although there is a GPU")


def command(name: str, settings: Settings, folder: Path) -> list[str]:
    """The ``train_kd.py`` command of one method ('none': not distilled)."""
    steps = str(settings.steps)
    flags = ["--dataset", settings.dataset, "--data", settings.data, "--method", name, "--student-model",
             settings.student_model, "--student-backbone", settings.student_backbone, "--crop-size",
             *map(str, settings.crop_size), "--batch-size", str(settings.batch_size), "--max-iterations", steps,
             "--workers", "0", "--log-iter", "1", "--save-per-iters", steps, "--val-per-iters", steps,
             "--no-tensorboard", "--save-dir", str(folder), "--log-dir", str(folder)]
    if name != "none":
        flags += ["--teacher-model", settings.teacher_model, "--teacher-backbone", settings.teacher_backbone,
                  "--teacher-pretrained", settings.teacher_pretrained, "--m-ocd", "16", "--pool-size", "2",
                  "--patch-size", "2", "2", "--adv-upsample", *SMALL.get(name, [])]
    return [sys.executable, str(ROOT / "train_kd.py"), *flags, *(["--no-cuda"] if settings.no_cuda else [])]


def read(folder: Path) -> list[dict]:
    """The JSON lines of the newest run in a folder."""
    log = max(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns, default=None)
    return [] if log is None else [json.loads(line) for line in log.read_text("utf-8").splitlines()]


def origin(name: str, settings: Settings) -> dict:
    """What a run depends on: its flags without its folders, and the teacher's file."""
    teacher = Path(local(settings.teacher_pretrained)).expanduser()
    return {"command": command(name, settings, Path(name))[2:],
            "teacher": sha256(teacher) if name != "none" and teacher.is_file() else None}


def result(name: str, settings: Settings) -> list[dict]:
    """Records of the method's run, made now unless a complete one is there. UserError when that has other settings."""
    folder = Path(settings.out) / name
    made_by, note = origin(name, settings), folder / "made_by.json"
    if any(r["kind"] == "val" for r in read(folder)):
        if not note.is_file() or json.loads(note.read_text("utf-8")) != made_by:
            raise UserError(f"--out {settings.out}: {folder} holds a run of other settings, of another teacher, or one "
                            f"that does not say what it was made with; delete it, or name another folder")
    else:
        write_json(note, made_by)
        done = subprocess.run(command(name, settings, folder), capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip())[-800:]
            raise UserError(f"{name}: exit code {done.returncode}: {said}")
    return read(folder)


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
    settings = parse_options(Settings, argv, prog="smoke_methods.py", description="A short real run of every method.")
    if settings.data is None:
        if settings.dataset != "toy_streets":
            raise UserError(f"--data: expected the folder of --dataset {settings.dataset}")
        plan = read_plan("toy-full")
        paint(plan)
        settings = replace(settings, data=str(ROOT / plan["data"]))
    print("| method | own terms, first tenth | last tenth | task loss, last tenth | val mIoU % |\n" + "|---" * 5 + "|")
    for name in settings.methods:
        print(row(name, result(name, settings)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
