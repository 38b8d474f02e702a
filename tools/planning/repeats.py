"""Runs that a plan means twice, such as a row and the trial of its scan that has the row's weight: one of them is run,
the others take its result."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from engine.results import read_result
from engine.run_files import plain
from tools.planning.plan import Job
from tools.planning.status import status
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
    for job in (job for job in others if job.result.is_file()):
        try:
            status(job)
        except UserError:
            continue
        return job
    return None


def take_over(job: Job, source: Job) -> None:
    """Write the result of another run with the same settings as the job's, which then is done. It says from where it
    is, unless the other had taken it from this run."""
    result, running = read_result(source.result), job.settings.running
    origin = result.pop("taken_from", source.name)
    said = {} if origin == job.name else {"taken_from": origin}
    write_json(job.result, {**result, "protocol": running.protocol, "label": running.label, **said}, indent=None)


def without_repeats(jobs: Sequence[Job], repeats: Repeats) -> list[Job]:
    """Those without the settings of one before them in the list."""
    chosen: list[Job] = []
    names: set[str] = set()
    for job in jobs:
        if not names.intersection(other.name for other in repeats.get(job.name, ())):
            chosen.append(job)
            names.add(job.name)
    return chosen
