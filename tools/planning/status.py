"""How far the runs of a plan are."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engine.checkpoint import FREE_TO_CHANGE
from engine.results import read_result
from engine.run_files import plain
from tools.planning.plan import Job
from utils.errors import UserError

#: of a run: not begun, stopped on the way, with its result
NEW, BEGUN, DONE = "new", "begun", "done"
#: settings that change no figure but time and memory, and what a network says itself
UNIMPORTANT = FREE_TO_CHANGE | {"aux", "fast", "channels_last", "ddp_compression", "list_methods"}


@dataclass(frozen=True)
class Status:
    """state: NEW, BEGUN or DONE; step: iterations done."""

    state: str
    step: int = 0


def status(job: Job) -> Status:
    """How far a run is. UserError when its result was made with settings that the plan no longer has."""
    if job.result.is_file():
        result = read_result(job.result)
        if changes := differences(result["settings"], plain(job.settings)):
            raise UserError(f"{job.result} was made with other settings than its plan has now: {'; '.join(changes)}. A "
                            "changed plan needs a new protocol name; to make this run again, remove the file")
        return Status(DONE, result["iterations"])
    states = job.states
    for state in states:
        try:
            return Status(BEGUN, int(torch.load(state, weights_only=True, mmap=True)["step"]))
        except Exception:  # a damaged file can make the reader raise nearly anything; the run itself says more
            continue
    if states:
        raise UserError(f"{states[0]}: not a training state that can be read: remove it to start the run anew")
    return Status(NEW)


def differences(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """'setting: made -> wanted' for everything that a figure depends on."""
    return [f"{key}: {made[key]} -> {wanted[key]}" for key in sorted(made.keys() & wanted.keys() - UNIMPORTANT)
            if made[key] != wanted[key]]
