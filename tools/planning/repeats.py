"""Runs that a plan means twice, such as a row and the trial of its scan that has the row's weight: one of them is run,
the others take its result."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from engine.results import read_result
from engine.run_files import plain
from tools.planning.plan import Job
from tools.planning.status import DONE, status
from utils.errors import UserError
from utils.files import write_json

#: settings that say where a run's files go, and under which name
NAMES = frozenset(("save_dir", "log_dir", "protocol", "label"))

Repeats = Mapping[str, Sequence[Job]]


def find_repeats(jobs: Sequence[Job]) -> dict[str, list[Job]]:
    """{name of a job: the others with the same settings}. Teachers are left out: their weights are needed too."""
    groups: dict[str, list[Job]] = {}
    teachers = {name for job in jobs for name in job.needs}
    for job in (job for job in jobs if job.name not in teachers):
        settings = {name: value for name, value in plain(job.settings).items() if name not in NAMES}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(job)
    return {job.name: [other for other in group if other is not job] for group in groups.values() for job in group}


def find_finished(others: Sequence[Job]) -> Job | None:
    """The first of them that has its result, by settings and from a teacher that the plan still has."""
    for job in others:
        try:
            if job.result.is_file() and status(job).state == DONE:
                return job
        except UserError:
            continue
    return None


def take_over(job: Job, source: Job) -> None:
    """Write the result of another run with the same settings as the job's, which then is done."""
    result, running = read_result(source.result), job.settings.running
    write_json(job.result, {**result, "protocol": running.protocol, "label": running.label,
                            "taken_from": result.get("taken_from", source.name)}, indent=None)


def without_repeats(jobs: Sequence[Job], repeats: Repeats) -> list[Job]:
    """Those that have to be run: none that has the settings of a finished one, or of one before it in the list."""
    chosen: list[Job] = []
    names: set[str] = set()
    for job in jobs:
        others = repeats.get(job.name, ())
        if not names.intersection(other.name for other in others) and find_finished(others) is None:
            chosen.append(job)
            names.add(job.name)
    return chosen
