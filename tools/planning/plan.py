"""From a plan, a small TOML file in ``train_scripts/plans/``, to the runs that it means.

    title = "CamVid on two cores"       # shown above the list of runs
    protocol = "camvid-cpu-1"           # a changed plan gets a new name: runs of one protocol are compared
    dataset = "camvid"
    data = "data/CamVid"                # default: what common.sh says, and DATA
    paint = {train = 200, points = 5}   # these toy streets into data: parameters of write_toy_streets
    student = "deeplabv3 resnet18_w0.25"
    seeds = [0, 1, 2]
    gpus = 0                            # processes of a run; default: all GPUs of the machine
    flags = {crop-size = [176, 176]}    # of every run; values as on the command line; none that a key here sets
    student-flags = {aux = false}       # of every run but the teachers'

    [teachers.mbv2]                     # trained first, with the first seed
    network = "deeplab_mobile mobilenetv2"
    flags = {max-iterations = 4000}
    label = "long"                      # default: "none"; tells it from runs with the same network
    [teachers.other]                    # or a file that is there already
    network = "deeplabv3 resnet18_w0.5"
    file = "pretrained_ckpt/other.pth"

    [runs.afdcd]                        # the name is the label of the row
    method = "afdcd"                    # default: the label
    teacher = "mbv2"                    # default: the only teacher, unless method = "none"
    flags = {lambda-fd = 1e-3}
    seeds = [0]                         # default: the plan's

    [scan.lambda-fd]                    # more runs, of the first seed and of protocol camvid-cpu-1-scan
    of = "afdcd"                        # the run, or a list, whose weight is looked for; each in one scan
    values = [2e-4, 1e-3, 5e-3]
    flags = {max-iterations = 500}      # on top of that run's
"""
from __future__ import annotations

import shlex
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.results import result_path
from engine.run_files import RunFiles
from engine.settings import Settings, parse_settings
from tools.flags import parsed
from tools.planning.checks import check_keys, repeated
from tools.planning.command import ROOT, Network, Places, as_flags, joined, running_flags, training_flags
from utils.cli import describe_error
from utils.errors import UserError, did_you_mean

FOLDER = ROOT / "train_scripts" / "plans"


@dataclass(frozen=True)
class Job:
    """One run of a plan.

    name: protocol/data set/pair/label/seed, the path of its result; script: below the repository; flags: all that
    follow it; settings: what they mean; needs: names of the jobs that train its teacher; environment: on top of the
    caller's; table: the one of the plan that means it, none of a published row."""

    name: str
    script: str
    flags: tuple[str, ...]
    settings: Settings
    needs: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    table: str = ""

    @property
    def command(self) -> list[str]:
        """The command line, to be run in the root of the repository."""
        return ["bash", self.script, *self.flags]

    @property
    def shown(self) -> str:
        """The command line with its environment, to be copied to a terminal."""
        return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in self.environment.items()), shlex.join(self.command)])

    @property
    def result(self) -> Path:
        """The file that it leaves in the results folder."""
        return ROOT / result_path(self.settings)

    @property
    def folder(self) -> Path:
        """Of its weights, state and log."""
        return ROOT / self.settings.running.save_dir

    @property
    def best(self) -> Path:
        """Its best weights, as commands name them."""
        return RunFiles(self.settings).best

    @property
    def states(self) -> list[Path]:
        """Its training states, the newest first."""
        files = RunFiles(self.settings)
        return [ROOT / path for path in (files.state, files.previous_state) if (ROOT / path).exists()]


def plan_names() -> list[str]:
    """The plans that there are a file of."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read_plan(source: str | Path, others: Sequence[str] = ()) -> dict[str, Any]:
    """The content of a plan, by name or by file. UserError when it is none, or holds what nobody reads. others: names
    that the caller takes too, for the message."""
    path = Path(source).expanduser() if str(source).endswith(".toml") else FOLDER / f"{source}.toml"
    try:
        plan = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        names = [*plan_names(), *others]
        raise UserError(f"plan {source}: no such plan; expected a .toml file or one of {', '.join(names)}"
                        f"{did_you_mean(str(source), names)}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a TOML file ({error})") from error
    check_keys(plan, path)
    return plan


class Expansion:
    """The jobs of one plan, teachers first. Every command line is checked. seeds: in place of those of the plan and of
    its rows."""

    def __init__(self, plan: Mapping[str, Any], places: Places, seeds: Sequence[int] | None = None) -> None:
        self.plan, self.places = plan, places
        self.seeds = list(seeds or ())
        self.student = Network.read(plan["student"], "student")
        self.teachers = {name: Network.read(entry.get("network"), f"[teachers.{name}]")
                         for name, entry in plan.get("teachers", {}).items()}

    def jobs(self) -> list[Job]:
        """All of them, in the order in which they can run. UserError when two would share their files."""
        jobs = [*self._teachers(), *self._runs(), *self._scans()]
        if name := repeated(job.name for job in jobs):
            tables = [job.table for job in jobs if job.name == name]
            raise UserError(f"{' and '.join(tables)} mean the same run {name}: give the teacher a label of its own in "
                            f"{tables[0]}, such as label = \"teacher\"")
        return jobs

    def _teachers(self) -> Iterator[Job]:
        for name, entry in self.plan.get("teachers", {}).items():
            if "file" not in entry:
                yield self._teacher_job(name)

    def _runs(self) -> Iterator[Job]:
        for label, entry in self.plan["runs"].items():
            for seed in self.seeds or entry.get("seeds", self.plan["seeds"]):
                yield self._run(label, entry, seed, f"[runs.{label}]")

    def _scans(self) -> Iterator[Job]:
        scanned: dict[str, str] = {}
        for setting, entry in self.plan.get("scan", {}).items():
            for label in [entry["of"]] if isinstance(entry["of"], str) else entry["of"]:
                if (other := scanned.setdefault(label, setting)) != setting:
                    raise UserError(f"[scan.{setting}]: {label} is in [scan.{other}] already, and a table names its "
                                    "trials by their values alone: give the run a second label for this scan")
                if label not in self.plan["runs"]:
                    raise UserError(f"[scan.{setting}]: no run {label!r} in the plan; expected one of "
                                    f"{', '.join(self.plan['runs'])}")
                run = self.plan["runs"][label]
                for value in entry["values"]:
                    changed = {**run, "flags": {**run.get("flags", {}), **entry.get("flags", {}),
                                               setting: value}}
                    yield self._run(label, changed, self.plan["seeds"][0], f"[scan.{setting}]", f"{value:g}")

    def _run(self, label: str, entry: Mapping[str, Any], seed: int, where: str, scanned: str | None = None) -> Job:
        method = entry.get("method", label)
        teacher = entry.get("teacher", next(iter(self.teachers)) if method != "none" and self.teachers else None)
        if teacher is not None and teacher not in self.teachers:
            raise UserError(f"[runs.{label}]: no teacher {teacher!r} in the plan; expected one of "
                            f"{', '.join(self.teachers)}")
        flags = {**self.plan.get("student-flags", {}), **entry.get("flags", {})}
        return self._job(where, self.student, label, method, seed, flags, teacher, scanned)

    def _job(self, where: str, net: Network, label: str, method: str, seed: int, flags: Mapping[str, Any],
             teacher: str | None = None, scanned: str | None = None) -> Job:
        plan = self.plan
        protocol = plan["protocol"] + ("-scan" if scanned else "")
        label = f"{label}+{scanned}" if scanned else label
        pair = f"{self.teachers[teacher].name if teacher else 'none'}-{net.name}"
        name = f"{protocol}/{plan['dataset']}/{pair}/{label}/{seed}"
        data = self.places.data or plan.get("data")
        weights, needs = self._teacher_weights(teacher) if teacher else (None, ())
        own = {**training_flags(data, method, net, (self.teachers[teacher], weights) if teacher else None),
               **running_flags(self.places, protocol, name, label, seed)}
        words = [*as_flags({**plan.get("flags", {}), **flags}), *joined(own)]
        environment = {"PYTHON": sys.executable, **({"GPUS": str(plan["gpus"])} if "gpus" in plan else {})}
        try:
            settings = parsed(parse_settings, ["--dataset", plan["dataset"], *words])
        except UserError as error:
            raise UserError(f"{where}: {describe_error(error)}") from error
        return Job(name, "train_scripts/train.sh", (plan["dataset"], *words), settings, needs, environment, where)

    def _teacher_weights(self, name: str) -> tuple[Path, tuple[str, ...]]:
        """(file of a teacher, name of the job that trains it)."""
        if "file" in self.plan["teachers"][name]:
            return Path(self.plan["teachers"][name]["file"]).expanduser(), ()
        job = self._teacher_job(name)
        return job.best, (job.name,)

    def _teacher_job(self, name: str) -> Job:
        entry = self.plan["teachers"][name]
        return self._job(f"[teachers.{name}]", self.teachers[name], entry.get("label", "none"), "none",
                         self.plan["seeds"][0], entry.get("flags", {}))
