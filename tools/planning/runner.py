"""Running jobs side by side: teachers before their students, until all are done or the time is over."""
from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from engine.signals import CODES
from tools.planning.plan import ROOT, Job
from tools.planning.repeats import Repeats, find_finished, take_over
from utils.distributed import available_cpus
from utils.files import write_text

#: seconds between two looks at the running processes
PAUSE = 0.2
#: seconds between two lines that say how far the running ones are
NEWS = 30
#: seconds that a run gets to save and end after it was told to; torchrun itself gives its processes 30
GRACE = 40
OUTPUT = "output.txt"
#: the line by which a program says why it ends (``utils.cli.run_main``)
ERROR = re.compile(r"[\w.-]+: error: .*")


@dataclass
class Running:
    """A run that this call has started. began: by time.monotonic(); said: bytes of its output file before it."""

    job: Job
    process: subprocess.Popen
    began: float
    said: int


@dataclass
class Outcome:
    """Names of jobs: with a result, failed, stopped on the way, not begun for want of time or of a teacher."""

    done: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)


class Runner:
    """Runs jobs, ``side_by_side`` of them at a time.

    finished: names of jobs that are done. seconds: after them no run is begun, and those that run are told to end; each
    saves its state and goes on from there when it is run again. say: gets a line per event. repeats: what
    ``find_repeats`` returns; a job waits for one with the same settings that has begun, and takes its result.
    """

    def __init__(self, jobs: Sequence[Job], finished: set[str], side_by_side: int = 1, seconds: float | None = None,
                 say: Callable[[str], object] = print, repeats: Repeats = MappingProxyType({})) -> None:
        self.left, self.finished, self.side_by_side = list(jobs), set(finished), side_by_side
        self.repeats = repeats
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.say, self.count, self.begun = say, len(jobs), 0
        self.running: dict[str, Running] = {}
        self.told: dict[str, str] = {}
        self.next_news = time.monotonic() + NEWS
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Run until nothing is left that can run. An interruption, or being told to end, ends the runs and is passed
        on."""
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            while self._begin() or self.running:
                time.sleep(PAUSE)
                self._collect()
                self._tell_news()
                if self._is_over() and self.running:
                    self._stop()
        finally:
            self._stop()
            signal.signal(signal.SIGTERM, before)
        self.outcome.waiting = [job.name for job in self.left]
        return self.outcome

    def _is_over(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def _can_begin(self, job: Job) -> bool:
        begun = {*self.running, *self.outcome.stopped, *self.outcome.failed}
        same = {other.name for other in self.repeats.get(job.name, ())}
        return self.finished.issuperset(job.needs) and not begun & same

    def _begin(self) -> bool:
        """Begin what can begin. Whether anything has begun."""
        before = self.begun
        while len(self.running) < self.side_by_side and not self._is_over():
            job = next((job for job in self.left if self._can_begin(job)), None)
            if job is None:
                break
            self.left.remove(job)
            self.begun += 1
            if (source := find_finished(self.repeats.get(job.name, ()))) is not None:
                take_over(job, source)
                self._note_done(job)
                said = f"takes the result of {source.name}, whose settings are the same"
            else:
                self.running[job.name] = start(job, self.side_by_side)
                said = f"its output: {shown_path(job.folder / OUTPUT)}"
            self.say(f"[{self.begun}/{self.count}] {job.name}\n    {said}")
        return self.begun > before

    def _note_done(self, job: Job) -> None:
        self.finished.add(job.name)
        self.outcome.done.append(job.name)

    def _collect(self) -> None:
        for name, one in list(self.running.items()):
            code = one.process.poll()
            if code is None:
                continue
            del self.running[name]
            minutes = (time.monotonic() - one.began) / 60
            if code == 0 and one.job.result.is_file():
                self._note_done(one.job)
                self.say(f"done after {minutes:.1f} min: {name}")
            elif code in CODES.values():
                self.outcome.stopped.append(name)
                self.say(f"stopped from outside after {minutes:.1f} min: {name}")
            else:
                self.outcome.failed.append(name)
                how = "with exit code" if code >= 0 else "killed by signal"
                self.say(f"failed after {minutes:.1f} min, {how} {abs(code)}: {name}\n    {reason(one)}")

    def _tell_news(self) -> None:
        """Say now and then how far the running ones are."""
        if time.monotonic() < self.next_news:
            return
        self.next_news = time.monotonic() + NEWS
        for name, one in self.running.items():
            said = re.findall(r"step \d+/.*(?:\n    .*)*", output_of(one))
            news = f"    {name}: {' '.join(said[-1].split()) if said else 'beginning'}"
            if self.told.get(name) != news:
                self.told[name] = news
                self.say(news)

    def _stop(self) -> None:
        """Tell every run to end, and wait. One that has ended by itself is what it is."""
        self._collect()
        for one in self.running.values():
            tell(one.process, signal.SIGTERM)
        for name, one in self.running.items():
            try:
                one.process.wait(GRACE)
            except subprocess.TimeoutExpired:
                tell(one.process, signal.SIGKILL)
                one.process.wait()
            self.outcome.stopped.append(name)
            self.say(f"stopped: {name}")
        self.running.clear()


def start(job: Job, side_by_side: int) -> Running:
    """Start a run, its output in its folder. Runs that share the CPUs get their share of threads."""
    environment = {**os.environ, **job.environment}
    if "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max(available_cpus() // side_by_side, 1))
    job.folder.mkdir(parents=True, exist_ok=True)
    with open(job.folder / OUTPUT, "a", encoding="utf-8") as output:
        output.write(f"$ {job.shown}\n")
        output.flush()
        said = output.tell()
        process = subprocess.Popen(job.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        return Running(job, process, time.monotonic(), said)


def shown_path(path: Path) -> str:
    """A path from the root of the repository where it lies in it."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def tell(process: subprocess.Popen, what: signal.Signals) -> None:
    """Send a signal to a run and all that it has started."""
    try:
        os.killpg(process.pid, what)
    except ProcessLookupError:
        return


def output_of(one: Running) -> str:
    """What has been said since a run was started: by it, and by one of another call that trains in the same folder."""
    path: Path = one.job.folder / OUTPUT
    if not path.is_file():
        return ""
    return path.read_bytes()[one.said:].decode(encoding="utf-8", errors="replace").strip()


def reason(one: Running) -> str:
    """Why a run has ended: its error; else where its output is, if it was killed, and its last line, if not."""
    said = output_of(one)
    if errors := ERROR.findall(said):
        return errors[-1]
    if one.process.returncode < 0:
        return f"its output: {shown_path(one.job.folder / OUTPUT)}"
    return (said.splitlines() or ["it said nothing"])[-1]


def write_lists(jobs: Sequence[Job], folder: Path, side_by_side: int) -> list[str]:
    """Write the commands for a Slurm cluster, and return those that submit them: runs that train a teacher of another
    one of these, runs that wait for it, and all others, a list each."""
    names = {job.name for job in jobs}
    needed = {name for job in jobs for name in job.needs} & names
    lists = {"teachers": [job for job in jobs if job.name in needed],
             "students": [job for job in jobs if names.intersection(job.needs)]}
    lists["others"] = [job for job in jobs if not any(job in some for some in lists.values())]
    folder.mkdir(parents=True, exist_ok=True)
    commands = []
    for name, some in ((name, some) for name, some in lists.items() if some):
        path = folder / f"slurm-{name}.txt"
        write_text(path, "".join(f"{job.shown}\n" for job in some))
        wait = " --dependency=afterok:$teachers" if name == "students" else ""
        command = (f"sbatch --parsable --array=1-{len(some)}%{side_by_side}{wait} train_scripts/slurm.sh "
                   f"train_scripts/array.sh {shlex.quote(shown_path(path))}")
        commands.append(f"teachers=$({command})" if name == "teachers" else command)
    return commands
