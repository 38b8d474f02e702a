"""Figures of rows: gains with their intervals, times, the plain run that took as long, published figures."""
from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from tools.make_scripts import METHODS, NETWORKS, R101, TABLES, Network
from tools.reporting.groups import PLAIN, Group, Result, Row

RESAMPLES, CONFIDENCE = 20000, 0.95
#: so many seeds have an interval: that of two holds the true gain in one of two cases
INTERVAL_SEEDS = 3
#: a plain run that took as long as a method: their times differ by no more than this share
SAME_TIME = 0.15
#: what others may add to the load of a machine, and hold of a GPU's memory in MB, that is still called a run's own; the
#: second with the libraries of the run itself
OTHERS_LOAD, OTHERS_MB = 0.25, 4000
#: threads of a training process that keep a GPU at work: the main one and that of backward
FEEDERS = 2
#: the protocol whose results are compared with published figures
PAPER = "paper"


@dataclass(frozen=True)
class Gain:
    """A difference of means in points, with the bootstrap interval of :data:`CONFIDENCE`, None below
    :data:`INTERVAL_SEEDS` seeds.

    seeds: number of those of either side that count; paired: whether they are the same ones."""
    mean: float
    interval: tuple[float, float] | None
    seeds: tuple[int, int]
    paired: bool


def gain(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Gain:
    """What ``ours`` is above ``theirs``, both {seed: percent}.

    Of the seeds that both have, their differences are averaged and resampled; without a common seed, either side on its
    own. The percentiles of a fixed generator: with three seeds the interval reaches from the smallest difference to the
    largest."""
    common = [seed for seed in ours if seed in theirs]
    generator = np.random.default_rng(0)

    def resampled(values: Sequence[float]) -> np.ndarray:
        """[RESAMPLES]: means of samples drawn with replacement."""
        return np.asarray(values)[generator.integers(len(values), size=(RESAMPLES, len(values)))].mean(1)

    if common:
        differences = [ours[seed] - theirs[seed] for seed in common]
        mean, seeds = statistics.fmean(differences), (len(common), len(common))
    else:
        mean, seeds = statistics.fmean(ours.values()) - statistics.fmean(theirs.values()), (len(ours), len(theirs))
    interval = None
    if min(seeds) >= INTERVAL_SEEDS:
        means = resampled(differences) if common \
            else resampled(list(ours.values())) - resampled(list(theirs.values()))
        low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        interval = float(low), float(high)
    return Gain(mean, interval, seeds, bool(common))


def had_machine(run: Result) -> bool:
    """Whether the machine was the run's own: no more wanted to run than its threads, and on a GPU, whose memory nobody
    else held, its loading processes. With those a CPU may as well have been shared, so it counts as such."""
    hardware = run["hardware"]
    threads = hardware["threads"] if hardware["gpu"] is None else FEEDERS + run["settings"]["workers"]
    load, others = run["load"], run.get("others_mb")
    quiet = load is not None and load <= hardware["processes"] * threads + OTHERS_LOAD
    return quiet and (hardware["gpu"] is None or (others is not None and others <= OTHERS_MB))


@cache
def coverage(seeds: int) -> float:
    """About the share of cases in which the bootstrap interval of so many differences holds the true one, where they
    are normally distributed; for many seeds :data:`CONFIDENCE`. Its width is the resampled mean's, whose standard error
    is the ordinary one times sqrt((n - 1) / n)."""
    samples = np.random.default_rng(0).standard_normal((50_000, seeds))
    errors = samples.std(axis=1) / math.sqrt(seeds)
    return float((abs(samples.mean(axis=1)) <= statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * errors).mean())


def seconds_of(run: Result, cpu: bool) -> float:
    """Time of the iterations and of the stages before them, without validation; cpu: processor time of the training
    process."""
    return sum(run["seconds"][f"{part}_cpu" if cpu else part] for part in ("stages", "training"))


def machine_of(run: Result) -> tuple:
    """What has to be equal for times to be compared."""
    return tuple(run["hardware"][key] for key in ("gpu", "cpu", "processes", "threads"))


@dataclass(frozen=True)
class Clock:
    """How the times of a group are told.

    cpu: in CPU seconds of the training process, which other processes hardly change: where all students trained on CPUs
    and some shared a machine. Else in seconds on the clock, of rows whose runs had the machine to themselves."""
    cpu: bool

    @classmethod
    def of(cls, group: Group) -> Clock:
        """That of a group."""
        runs = [run for row in group.rows for run in row.runs]
        return cls(not all(map(had_machine, runs)) and all(run["hardware"]["gpu"] is None for run in runs))

    @property
    def unit(self) -> str:
        """Of the times."""
        return "CPU s" if self.cpu else "s"

    def is_known(self, row: Row) -> bool:
        """Whether the row has times that mean something."""
        return all(run["hardware"]["gpu"] is None if self.cpu else had_machine(run) for run in row.runs)

    def seconds(self, row: Row) -> float | None:
        """Mean time of the iterations and of the stages before them, without validation; None where it is not known."""
        return statistics.fmean(seconds_of(run, self.cpu) for run in row.runs) if self.is_known(row) else None

    def on_machines(self, row: Row) -> dict[tuple, float]:
        """{machine: mean time of the row's runs on it}; empty where times are not known, or are 0."""
        times: dict[tuple, list[float]] = {}
        for run in row.runs if self.is_known(row) else ():
            times.setdefault(machine_of(run), []).append(seconds_of(run, self.cpu))
        return {machine: mean for machine, found in times.items() if (mean := statistics.fmean(found)) > 0}

    def ratio(self, one: Row, other: Row) -> float | None:
        """The time of one row as a multiple of another's: the mean of those on the machines where both have runs; None
        where there is no such machine."""
        ours, theirs = self.on_machines(one), self.on_machines(other)
        ratios = [ours[machine] / theirs[machine] for machine in ours.keys() & theirs.keys()]
        return sum(sorted(ratios)) / len(ratios) if ratios else None

    def spread(self, row: Row) -> float | None:
        """The longest time of a row's runs over the shortest; None where times are not known."""
        if not self.is_known(row):
            return None
        times = [seconds_of(run, self.cpu) for run in row.runs]
        return max(times) / max(min(times), 1e-9)

    def speed(self, row: Row) -> float | None:
        """Mean images per second (of CPU time with that clock); None where it is not known."""
        if not self.is_known(row):
            return None
        if self.cpu:
            speeds = [run["iterations"] * run["settings"]["batch_size"] / run["seconds"]["training_cpu"]
                      for run in row.runs if run["seconds"]["training_cpu"]]
        else:
            speeds = [run["images_per_second"] for run in row.runs if run["images_per_second"] is not None]
        return statistics.fmean(speeds) if len(speeds) == len(row.runs) else None


def memory(row: Row) -> float | None:
    """The most that a run of the row held, in MB; None where a log does not say it."""
    found = [run["peak_memory_mb"] for run in row.runs]
    return None if None in found else max(found)


@dataclass(frozen=True)
class EqualTime:
    """The plain run that took as long as a row: its time as a share of the row's, and what the row is above it."""
    plain: Row
    ratio: float
    gain: Gain


def equal_time(group: Group, row: Row, clock: Clock) -> EqualTime | None:
    """Of the plain rows the one whose time on the same machines is closest; None when it is not within
    :data:`SAME_TIME` and when times are not known."""
    ratios = [(one, ratio) for one in group.rows
              if one.method == PLAIN and (ratio := clock.ratio(one, row)) is not None]
    if not ratios:
        return None
    plain, ratio = min(ratios, key=lambda pair: abs(pair[1] - 1))
    if abs(ratio - 1) > SAME_TIME:
        return None
    return EqualTime(plain, ratio, gain(row.scores(group.split), plain.scores(group.split)))


def published(group: Group, row: Row) -> float | None:
    """The mIoU in percent of the published table that the row repeats: networks, method and protocol are its own."""
    table = TABLES.get(group.dataset)
    if group.protocol != PAPER or table is None:
        return None
    student, teacher = row.runs[0]["student"], row.runs[0]["teacher"]
    if row in group.teachers:
        return table.teacher_miou if _is(NETWORKS[R101], student) else None
    method = METHODS.get(row.method)
    if method is None or row.label != row.method or (method.teacher and not _is(NETWORKS[R101], teacher)):
        return None
    short = next((name for name, one in NETWORKS.items() if _is(one, student)), None)
    return table.published.get(short, {}).get(row.method)


def _is(one: Network, part: Mapping[str, str] | None) -> bool:
    """Whether a network of the tables is the one of a result."""
    return part is not None and (one.model, one.backbone) == (part["model"], part["backbone"])


@dataclass(frozen=True)
class Figures:
    """Everything that tables say of a row. None: there is none, or it is not known. Unit: percent, points, seconds of
    the clock of the group, MB.

    plain, kd: what it is above the baseline and above KD alone from the same teacher; same_time: above plain training
    of the same duration; times_plain: its time as a multiple of the baseline's."""
    name: str
    row: Row
    scores: tuple[float, ...]
    plain: Gain | None
    kd: Gain | None
    same_time: EqualTime | None
    published: float | None
    seconds: float | None
    times_plain: float | None
    speed: float | None
    memory: float | None

    @property
    def mean(self) -> float:
        """Mean score over the seeds, in percent."""
        return statistics.fmean(self.scores)

    @property
    def std(self) -> float | None:
        """Sample standard deviation of the scores; None with a single seed."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def difference(self) -> float | None:
        """The mean score less the published one."""
        return None if self.published is None else self.mean - self.published

    @property
    def iterations(self) -> str:
        """Those of the runs, usually one number."""
        return ", ".join(map(str, self.row.values(lambda run: run["iterations"])))


def figures(group: Group, clock: Clock) -> list[Figures]:
    """Those of the teachers, then of the rows that are shown."""
    base = group.plain

    def above(row: Row, other: Row | None) -> Gain | None:
        return None if other in (None, row) else gain(row.scores(group.split), other.scores(group.split))

    found = []
    for row in (*group.teachers, *group.shown):
        ours, distilled = row not in group.teachers, row.method != PLAIN
        found.append(Figures(
            group.name(row), row, tuple(row.scores(group.split).values()), above(row, base) if ours else None,
            above(row, group.kd_of(row)) if distilled else None, equal_time(group, row, clock) if distilled else None,
            published(group, row), clock.seconds(row), clock.ratio(row, base) if ours and base else None,
            clock.speed(row), memory(row)))
    return found
