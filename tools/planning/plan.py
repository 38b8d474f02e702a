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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from dataset import list_datasets
from engine.results import result_path
from engine.run_files import RunFiles
from engine.settings import Settings, build_parser, parse_settings
from models import is_outside, list_models, network_name, split_backbone
from models.outside.sources import SOURCES
from models.timm_backbone import is_timm
from tools.flags import parsed
from utils.cli import describe_error
from utils.errors import UserError, did_you_mean

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "train_scripts" / "plans"
KEYS = {"": {"title", "protocol", "dataset", "data", "student", "paint", "seeds", "gpus", "flags",
             "student-flags", "teachers", "runs", "scan"},
        "paint": {"train", "val", "test", "height", "width", "seed", "points"},
        "teachers": {"network", "file", "flags", "label"}, "runs": {"method", "teacher", "flags", "seeds"},
        "scan": {"of", "values", "flags"}}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(value: Any, *kinds: type) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) in kinds for one in value)


#: {key: (what is allowed, in words)} of those that are checked by kind, wherever they stand
VALUES = {"seeds": (lambda v: _is_list(v, int) and min(v) >= 0, "a list of whole numbers, such as [0, 1, 2]"),
          "values": (lambda v: _is_list(v, int, float), "a list of numbers, such as [2e-4, 1e-3]"),
          "of": (lambda v: _is_text(v) or _is_list(v, str), "the name of a run, or a list of them"),
          "gpus": (lambda v: type(v) is int and v >= 0, "a whole number"),
          **dict.fromkeys(("flags", "student-flags"), (lambda v: isinstance(v, dict), "a table, such as {lr = 0.1}")),
          **dict.fromkeys(("title", "protocol", "dataset", "data", "method", "teacher", "file", "label"),
                          (_is_text, "a text in quotes"))}


#: {key of a list: its values as names of runs have them}
NAMED = {"seeds": str, "of": str, "values": "{:g}".format}


def repeated(values: Iterable[Any]) -> Any:
    """The first value that is among those before it, None when all differ."""
    seen: set[Any] = set()
    return next((value for value in values if value in seen or seen.add(value)), None)


@dataclass(frozen=True)
class Places:
    """Folders. results: of result files; work: of weights, states and logs; data: of the data set, None for the plan's.

    Those inside the repository are given relative to it, so that results say nothing of the machine's folders."""

    results: Path = Path("results")
    work: Path = Path("work_dir")
    data: Path | None = None

    @classmethod
    def of(cls, **given: str | None) -> Places:
        """From folders of the command line, relative to where it was given."""
        paths = {name: Path(text).expanduser().resolve() for name, text in given.items() if text is not None}
        return cls(**{name: path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
                      for name, path in paths.items()})


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


def running_flags(places: Places, protocol: str, name: str, label: str, seed: int) -> dict[str, list[str]]:
    """The flags that a plan adds to every run, by what sets them: where its files go, and that it goes on where it
    stopped."""
    folder = str(places.work / name)
    return {"the key seeds": ["--seed", str(seed)],
            "--work of tools/reproduce.py": ["--save-dir", folder, "--log-dir", folder],
            "--results of tools/reproduce.py": ["--results", str(places.results)],
            "the key protocol": ["--protocol", protocol], "the NAME of [runs.NAME]": ["--label", label],
            "tools/reproduce.py itself": ["--resume", "auto"]}


def joined(flags: Mapping[str, list[str]]) -> list[str]:
    """The flags without what sets them."""
    return [word for words in flags.values() for word in words]


def check_names(model: str, backbone: str, where: str) -> None:
    """UserError for a network that this repository does not have. It is not built; timm knows its own."""
    pairs = list_models()
    backbones = [own for one, own in pairs if one == model]
    if not backbones:
        models = list(dict.fromkeys(one for one, _ in pairs))
        raise UserError(f"{where}: unknown model {model!r}; expected one of {', '.join(models)}"
                        f"{did_you_mean(model, models)}")
    if not is_timm(backbone) and (base := split_backbone(backbone)[0]) not in backbones:
        raise UserError(f"{where}: unknown backbone {backbone!r} for {model}; expected one of {', '.join(backbones)}, "
                        f"optionally with a width such as _w0.5, or timm:NAME{did_you_mean(base, backbones)}")


@dataclass(frozen=True)
class Network:
    """model and backbone, as '--student-model' and '--student-backbone' take them. backbone: "" for a network of
    another library."""

    model: str
    backbone: str = ""

    @classmethod
    def read(cls, text: Any, where: str) -> Network:
        """From 'deeplabv3 resnet18', or 'module:examples.espnet:camvid'. UserError for anything else."""
        words = text.split() if isinstance(text, str) else []
        if len(words) == 2 and not is_outside(words[0]):
            check_names(*words, where)
        elif len(words) != 1 or not is_outside(words[0]):
            raise UserError(f"{where}: expected 'MODEL BACKBONE', such as \"deeplabv3 resnet18\", or one word for a "
                            f"network from elsewhere, such as \"smp:Unet:resnet34\", got {text!r}")
        elif (source := words[0].partition(":")[0]) not in SOURCES:
            raise UserError(f"{where}: unknown source {source!r} of {text!r}; expected one of {', '.join(SOURCES)}"
                            f"{did_you_mean(source, SOURCES)}")
        return cls(*words)

    @property
    def name(self) -> str:
        """In names of folders."""
        return network_name(self.model, self.backbone)

    def flags(self, role: str) -> list[str]:
        """Of the command line. role: teacher or student."""
        return [f"--{role}-model", self.model, *((f"--{role}-backbone", self.backbone) if self.backbone else ())]


def training_flags(data: object, method: str, student: Network,
                   teacher: tuple[Network, Path] | None) -> dict[str, list[str]]:
    """The flags that say what a run trains, by what sets them. data: its folder, None for what common.sh says. teacher:
    with its file."""
    flags = {"the key data": ["--data", str(data)] if data else [],
             "the key method of [runs.NAME]": ["--method", method], "the key student": student.flags("student")}
    if teacher:
        flags |= {"the key network of [teachers.NAME]": teacher[0].flags("teacher"),
                  "the key file of [teachers.NAME]": ["--teacher-pretrained", str(teacher[1])]}
    return flags


@cache
def flags_of_keys() -> dict[str, str]:
    """{flag, without dashes and in any spelling: what sets it}: those that no table of flags may hold. train.sh makes
    --dataset of its first word, and --no-cuda of the number of GPUs."""
    net, parser = Network("model", "backbone"), build_parser()
    flags = {**training_flags("data", "none", net, (net, Path("file"))), **running_flags(Places(), "", "", "", 0),
             "the key dataset": ["--dataset", "name"], "the key gpus": ["--no-cuda"]}
    return {spelling: key for key, words in flags.items() for setting in parser.given(words)
            for spelling in (setting, *parser.options[setting].aliases)}


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


def check_keys(plan: Mapping[str, Any], path: Path) -> None:
    """UserError for a key that nobody reads, and for one that is missing."""
    for kind in ("teachers", "runs", "scan"):
        if not isinstance(entries := plan.get(kind, {}), dict):
            raise UserError(f"{path}: [{kind}]: expected tables, such as [{kind}.NAME], got {entries!r}")
    parts = [("", plan), ("paint", plan.get("paint", {})),
             *((f"{kind}.{name}", entry) for kind in ("teachers", "runs", "scan")
               for name, entry in plan.get(kind, {}).items())]
    for where, entry in parts:
        if not isinstance(entry, dict):
            raise UserError(f"{path}: [{where}]: expected a table, got {entry!r}")
        if where.startswith("scan.") and (missing := {"of", "values"} - entry.keys()):
            raise UserError(f"{path}: [{where}] {', '.join(sorted(missing))} is missing")
        known = sorted(KEYS[where.partition(".")[0]])
        if unknown := sorted(entry.keys() - set(known)):
            raise UserError(f"{path}: {f'[{where}] ' if where else ''}unknown key {unknown[0]!r}; expected some of "
                            f"{', '.join(known)}{did_you_mean(unknown[0], known)}")
        if where != "paint":
            check_values(entry, f"{path}:{f' [{where}]' if where else ''}")
    needed = {"protocol", "dataset", "student", "seeds", "runs", *(["data"] if "paint" in plan else [])}
    if missing := needed - plan.keys():
        raise UserError(f"{path}: {', '.join(sorted(missing))} is missing")
    if plan["dataset"] not in list_datasets():
        raise UserError(f"{path}: dataset: unknown data set {plan['dataset']!r}; expected one of "
                        f"{', '.join(list_datasets())}{did_you_mean(plan['dataset'], list_datasets())}")
    if not plan["runs"]:
        raise UserError(f"{path}: [runs] is empty; expected at least one run, such as [runs.none]")
    if "paint" in plan:
        check_paint(plan, path)
    check_flags(plan, path)


def check_values(entry: Mapping[str, Any], where: str) -> None:
    """UserError for a value of another kind than its key takes."""
    for key, value in entry.items():
        allowed, expected = VALUES.get(key, (None, ""))
        if allowed and not allowed(value):
            raise UserError(f"{where} {key}: expected {expected}, got {value!r}")
        if key in NAMED and isinstance(value, list) and (name := repeated(map(NAMED[key], value))) is not None:
            raise UserError(f"{where} {key}: {name} is listed twice; expected each once")


def check_paint(plan: Mapping[str, Any], path: Path) -> None:
    """UserError for [paint] in a plan of other images, and for what is not a number."""
    if plan["dataset"] != "toy_streets":
        raise UserError(f"{path}: [paint] makes toy streets; expected dataset = \"toy_streets\", got "
                        f"{plan['dataset']!r}")
    for name, value in plan["paint"].items():
        if type(value) is not int:
            raise UserError(f"{path}: [paint] {name}: expected an integer, got {value!r}")


def check_flags(plan: Mapping[str, Any], path: Path) -> None:
    """UserError for a flag that another key of the plan, or the program, sets: it would have no effect."""
    tables = {**{key: plan.get(key, {}) for key in ("flags", "student-flags")},
              **{f"[{kind}.{name}] flags": entry.get("flags", {}) for kind in ("teachers", "runs", "scan")
                 for name, entry in plan.get(kind, {}).items()},
              **{f"[scan.{name}]": {name: entry["values"]} for name, entry in plan.get("scan", {}).items()}}
    for where, table in tables.items():
        for name in table:
            if key := flags_of_keys().get(name.replace("-", "_")):
                raise UserError(f"{path}: {where}: {name} cannot be set here, since {key} sets it")


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """{'crop-size': [176, 176], 'fast': False} -> ['--crop-size', '176', '176', '--no-fast']."""
    flags: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            flags.append(f"--{'' if value else 'no-'}{name}")
        else:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


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
