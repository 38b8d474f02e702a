#!/usr/bin/env python3
"""A whole table of results in one command, which can be interrupted and given again.

    python tools/reproduce.py toy --dry-run              which runs the plan means, and how far each is
    python tools/reproduce.py camvid-cpu --jobs 2 --time-budget 120
    python tools/reproduce.py cityscapes --only afdcd --seeds 0 1 2 --slurm
    python tools/report.py                               the tables, when results are there

PLAN: a file of train_scripts/plans/, or a published table: cityscapes, ade20k, coco_stuff, voc, camvid. What has a
result is skipped, what was interrupted goes on. Each run leaves one small file in results/.
"""
from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.published import how_to_get
from models.weight_files import TORCHVISION, is_given
from tools.planning.checks import repeated
from tools.planning.painting import paint
from tools.planning.plan import ROOT, Expansion, Job, Places, plan_names, read_plan
from tools.planning.published import published_jobs, published_names
from tools.planning.repeats import Repeats, find_finished, find_repeats, take_over, without_repeats
from tools.planning.runner import Runner, write_lists
from tools.planning.status import BEGUN, DONE, NEW, Status, status
from utils.cli import ArgumentParser, describe_error, read_options, run_main
from utils.errors import UserError, did_you_mean
from utils.options import OptionGroup, option


@dataclass(frozen=True)
class Options(OptionGroup):
    """The command line, without the plan."""
    only: tuple[str, ...] = option((), "only runs whose name holds one of these texts (and the teachers they need)",
                                   metavar="TEXT")
    seeds: tuple[int, ...] = option((), "in place of the plan's and of its rows' (published tables: default 0)",
                                    at_least=0, metavar="N")
    dry_run: bool = option(False, "print the runs, how far each is and its command; run nothing")
    jobs: int = option(1, "runs side by side", at_least=1, metavar="N")
    time_budget: float | None = option(None, "stop after so many minutes; the next call goes on", above=0,
                                       metavar="MIN")
    slurm: bool = option(False, "write lists of commands and print how to submit them, at most --jobs at a time")
    data: str | None = option(None, "folder of the data set", metavar="DIR")
    results: str | None = option(None, "folder of the result files (default: results)", metavar="DIR")
    work: str | None = option(None, "folder of weights, states and logs (default: work_dir)", metavar="DIR")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (seed := repeated(self.seeds)) is not None:
            raise UserError(f"--seeds: {seed} is listed twice; expected each once")


def parse(argv: list[str] | None) -> tuple[str, Options]:
    """(plan, options)."""
    parser = ArgumentParser(prog="reproduce.py", description=__doc__.split("\n")[0])
    parser.add_argument("plan", metavar="PLAN", help=f"{', '.join([*plan_names(), *published_names()])}, or a .toml "
                                                     "file")
    parser.add_options(parser, Options)
    parsed = parser.parse_args(argv)
    return parsed.plan, read_options(vars(parsed), Options)


def places_of(options: Options) -> Places:
    """The folders that the command line names."""
    return Places.of(**{k: v for k, v in asdict(options).items() if k in ("results", "work", "data")})


def all_jobs(name: str, plan: Mapping[str, Any] | None, places: Places, seeds: Sequence[int]) -> list[Job]:
    """The runs of a plan, teachers first. plan: None for a published table, which ``name`` names; seeds: in place of
    the plan's, if there are any. UserError that names the plan."""
    if plan is None:
        return published_jobs(name, places, seeds or (0,))
    try:
        return Expansion(plan, places, seeds).jobs()
    except UserError as error:
        raise UserError(f"{name}: {describe_error(error)}") from error


def find_jobs(name: str, jobs: list[Job], options: Options) -> list[Job]:
    """Those of a plan's runs that are asked for, and the teachers that they need. UserError for a text of ``--only``
    that is in no name."""
    for text in options.only:
        if not any(text in job.name for job in jobs):
            parts = {part for job in jobs for part in job.name.split("/")}
            raise UserError(f"--only {text}: no run of plan {name} has this in its name; one is {jobs[0].name}"
                            f"{did_you_mean(text.strip('/'), sorted(parts))}")
    chosen = [job for job in jobs if not options.only or any(text in job.name for text in options.only)]
    needed = {name for job in chosen for name in job.needs}
    return [job for job in jobs if job in chosen or job.name in needed]


def overview(jobs: list[Job], states: dict[str, Status]) -> str:
    """A line per run, and how many there are of each state."""
    lines = []
    for job in jobs:
        one, total = states[job.name], job.settings.optimization.max_iterations
        lines.append(f"{one.state:6s} {one.step:>6d}/{total:<6d} {job.name}")
    counts = [f"{sum(s.state == state for s in states.values())} {state}" for state in (DONE, BEGUN, NEW)]
    return "\n".join([*lines, "", f"{len(jobs)} runs: {', '.join(counts)}"])


def to_run(jobs: list[Job], states: dict[str, Status]) -> list[Job]:
    """The runs without a result, and teachers whose result is there but whose weights, which they need, are not. Those
    that have begun come first."""
    missing = {job.name for job in jobs if states[job.name].state != DONE}
    needed = {name for job in jobs if job.name in missing for name in job.needs}
    gone = {job.name for job in jobs if job.name in needed and not (ROOT / job.best).is_file()}
    wanted = [job for job in jobs if job.name in missing | gone]
    return sorted(wanted, key=lambda job: states[job.name].state != BEGUN)


def absent_teachers(missing: list[Job], everything: list[Job]) -> list[str]:
    """A line for every teacher's file that runs need, that is not there and that no run of the plan makes."""
    made = {str(job.best) for job in everything}
    needed = Counter(str(job.settings.networks.teacher_pretrained) for job in missing if job.settings.needs_teacher)
    return [f"{file}: no such weights file, which {count} of the runs left need{how_to_get(Path(file))}"
            for file, count in needed.items() if is_given(file) and not file.startswith(TORCHVISION)
            and file not in made and not (ROOT / Path(file).expanduser()).is_file()]


def repeats_of(jobs: list[Job], plan: Mapping[str, Any] | None, options: Options) -> Repeats:
    """Runs that are the same, among all of a plan, since a scan keeps the plan's first seed under --seeds. jobs: those
    of the given seeds."""
    if plan is not None and options.seeds:
        jobs = Expansion(plan, places_of(options), sorted({*plan["seeds"], *options.seeds})).jobs()
    return find_repeats(jobs)


def submit(name: str, jobs: list[Job], repeats: Repeats, options: Options) -> None:
    """Write the lists for a Slurm cluster and print what submits them."""
    alone = without_repeats(jobs, repeats)
    folder = ROOT / places_of(options).work / f"plan-{Path(name).stem}"
    if alone:
        print("\n".join(["", "submit in the root of the repository:", *write_lists(alone, folder, options.jobs)]))
    if len(alone) < len(jobs):
        print(f"{len(jobs) - len(alone)} more have the settings of runs in these lists: the same command, given when "
              "those have ended, takes their results")


def main(argv: list[str] | None = None) -> int:
    """Run what is missing of a plan. Returns 1 when a run failed, 0 otherwise."""
    name, options = parse(argv)
    plan = None if name in published_names() else read_plan(name, published_names())
    everything = all_jobs(name, plan, places_of(options), options.seeds)
    jobs, repeats = find_jobs(name, everything, options), repeats_of(everything, plan, options)
    states = {job.name: status(job) for job in jobs}
    if plan is not None and "title" in plan:
        print(f"{plan['title']}\n")
    print(overview(jobs, states), flush=True)
    sources = {job.name: source for job in jobs if states[job.name].state != DONE
               and (source := find_finished(repeats.get(job.name, ()))) is not None}
    missing = to_run(jobs, {**states, **dict.fromkeys(sources, Status(DONE))})
    if all(one.state == DONE for one in states.values()):
        print(f"nothing is left to run: {places_of(options).results} holds the results; to run anew, give another "
              "--results and --work")
        return 0
    absent = absent_teachers(missing, everything)
    for line in absent if options.dry_run or options.slurm else ():
        print(f"missing: {line}")
    for job in (job for job in jobs if job.name in sources):
        print(f"{job.name} takes the result of {sources[job.name].name}, whose settings are the same")
        if not options.dry_run:
            take_over(job, sources[job.name])
    if options.dry_run:
        print("\n".join(["", *(job.shown for job in without_repeats(missing, repeats))]))
        return 0
    if absent and not options.slurm:
        raise UserError(f"{'; '.join(absent)} (--only: the other runs)")
    if plan is not None and missing and options.data is None:
        paint(plan)
    if options.slurm:
        submit(name, missing, repeats, options)
        return 0
    minutes = options.time_budget
    runner = Runner(missing, states.keys() - {job.name for job in missing}, options.jobs,
                    minutes and 60 * minutes, lambda line: print(line, flush=True), repeats)
    try:
        outcome = runner.run()
    except KeyboardInterrupt:
        print("the same command goes on where these runs stopped", flush=True)
        raise
    left = len(outcome.failed) + len(outcome.stopped) + len(outcome.waiting)
    print(f"\n{len(outcome.done)} runs done now, {len(outcome.failed)} failed, {left} left to do")
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
