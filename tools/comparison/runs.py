"""A finished run as its folder tells it: settings, log, weights. And in which settings two runs differ."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.checkpoint import newest_state
from engine.results import digest, read_log, shared_settings
from engine.run_files import RunFiles
from engine.settings import Settings, unread
from models import NetworkChoice, network_name
from tools.finished import find_log, log_places, read_settings
from utils.errors import UserError
from utils.options import flag

#: settings that say where things lie, what is written and how it is loaded: they do not change a training
NOT_OF_THE_TRAINING = frozenset((
    "data", "cache", "save_dir", "log_dir", "log_iter", "save_per_iters", "results", "protocol", "label", "name",
    "resume", "tensorboard", "tracker", "tracker_project", "panels", "workers", "local_rank", "no_cuda", "start_epoch",
    "save_epoch", "val_epoch"))
NOT_SET = "not set"


@dataclass(frozen=True)
class TrainedRun:
    """One run. flag: the option that named its folder. weights: file of the network that is compared. digest: what the
    log says, as `engine.results.digest` gives it, and "iterations"."""

    flag: str
    folder: Path
    settings: Settings
    weights: Path
    log: Path
    digest: dict[str, Any]

    @property
    def network(self) -> NetworkChoice:
        """The trained network, with its weights; its preprocessing is what these say."""
        return replace(self.settings.networks.student, pretrained=str(self.weights), pretrained_base=None,
                       preprocess=None)

    @property
    def method(self) -> str:
        """Name of the method, "none" for plain training."""
        return self.settings.distillation.method or "afdcd"


def read_run(flag: str, folder: Path, weights: str = "best", name: str | None = None) -> TrainedRun:
    """The run of a folder. flag: named in errors. weights: "best" on the validation split, or "last"; but those of a
    file called ``name`` where the run has one.

    UserError for a folder without exactly one run, for an unfinished run, for files that are missing or cannot be read,
    and for a log without an iteration, or of a version of this code that wrote down less."""
    settings = read_settings(folder, flag)
    files = RunFiles(replace(settings, running=replace(settings.running, save_dir=str(folder), resume=None)))
    log = find_log(folder, settings)
    if log is None:
        raise UserError(f"{flag} {folder}: no log {files.json_log.name}; looked into "
                        f"{', '.join(str(path.parent) for path in log_places(folder, settings))}")
    found = _read_digest(log)
    if left := _left_to_do(settings, files, found):
        raise UserError(f"{flag} {folder}: an unfinished run, {left}; expected a finished one: the command that began "
                        "it, with --resume auto, goes on to its end")
    path = {files.best.name: files.best, files.student.name: files.student}.get(
        name, {"best": files.best, "last": files.student}[weights])
    if not path.is_file():
        other = "; of a run without validation, --weights last can be compared" if weights == "best" else ""
        raise UserError(f"{flag} {folder}: no {path.name}; expected the weights of a finished run{other}")
    return TrainedRun(flag, folder, settings, path, log, found)


def _read_digest(log: Path) -> dict[str, Any]:
    records = [r for r in read_log(log) if isinstance(r, dict)]
    trained = [r for r in records if r.get("kind") == "train"]
    if not trained:
        raise UserError(f"{log}: no trained iteration; expected the log of a finished run")
    try:
        return {**digest(records), "iterations": trained[-1]["step"]}
    except KeyError as error:
        raise UserError(f"{log}: its records have no {error}; expected the log of a run of this version") from error


def _left_to_do(settings: Settings, files: RunFiles, found: Mapping[str, Any]) -> str:
    """How far a run is that has not come to its end, "" for a finished one. found: what its log says.

    The log has no record of steps after the last one of --log-iter, nor of one that is skipped: where it ends early,
    the training state is asked."""
    last, validated = settings.optimization.max_iterations, [point["step"] for point in found["curve"]]
    step = max([found["iterations"], *validated])
    if step < last:
        step = max(step, _saved_step(files))
    if step < last:
        return f"at step {step} of {last}"
    waits = validated and validated[-1] < last and not settings.running.skip_val
    return f"at step {step} of {last} and before its last validation" if waits else ""


def _saved_step(files: RunFiles) -> int:
    """The step of the training state; 0 where none can be read."""
    try:
        return int(newest_state(files.states())[1]["step"]) if files.states() else 0
    except UserError:
        return 0


def check_pair(plain: TrainedRun, distilled: TrainedRun) -> None:
    """UserError unless one run is plain, the other distilled, and both are of one data set and one network."""
    for run, wanted in ((plain, False), (distilled, True)):
        if bool(run.settings.methods) != wanted:
            raise UserError(f"{run.flag} {run.folder}: a run of --method {run.method}; expected "
                            f"{'a distilled run' if wanted else 'a plain one, of --method none'}")
    names = [run.settings.data.dataset for run in (plain, distilled)]
    if names[0] != names[1]:
        raise UserError(f"{plain.flag} {plain.folder} and {distilled.flag} {distilled.folder} are runs of different "
                        f"data sets: {names[0]} and {names[1]}; expected the same")
    students = [_student(run) for run in (plain, distilled)]
    if students[0] != students[1]:
        raise UserError(f"{plain.flag} {plain.folder}: a run of {students[0]}; the distilled run is of {students[1]}, "
                        "and between two networks the method's part of a difference is not known; expected the plain "
                        "run of the same network")


def _student(run: TrainedRun) -> str:
    return network_name(run.network.model, run.network.backbone, "-")


def check_teacher(teacher: TrainedRun, distilled: TrainedRun) -> None:
    """UserError unless the run trained the network that the other one learned from: on the same data set, if the other
    one has no map of classes."""
    wanted, own = distilled.settings.networks.teacher, teacher.settings.networks.student
    if not distilled.settings.needs_teacher:
        raise UserError(f"{teacher.flag} {teacher.folder}: {distilled.method} reads no teacher; leave it out")
    if (own.model, own.backbone) != (wanted.model, wanted.backbone):
        raise UserError(f"{teacher.flag} {teacher.folder}: a run of {own.model}-{own.backbone}; the distilled run "
                        f"learned from {wanted.model}-{wanted.backbone}")
    same = teacher.settings.data.dataset == distilled.settings.data.dataset
    if not same and not distilled.settings.networks.class_map:
        raise UserError(f"{teacher.flag} {teacher.folder}: a run on {teacher.settings.data.dataset}; the distilled "
                        f"run is on {distilled.settings.data.dataset}")


def teacher_network(distilled: TrainedRun, teacher: TrainedRun | None) -> NetworkChoice | None:
    """The teacher: of its own run where that is given, else as the distilled run read it; None if it read none."""
    if teacher is not None:
        return replace(teacher.network, preprocess=distilled.settings.networks.teacher_preprocess)
    if not distilled.settings.needs_teacher:
        return None
    choice = distilled.settings.networks.teacher
    if choice.pretrained is not None and not Path(choice.pretrained).expanduser().is_file():
        raise UserError(f"{distilled.flag} {distilled.folder}: its teacher {choice.pretrained} is not there any more; "
                        "name the folder of the teacher's run with --teacher")
    return choice


def differences(plain: TrainedRun, distilled: TrainedRun) -> list[tuple[str, str, str]]:
    """(flag, value in the plain run, value in the distilled run) of each setting of the training that differs and that
    both runs read."""
    before, after = _read_values(plain), _read_values(distilled)
    left_out = NOT_OF_THE_TRAINING - shared_settings(plain.settings.data.dataset).keys()
    return [(flag(name), before[name], after[name]) for name in before
            if name in after and name not in left_out and before[name] != after[name]]


def only_distilled(plain: TrainedRun, distilled: TrainedRun) -> list[tuple[str, str]]:
    """(flag, value) of the settings that the plain run does not read: of the teacher and of methods."""
    before, after = _read_values(plain), _read_values(distilled)
    return [(flag(name), value) for name, value in after.items() if name not in before and value != NOT_SET]


def unfair(plain: TrainedRun, distilled: TrainedRun) -> list[str]:
    """The settings that differ although a fair comparison shares them."""
    before, after = _read_values(plain), _read_values(distilled)
    return [flag(name) for name in shared_settings(plain.settings.data.dataset) if before.get(name) != after.get(name)]


def _read_values(run: TrainedRun) -> dict[str, str]:
    """{setting: value as text} of those that the run reads."""
    left_out = unread(run.settings) | {"class_map"}  # which --teacher-classes stands for
    return {name: run.method if name == "method" else _text(name, value)
            for name, value in run.settings.flat().items() if name not in left_out}


def _text(name: str, value: Any) -> str:
    """A value as one would type it; of a file its name, without the folders of somebody's machine."""
    if value is None:
        return NOT_SET
    if name in ("data", "unlabelled") or name.endswith(("_pretrained", "_pretrained_base", "_list", "_masks",
                                                        "_classes", "_scores")):
        return Path(str(value)).name
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
