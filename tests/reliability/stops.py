"""Runs that are killed or asked to stop, at places drawn at random, and go on to their end."""
from __future__ import annotations

import json
import random
import shutil
import signal
from functools import partial
from pathlib import Path

from reliability.lives import Ended
from reliability.runs import AUTO, STEM, Fault, Material, Result, is_same, step_of
from reliability.victim import checksum

from engine.checkpoint import newest_state

METHODS = {"afdcd": "Af-DCD", "skd": "SKD", "cirkd": "CIRKD"}
#: kills of a run before it goes on to its end
ROUND = 5
#: steps after which a signal comes, of so many; they save for no other reason
SIGNALED, SIGNAL_STEPS = (1, 4, 8), ("--max-iterations", "9", "--save-per-iters", "100", *AUTO)


def of_processes(count: int) -> str:
    """The number in words."""
    return "1 process" if count == 1 else f"{count} processes"


def kills(material: Material, short: bool, tries: int) -> list[Fault]:
    """kill -9 of a process, half of the times inside a save; then the run goes on to its end."""
    if short:
        return [Fault("kill -9, Af-DCD, 1 process", partial(_killed, material, "afdcd", 1, 1))]
    return [Fault(f"kill -9, {title}, {of_processes(count)}", partial(_killed, material, method, count, ROUND), tries)
            for count in (1, 2) for method, title in METHODS.items()]


def _killed(material: Material, method: str, processes: int, most: int, before: int) -> Result:
    """So many kills of one run. Each leaves, to the last bit, a training state of a run that nothing has touched, no
    older than the one before; so does the end. before: kills of earlier rounds, which this one does not repeat."""
    # at most four steps between two kills, and a few for the end
    steps = ("--max-iterations", str(6 + 4 * most), "--save-per-iters", "2", *AUTO)
    folder, whole, saves = _undisturbed(material, method, processes, steps)
    shutil.rmtree(folder, ignore_errors=True)
    rng, tries, good, step = random.Random(f"{method} {processes} {before}"), 0, 0, 0
    longest = max(operations for operations, _ in saves.values())
    while tries < most:
        if most == 1 or rng.random() < 0.5:
            plan = {"kill_in_save": [rng.randint(1, 2), rng.randint(1, longest)]}
        else:
            plan = {"kill_after": [rng.randint(0, 4), rng.uniform(0, 1.5)], "rank": rng.randrange(processes)}
        end = material.live(method, folder.name, steps, processes, plan)
        if end.code == 0:  # it ended before such a moment came
            break
        tries += 1
        now, fault = state_after(folder, saves, step), _fault(end)
        if fault or now is None:
            material.keep(folder, f"{plan}: {fault or 'another state'}")
        good += not fault and now is not None
        step = now or step
    end = material.live(method, folder.name, steps, processes)
    if end.code == 0 and is_same(folder, whole):
        return tries, good, ""
    material.keep(folder, f"after {tries} kills: {end.said}")
    return tries, 0, ""


def state_after(folder: Path, saves: dict[int, tuple[int, str]], before: int) -> int | None:
    """The step of the newest training state, 0 without one; None when it is older than before or another than that of
    the undisturbed run."""
    found = [path for suffix in ("", "_previous") if (path := folder / f"{STEM}_state{suffix}.pth").is_file()]
    if not found:
        return None if before else 0
    _, state, _ = newest_state(found)
    step = state["step"]
    return step if step >= before and checksum(state) == saves[step][1] else None


def _fault(end: Ended) -> str:
    """What is wrong about the end of a killed life; '' for nothing."""
    if not end.killed:
        return f"it ended with code {end.code}, and not by the kill: {end.said}"
    return "" if end.alone else "a process was left"


def _undisturbed(material: Material, method: str, processes: int,
                 steps: tuple[str, ...]) -> tuple[Path, Path, dict[int, tuple[int, str]]]:
    """(the folder that runs are killed in; that of a run that nothing has touched, which was made in the same place,
    since settings hold its name; {step: (operations of its save, checksum of the state)})."""
    folder = material.base / f"{method}-{processes}"
    file, whole = folder.with_name(f"{folder.name}.jsonl"), folder.with_name(f"{folder.name}-whole")
    material.data()
    if not whole.is_dir():
        end = material.live(method, folder.name, steps, processes, {"saves": str(file)})
        if end.code != 0:
            raise RuntimeError(end.said)
        folder.rename(whole)
    rows = map(json.loads, file.read_text().splitlines())
    return folder, whole, {step: (operations, digest) for step, operations, digest in rows}


def signals(material: Material, short: bool, tries: int) -> list[Fault]:
    """A run that is asked to stop: it saves at once, and goes on to the same end."""
    return [] if short else [
        Fault(f"{number.name}, {of_processes(count)}", partial(_signaled, material, number, count), len(SIGNALED))
        for count in (1, 2) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]


def _signaled(material: Material, number: signal.Signals, processes: int, before: int) -> Result:
    at, folder, whole = SIGNALED[before], *(material.base / f"signals-{processes}{name}" for name in ("", "-whole"))
    material.data()
    if not whole.is_dir() and material.live("afdcd", whole.name, SIGNAL_STEPS, processes).code != 0:
        raise RuntimeError(f"no run of {whole}")
    shutil.rmtree(folder, ignore_errors=True)
    plan = {"signal": [at, int(number)], "rank": processes - 1}
    asked = material.live("afdcd", folder.name, SIGNAL_STEPS, processes, plan)
    step = step_of(folder)
    ended = material.live("afdcd", folder.name, SIGNAL_STEPS, processes)
    if asked.code != 0 and asked.alone and step == at and ended.code == 0 and is_same(folder, whole):
        return 1, 1, ""
    material.keep(folder, f"{number.name} after step {at}, saved {step}: {asked}; then {ended}")
    return 1, 0, ""
