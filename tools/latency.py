#!/usr/bin/env python3
"""How fast networks are on this device: as they are, as .pt2 and in onnxruntime.

    python tools/latency.py work_dir/student --size 1024 2048 --csv latency.csv      # the student, and its teacher
    python tools/latency.py deeplabv3-resnet18 deeplabv3-resnet101 --size 512 1024 --batch-sizes 1 8 --device cuda

A network is the folder of a run (which means its student and its teacher, if it had one), a weights file with its JSON
file, a folder of tools/export.py, or MODEL-BACKBONE. Weights do not matter to the speed: they are random. Measured is
one call, from normalized pictures in memory to logits at the network's stride, in a process of its own for every row.
"""
from __future__ import annotations

import csv
import io
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import nn

from engine.class_map import taught
from models import get_segmentation_model, read_info
from models.hub import CONFIG, read_config
from models.outside import check_said, is_outside
from tools.bench.turns import ROOT, Refused, Worker, say
from tools.exporting.graph import Form, input_divisor, trace, write_onnx, write_pt2
from tools.finished import read_settings
from tools.markdown import table
from utils.cli import ArgumentParser, read_options, run_main
from utils.errors import UserError
from utils.extras import need
from utils.files import check_target, write_text
from utils.machine import machine
from utils.options import OptionGroup, option

FORMS = ("pytorch", "torch-export", "onnxruntime")
#: of the exported forms, the package without which they cannot be made
PACKAGES = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime")}


@dataclass(frozen=True, kw_only=True)
class Latency(OptionGroup):
    """The command line, without the networks."""

    size: tuple[int, int] = option(MISSING, "height and width of the pictures", at_least=16, metavar=("H", "W"))
    batch_sizes: tuple[int, ...] = option((1,), "pictures per call", at_least=1, metavar="N")
    forms: tuple[str, ...] | None = option(None, "pytorch: a prepared copy, as eval.py has it; the others are exported "
                                                 "first (default: all whose packages are installed)", choices=FORMS)
    calls: int = option(50, "measured calls of a row", at_least=1, metavar="N")
    warm: int = option(5, "calls before them", at_least=0, metavar="N")
    seconds: float = option(30.0, "no further call of a row after so many, but for three", above=0, metavar="S")
    num_class: int = option(19, "classes of a network that is named MODEL-BACKBONE", at_least=1, metavar="N")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda", choices=("cpu", "cuda"))
    threads: int | None = option(None, "threads on a CPU (default: torch's)", at_least=1, metavar="N")
    csv: str | None = option(None, "write all figures there too", metavar="FILE")


@dataclass(frozen=True)
class Subject:
    """A network that is measured. role: "student", "teacher" or "" where there is no such thing. architecture: of one
    of another library, as JSON text."""

    model: str
    backbone: str
    num_class: int
    role: str = ""
    head_width: int | None = None
    architecture: str | None = None

    @classmethod
    def described(cls, info: Mapping[str, Any], where: object, role: str = "", named: str | None = None) -> Subject:
        """Of the description of a network (``models.describe``). where, named: as in ``outside.check_said``."""
        check_said(info, where, named, setting="")
        said = info.get("architecture")
        return cls(info["model"], info["backbone"], info["num_class"], role, info.get("head_width"),
                   None if said is None else json.dumps(said))

    @property
    def title(self) -> str:
        """As the table names it."""
        return f"{self.role} {'-'.join(filter(None, (self.model, self.backbone)))}".strip()


@dataclass(frozen=True)
class Row:
    """Figures of one network in one form with one batch size. Times in milliseconds of a call; memory in bytes: the
    most at any time, and what of it came on top of the network, its input and all that is loaded. parameters, gflop (of
    one picture): None where the network could not be run as it is. file: bytes of the exported file."""

    network: str
    form: str
    batch: int
    calls: int
    median_ms: float
    p95_ms: float
    images_per_second: float
    memory: int
    work_memory: int
    parameters: int | None
    gflop: float | None
    file: int | None


def find_subjects(source: str, num_class: int) -> list[Subject]:
    """The networks that a word of the command line means. UserError for what is none."""
    path = Path(source).expanduser()
    if path.is_dir() and (path / CONFIG).is_file():
        return [Subject.described(read_config(path), path)]
    if path.is_dir():
        return _subjects_of_run(path)
    if path.is_file():
        info = read_info(path)
        if info is None:
            raise UserError(f"{source}: no JSON file beside it says what network it is of; expected MODEL-BACKBONE")
        return [Subject.described(info, path)]
    model, dash, backbone = source.partition("-")
    if ":" in model:  # of another library, whose name is one word
        return [Subject(source, "", num_class)]
    if not dash:
        raise UserError(f"{source}: no such file or folder; expected one, or MODEL-BACKBONE such as deeplabv3-resnet18")
    return [Subject(model, backbone, num_class)]


def _subjects_of_run(folder: Path) -> list[Subject]:
    """The student of a run, and the teacher that it had."""
    settings = read_settings(folder)
    n = settings.networks
    described = [info for path in sorted(folder.glob("*.pth")) if (info := read_info(path)) is not None]
    if not described:
        raise UserError(f"{folder}: no weights with their JSON file, which says how many classes there are")
    student = Subject.described(described[0], folder, "student", n.student_model)
    teacher = Subject(n.teacher_model, n.teacher_backbone, taught(n) if n.class_map else student.num_class, "teacher",
                      n.teacher_head_width)
    return [student, *([teacher] * settings.needs_teacher)]


def chosen_forms(options: Latency) -> list[str]:
    """The forms that are measured; UserError when a package of one that was asked for is missing."""
    if options.forms is None:
        return [form for form in FORMS if all(find_spec(package) for package in PACKAGES.get(form, ()))]
    for package in (package for form in options.forms for package in PACKAGES.get(form, ())):
        need(package, "export")
    return list(dict.fromkeys(options.forms))


def write_forms(subject: Subject, forms: Sequence[str], size: tuple[int, int],
                folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Export a network into a folder, which is made: for any size or, where that cannot be, for this one; {form: its
    file}, and lines about what could not be."""
    exported = [form for form in forms if form != "pytorch"]
    if not exported:
        return {}, []
    torch.manual_seed(0)
    net = get_segmentation_model(subject.model, subject.backbone, subject.num_class, aux=False,
                                 head_width=subject.head_width,
                                 architecture=json.loads(subject.architecture or "null")).eval()
    folder.mkdir()
    made, lines = _write_graphs(net, Form(), exported, folder), []
    left = [form for form in exported if made[form] is not None]
    again = _write_graphs(net, Form(size=size), left, folder) if left else {}
    for form, reason in again.items():
        lines.append(f"{subject.title}, {form}: " + (f"not measured: {reason}" if reason else
                                                     "of a graph for this size, there is none for any size"))
    return {form: folder / form for form, reason in (made | again).items() if reason is None}, lines


def _write_graphs(net: nn.Module, content: Form, forms: Sequence[str], folder: Path) -> dict[str, UserError | None]:
    """Write a network in several forms; {form: why it could not be}."""
    try:
        program = trace(net, content, input_divisor(net) if content.size is None else 1).program
    except UserError as reason:
        return dict.fromkeys(forms, reason)
    failed: dict[str, UserError | None] = dict.fromkeys(forms)
    for form in forms:
        try:
            if form == "torch-export":
                write_pt2(program, folder / form)
            else:
                write_onnx(program, content, folder / form)
        except UserError as reason:
            failed[form] = reason
    return failed


def measure(subject: Subject, forms: Sequence[str], options: Latency, folder: Path) -> tuple[list[Row], list[str]]:
    """Every form of a network with every batch size, one after the other; and lines about what could not be."""
    say(f"{subject.title}: exporting")
    (files, refused), rows = write_forms(subject, forms, options.size, folder), []
    cost: tuple[int | None, float | None] = (None, None)
    for form in ("pytorch", *files):  # the first one says what all cost
        for batch in options.batch_sizes:
            say(f"{subject.title}: {form}, batch {batch}")
            job = {"kind": "forward", "code": str(ROOT), "device": options.device, "threads": options.threads,
                   "form": form, "batch": batch, "size": options.size, "file": str(files.get(form, "")),
                   "model": subject.model, "backbone": subject.backbone, "num_class": subject.num_class,
                   "head_width": subject.head_width, "architecture": subject.architecture}
            try:
                with Worker(job) as worker:
                    if form == "pytorch" and None in cost:
                        flops = worker.ask(do="flops")["flops"] / batch / 1e9
                        cost = worker.about["facts"]["parameters"], flops
                    if form not in forms:
                        break
                    timed = worker.ask(do="calls", calls=options.calls, warm=options.warm, most=options.seconds)
            except Refused as reason:
                refused.append(f"{subject.title}, {form}, batch {batch}: not measured: {reason}")
                continue
            file = files[form].stat().st_size if form in files else None
            rows.append(make_row(subject, form, batch, timed, worker.about["idle"], cost, file))
    return rows, refused


def make_row(subject: Subject, form: str, batch: int, timed: dict[str, Any], idle: int,
             cost: tuple[int | None, float | None], file: int | None) -> Row:
    """The figures of one row."""
    milliseconds = 1000 * np.array(timed["seconds"])
    median, p95 = np.percentile(milliseconds, (50, 95)).tolist()
    return Row(subject.title, form, batch, len(milliseconds), median, p95, 1000 * batch / median, timed["peak"],
               timed["peak"] - idle, *cost, file)


def show(rows: Sequence[Row]) -> str:
    """The Markdown table."""
    header = ["network", "form", "batch", "median ms", "p95 ms", "images/s", "memory (MB)", "beyond start (MB)",
              "parameters (M)", "GFLOP/image", "file (MB)"]
    return table(header, [[
        r.network, r.form, str(r.batch), f"{r.median_ms:.4g}", f"{r.p95_ms:.4g}", f"{r.images_per_second:.4g}",
        f"{r.memory / 1e6:.0f}", f"{r.work_memory / 1e6:.0f}", number(r.parameters, 1e-6, ".2f"),
        number(r.gflop, 1, ".4g"), number(r.file, 1e-6, ".1f")] for r in rows])


def number(value: float | None, factor: float, form: str) -> str:
    """A figure of the table; a dash for one that is not known."""
    return "-" if value is None else format(value * factor, form)


def write_csv(path: Path, rows: Sequence[Row], about: dict[str, Any], size: tuple[int, int]) -> None:
    """Write every figure, and what they are figures of, atomically."""
    text = io.StringIO()
    more = {"height": size[0], "width": size[1], "hardware": about["gpu"] or about["cpu"], "threads": about["threads"],
            "torch": about["torch"]}
    writer = csv.DictWriter(text, [*Row.__dataclass_fields__, *more], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**asdict(row), **more} for row in rows)
    write_text(path, text.getvalue())


def main(argv: list[str] | None = None) -> int:
    """Measure and print the table. Returns the exit code."""
    parser = ArgumentParser(prog="latency.py", description=__doc__.split("\n")[0],
                            usage="%(prog)s NETWORK... --size H W [options]")
    parser.add_argument("networks", nargs="+", metavar="NETWORK",
                        help="folder of a run, weights file, folder of tools/export.py, or MODEL-BACKBONE")
    parser.add_options(parser, Latency)
    parsed = parser.parse_args(argv)
    options = read_options(vars(parsed), Latency)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: expected a GPU that torch can use, there is none")
    if options.csv is not None:
        check_target(Path(options.csv), "--csv", is_folder=False)
    forms = chosen_forms(options)
    subjects = list(dict.fromkeys(one for name in parsed.networks for one in find_subjects(name, options.num_class)))
    for one in subjects:
        if is_outside(one.model):  # whose library may not build without memory
            continue
        with torch.device("meta"):  # what does not exist is said before anything is measured
            get_segmentation_model(one.model, one.backbone, one.num_class, head_width=one.head_width)
    with tempfile.TemporaryDirectory() as folder:
        found = [measure(one, forms, options, Path(folder) / str(i)) for i, one in enumerate(subjects)]
    rows = [row for some, _ in found for row in some]
    about = machine(options.device) | {"threads": options.threads or torch.get_num_threads()}
    print(f"Pictures of {options.size[0]}x{options.size[1]}\n\n{show(rows)}\n")
    for line in (line for _, lines in found for line in lines):
        print(line)
    print(f"{about['gpu'] or about['cpu']}, {about['threads']} threads, torch {about['torch']}")
    if options.csv is not None:
        write_csv(Path(options.csv), rows, about, options.size)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
