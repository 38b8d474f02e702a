"""What each benchmark measures: cases, and in each the jobs that are done in turn."""
from __future__ import annotations

import io
import shlex
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dataset import get_dataset_spec
from losses.core import methods
from models import get_segmentation_model
from models.outside import is_outside
from tools.bench.options import Common, Compared, Contrast, Criterion, Eval, Loader, Methods, Networks, SlowForms, Step
from tools.bench.synthetic import write_split
from tools.bench.turns import ROOT
from utils.errors import UserError

Jobs = dict[str, dict[str, Any]]
BASELINES = ("none", "teacher")
FOLDER = "{folder}"


@dataclass(frozen=True)
class Case:
    """Jobs whose costs are compared with each other."""

    title: str
    jobs: Jobs


def job(kind: str, options: Common, **more: Any) -> dict[str, Any]:
    """The description of a piece of work for the child process."""
    return {"kind": kind, "code": str(ROOT), "device": options.device, "threads": options.threads, **more}


def network_flags(prefix: str, name: str) -> list[str]:
    """Flags of a network, with the prefix "student-", "teacher-" or none. UserError when there is no such network."""
    model, dash, backbone = name.partition("-")
    if not dash:
        raise UserError(f"network {name!r}: expected MODEL-BACKBONE, for example deeplabv3-resnet18")
    with torch.device("meta"):
        get_segmentation_model(model=model, backbone=backbone, num_class=2)
    return [f"--{prefix}model", model, f"--{prefix}backbone", backbone]


def chosen_variants(options: Compared) -> dict[str, list[str]]:
    """{variant: its flags} in the order of the table."""
    known = dict(options.VARIANTS)
    for text in options.variant:
        name, equals, flags = text.partition("=")
        if not name or not equals:
            raise UserError(f"--variant {text}: expected NAME=FLAGS, for example 'half=--amp bf16'")
        known[name] = flags
    added = [text.partition("=")[0] for text in options.variant]
    names = dict.fromkeys([*(options.variants or options.USUAL), *added])
    for name in names:
        if name not in known:
            raise UserError(f"--variants {name}: expected some of {', '.join(known)}, or one made by --variant")
    return {name: shlex.split(known[name]) for name in names}


def checkout(source: str, folder: Path) -> str:
    """The folder of another version of this code: ``source`` itself, or a git revision's files below ``folder``."""
    if Path(source).is_dir():
        found = Path(source).resolve()
    else:
        done = subprocess.run(["git", "-C", str(ROOT), "archive", source], capture_output=True)
        if done.returncode:
            raise UserError(f"--against {source}: expected a folder or a git revision of this repository")
        found = folder / "against"
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            archive.extractall(found, filter="data")
    if not (found / "engine" / "build.py").is_file():
        raise UserError(f"--against {source}: expected a version of this code that has engine/build.py")
    return str(found)


def compared(options: Compared, folder: Path, kind: str, flags: list[str], **more: Any) -> Jobs:
    """The jobs of all variants for one case; flags: those that all of them share."""
    jobs = {}
    if options.against is not None:
        jobs[options.against] = job(kind, options, flags=flags, **more) | {"code": checkout(options.against, folder)}
    for name, own in chosen_variants(options).items():
        own = [part.replace(FOLDER, str(folder)) for part in own]
        jobs[name] = job(kind, options, flags=[*flags, *own], **more)
    return jobs


def noise(dataset: str, folder: Path, split: str, count: int, size: tuple[int, int]) -> str:
    """The folder of a synthetic data set, which is written now."""
    spec, root = get_dataset_spec(dataset), folder / "noise"
    write_split(spec, root, getattr(spec, split), count, size)
    return str(root)


def teacher_flags(options: Networks) -> list[str]:
    """Flags of the teacher, which may come from elsewhere where it is run whole."""
    if isinstance(options, Step) and is_outside(options.teacher):
        return ["--teacher-model", options.teacher]
    return network_flags("teacher-", options.teacher)


def train_flags(options: Networks, crop: tuple[int, int], folder: Path) -> list[str]:
    """Flags of ``train_kd.py`` without method and data."""
    return [*network_flags("student-", options.student), *teacher_flags(options), "--dataset",
            options.dataset, "--crop-size", *map(str, crop), "--batch-size", str(options.batch), "--max-iterations",
            "1000000", "--lr", "1e-4", "--workers", "0", "--skip-val", "--no-tensorboard", "--save-dir",
            str(folder / "run"), "--log-dir", str(folder / "run")]


def method_flags(name: str, projector: str) -> list[str]:
    """Flags of a method. projector: of afdcd, with the mask that goes with it in the published rows."""
    enhanced = {"plain": ["--no-enhance-projector", "--rand-mask"],
                "enhanced": ["--enhance-projector", "--no-rand-mask"]}[projector]
    return ["--method", name, *(enhanced if name == "afdcd" else [])]


def method_titles(options: Step | Criterion) -> dict[str, str]:
    """{projector: what is measured}; only afdcd has two."""
    if options.method != "afdcd":
        return {options.projector[0]: options.method}
    return {projector: f"afdcd, {projector} projector" for projector in options.projector}


def step_cases(options: Step, folder: Path) -> list[Case]:
    """A training step, per projector."""
    data = options.data or noise(options.dataset, folder, "train_split", 4, options.crop)
    flags = [*train_flags(options, options.crop, folder), "--data", data]
    if options.teacher_pretrained is not None:
        flags += ["--teacher-pretrained", str(Path(options.teacher_pretrained).absolute())]
    title = f"{options.teacher} -> {options.student}, {options.dataset}, crop {options.crop[0]}x{options.crop[1]}, " \
            f"batch {options.batch}"
    return [Case(f"{text}, {title}", compared(options, folder, "step", [
        *flags, *method_flags(options.method, projector)])) for projector, text in method_titles(options).items()]


def criterion_cases(options: Criterion, folder: Path) -> list[Case]:
    """A method alone, per size of the maps and projector."""
    others = [term.setting for name, cls in methods().items() if name != options.method for term in cls.terms]
    silent = [part for setting in others for part in ("--" + setting.replace("_", "-"), "0")]
    cases = []
    for text in options.maps:
        height, _, width = text.partition("x")
        if not (height.isdigit() and width.isdigit()):
            raise UserError(f"--maps {text}: expected HEIGHTxWIDTH, for example 64x128")
        flags = train_flags(options, (8 * int(height), 8 * int(width)), folder)
        cases += [Case(f"{title}, maps of {text}, batch {options.batch}", compared(options, folder, "criterion", [
            *flags, *method_flags(options.method, projector), *silent]))
            for projector, title in method_titles(options).items()]
    return cases


def contrast_cases(options: Contrast, folder: Path) -> list[Case]:
    """The contrast of Af-DCD, per number of patches."""
    return [Case(f"contrast of {count} patches of 4x4 positions, {options.channels} channels in 16 groups",
                 compared(options, folder, "contrast", ["--method", "afdcd"], patches=count, channels=options.channels))
            for count in options.patches]


def loader_cases(options: Loader, folder: Path) -> list[Case]:
    """Samples of the training split."""
    data = options.data or noise(options.dataset, folder, "train_split", 8, options.size)
    flags = ["--method", "none", "--dataset", options.dataset, "--data", data, "--crop-size", *map(str, options.crop),
             "--student-backbone", "resnet18_w0.125", "--skip-val"]  # the network is built and takes no part
    what = options.data or "noise of {}x{}".format(*options.size)
    title = f"samples of {options.crop[0]}x{options.crop[1]} from {options.dataset}, {what}, one process"
    return [Case(title, compared(options, folder, "loader", flags, samples=options.samples))]


def eval_cases(options: Eval, folder: Path) -> list[Case]:
    """Whole images of the validation split."""
    data = options.data or noise(options.dataset, folder, "selection_split", options.images, options.size)
    flags = [*network_flags("", options.network), "--dataset", options.dataset, "--data", data, "--workers", "0",
             "--limit", str(options.images), *(["--no-cuda"] if options.device == "cpu" else [])]
    what = options.data or "noise of {}x{}".format(*options.size)
    return [Case(f"{options.network}, {options.dataset}, {what}, {options.images} images a turn",
                 compared(options, folder, "eval", flags, images=options.images))]


def method_jobs(options: Methods, folder: Path) -> Jobs:
    """Both baselines and the methods, with their published settings and a short stage before training."""
    flags = [*train_flags(options, options.crop, folder), "--data",
             noise(options.dataset, folder, "train_split", max(4, options.batch), options.crop)]
    jobs = {"none": job("step", options, flags=[*flags, "--method", "none"]),
            "teacher": job("step", options, flags=[*flags, "--method", "kd"], without_terms=True)}
    return jobs | {name: job("step", options, flags=[*flags, "--method", name], trial=True) for name in options.methods}


def form_jobs(options: SlowForms) -> dict[str, Jobs]:
    """{loss: the jobs of its slow form and of this form} of five losses."""
    from tests.slow_forms import FORMS

    names = [options.student, options.teacher]
    for name in names:
        network_flags("", name)
    return {name: {f"{name}, {form}": job("form", options, name=name, which=which, networks=names, batch=options.batch,
                                          dataset=options.dataset, crop=options.crop)
                   for which, form in enumerate(("slow form", "this form"))} for name in FORMS}


#: benchmark -> its cases
COMPARISONS: Mapping[type[Compared], Any] = {
    Step: step_cases, Criterion: criterion_cases, Contrast: contrast_cases, Loader: loader_cases, Eval: eval_cases}
