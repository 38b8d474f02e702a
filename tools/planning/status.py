"""How far the runs of a plan are."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.results import differences, read_result, uncommitted
from engine.run_files import changed, plain
from engine.sources import differing, is_own_code, sources
from tools.planning.plan import ROOT, Job
from utils.errors import UserError
from utils.files import sha256

#: of a run: not begun, stopped on the way, with its result
NEW, BEGUN, DONE = "new", "begun", "done"


@dataclass(frozen=True)
class Status:
    """state: NEW, BEGUN or DONE; step: iterations done."""

    state: str
    step: int = 0


def status(job: Job) -> Status:
    """How far a run is. UserError when what is there was made with settings, or from a teacher, that the plan no longer
    has."""
    if job.result.exists():
        result = read_result(job.result)
        refuse_changes(job, job.result, result["settings"])
        refuse_teacher(job, result)
        refuse_code(job, result)
        return Status(DONE, result["iterations"])
    states = job.states
    for path in states:
        try:
            state = torch.load(path, weights_only=True, mmap=True)
            step, made = int(state["step"]), state["config"]
        except Exception:  # a damaged file can make the reader raise nearly anything; the run itself says more
            continue
        refuse_changes(job, path, made)
        return Status(BEGUN, step)
    if states:
        raise UserError(f"{' and '.join(map(str, states))}: no training state that can be read: to start the run anew, "
                        f"remove the folder {job.folder}")
    return Status(NEW)


def refuse_changes(job: Job, path: Path, made: Mapping[str, Any]) -> None:
    """UserError when a file of the run was made with other settings than it has now."""
    if changes := differences(made, plain(job.settings)):
        raise UserError(f"{path} was made with other settings than its plan has now: {'; '.join(changes)}. "
                        f"{remedy(job)}")


def refuse_teacher(job: Job, result: Mapping[str, Any]) -> None:
    """UserError when a run has learned from another file than the one that the plan names. A teacher that the plan
    trains may be another one on another machine."""
    source = job.settings.networks.teacher_pretrained
    if job.needs or not result["teacher"] or source is None or not (ROOT / source).is_file():
        return
    if sha256(ROOT / source) != result["teacher"]["sha256"]:
        raise UserError(f"{job.result}: the run has learned from another file than {source} is now. {remedy(job)}")


def refuse_code(job: Job, result: Mapping[str, Any]) -> None:
    """UserError when a run's own code, which no commit has, is another one now. Without git nothing is known of this
    code; what lies elsewhere is compared in any case."""
    loose = uncommitted(result)
    if result["revision"]["commit"] is None:
        loose = {name: digest for name, digest in loose.items() if not is_own_code(name)}
    changes = differing(loose, sources(job.settings))
    if changes:
        raise UserError(f"{job.result} was made with code that was not committed and is another one now: "
                        f"{'; '.join(changed(name, *values) for name, values in changes.items())} (SHA-256). "
                        f"{remedy(job)}")


def remedy(job: Job) -> str:
    """What to do about a run that no longer belongs to its plan."""
    return ("What has changed needs a new protocol name; to make this run again, remove "
            f"{job.result.name} and the folder {job.folder}")
