"""The published tables as plans: one run per script of ``train_scripts/<data set>/`` and seed."""
from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence

from engine.results import result_path
from engine.settings import Settings, parse_settings
from tools.make_scripts import R101, TABLES, scripts
from tools.planning.command import joined, running_flags
from tools.planning.plan import ROOT, Job, Places
from utils.errors import UserError

PROTOCOL = "paper"


def published_names() -> list[str]:
    """Tables, by the names of their folders."""
    return [table.folder for table in TABLES.values()]


def published_jobs(folder: str, places: Places, seeds: Sequence[int]) -> list[Job]:
    """Every row of a table, for every seed. The teacher is the released file, or TEACHER."""
    return [job for path, _ in scripts() if path.startswith(f"{folder}/") and f"{R101}_teacher" not in path
            for job in _row(f"train_scripts/{path}", places, seeds)]


def _row(script: str, places: Places, seeds: Sequence[int]) -> Iterator[Job]:
    data = ("--data", str(places.data)) if places.data else ()
    base = settings_of(script, data)
    for seed in seeds:
        label = base.distillation.method or "afdcd"
        # the path of the result says the pair
        flags = [*data, *joined(running_flags(places, PROTOCOL, "", label, seed))]
        name = str(result_path(settings_of(script, flags)).relative_to(places.results).with_suffix(""))
        flags = [*data, *joined(running_flags(places, PROTOCOL, name, label, seed))]
        yield Job(name, script, tuple(flags), settings_of(script, flags), environment={"PYTHON": sys.executable})


def settings_of(script: str, flags: Sequence[str]) -> Settings:
    """What a script of the repository would train with, with more flags."""
    environment = {**os.environ, "DRY_RUN": "1", "GPUS": "1", "PYTHON": "python"}
    done = subprocess.run(["bash", script, *flags], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{script}: {done.stderr.strip()[-300:]}")
    return parse_settings(shlex.split(done.stdout.strip().splitlines()[-1])[2:])
