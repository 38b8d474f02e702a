"""The faults, by case: from the material, whether only a short form of it is wanted, and tries of a kill."""
from __future__ import annotations

import errno
import json
import os
import random
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

from helpers import ROOT
from method_cases import RUN_STUDENT
from reliability.disk import counted_writes
from reliability.endurance import endurance
from reliability.runs import AUTO, STEM, Fault, Material, Result, content, is_same, run, start, step_of
from reliability.stops import kills, signals

import train_kd
from engine.checkpoint import load_state, newest_state, save_run
from utils.errors import UserError

Case = Callable[[Material, bool, int], list[Fault]]
TWELVE = ("--max-iterations", "12", *AUTO)


def saves(material: Material, short: bool, tries: int) -> list[Fault]:
    """A save that fails at each of its writes, in this process: the error names a file, what was there is whole."""
    every = 97 if short else 1
    return [Fault(f"{errno.errorcode[number]} in a save, at every write",
                  partial(_failing_saves, material, number, every)) for number in (errno.ENOSPC, errno.EIO)]


def _failing_saves(material: Material, number: int, every: int, before: int) -> Result:
    runs = _trained(material, f"saves-{number}")
    with counted_writes() as writes:
        save_run(runs)
    found = [_fails_well(runs, at, number) for at in range(1, writes.count + 1, every)]
    return len(found), sum(found), ""


def _trained(material: Material, name: str):
    """A run of two steps that is still in memory, with a training state."""
    held = []
    original = train_kd.train_batch

    def keep(run, batch):
        held[:] = [run]
        return original(run, batch)

    train_kd.train_batch = keep
    try:
        train_kd.main(material.arguments("none", name, "--max-iterations", "2"))
    finally:
        train_kd.train_batch = original
    held[0].lock = None  # given back
    return held[0]


def _fails_well(runs, at: int, number: int) -> bool:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    try:
        with counted_writes(at, fail):
            save_run(runs)
        return False
    except UserError as error:
        named = STEM in str(error) and "the last good state is" in str(error)
    try:
        states = [load_state(path)["step"] for path in runs.files.states()]
        content(runs.files.directory, "")
    except (UserError, RuntimeError, OSError):
        return False
    return named and bool(states) and not [*runs.files.directory.glob(".*.tmp")]


def damage(material: Material, short: bool, tries: int) -> list[Fault]:
    """A training state cut off or with one bit changed: it is refused, and the one before it is taken."""
    return [Fault(name, partial(_damaged, material, cut, 10 if short else 200))
            for cut, name in ((True, "training state cut off"), (False, "one bit of a training state flipped"))]


def _damaged(material: Material, cut: bool, tries: int, before: int) -> Result:
    runs, rng, survived = _trained(material, f"damage-{cut}"), random.Random(0), 0
    save_run(runs)
    whole = runs.files.state.read_bytes()
    for _ in range(tries):
        at = rng.randrange(len(whole))
        changed = bytearray(whole[:at] if cut else whole)
        if not cut:
            changed[at] ^= 1 << rng.randrange(8)
        runs.files.state.write_bytes(changed)
        try:
            path, _, told = newest_state(runs.files.states())
            survived += told and path == runs.files.previous_state
        except UserError:
            continue
    return tries, survived, ""


def ranks(material: Material, short: bool, tries: int) -> list[Fault]:
    """Restarts by torchrun, two launchers, other numbers of processes, a skipped step that one of two has seen."""
    return [] if short else [
        Fault("torchrun --max-restarts=1, one of two processes killed", partial(_restarted, material), 4),
        Fault("two launchers as two machines, against one launcher", partial(_two_launchers, material)),
        Fault("1, 2, 1 processes in turn: the order of the images", partial(_order, material)),
        Fault("--skip-nonfinite, a bad step in one of two processes", partial(_skipped, material))]


def _whole(material: Material) -> Path:
    """A run of two processes that nothing has touched."""
    folder = material.base / "ranks-whole"
    material.data()
    if not folder.is_dir():
        run(material.arguments("afdcd", folder.name, *TWELVE), 2)
    return folder


def _restarted(material: Material, before: int) -> Result:
    whole, folder = _whole(material), material.base / f"ranks-restart-{before}"
    done = run(material.arguments("afdcd", folder.name, *TWELVE), 2,
               {"kill_after": [2 + 2 * before, 0.3], "rank": before % 2}, ("--standalone", "--max-restarts=1"))
    return 1, int(done.returncode == 0 and is_same(folder, whole)), ""


def _two_launchers(material: Material, before: int) -> Result:
    whole, folder, port = _whole(material), material.base / "ranks-launchers", _free_port()
    processes = [start(material.arguments("afdcd", folder.name, *TWELVE), 1, None, (
        "--nnodes=2", f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}")) for node in (0, 1)]
    for process in processes:
        process.communicate(timeout=1200)
    return 1, int(all(process.returncode == 0 for process in processes) and is_same(folder, whole)), ""


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _order(material: Material, before: int) -> Result:
    """The images of all steps, whoever had them, are those of a run with one process."""
    found = []
    for name, lives in (("order-whole", ((1, None),)), ("order-mixed", ((1, 4), (2, 3), (1, None)))):
        file = material.base / f"{name}.jsonl"
        for processes, stop in lives:
            plan = {"samples": str(file), **({"signal": [stop, int(signal.SIGTERM)]} if stop else {})}
            run(material.arguments("none", name, "--max-iterations", "10", *AUTO), processes, plan)
        rows = sorted(map(json.loads, file.read_text().splitlines()))
        steps = {step for step, _, _ in rows}
        found.append({s: [i for step, _, indices in rows if step == s for i in indices] for s in steps})
    return 1, int(found[0] == found[1] and len(found[0]) == 10), ""


def _skipped(material: Material, before: int) -> Result:
    """Both skip it; and killed after it, the run still ends the same."""
    flags, plan = ("--max-iterations", "8", "--skip-nonfinite", "1", *AUTO), {"not_finite": [2], "rank": 1}
    whole, killed = material.base / "skip-whole", material.base / "skip-killed"
    run(material.arguments("afdcd", whole.name, *flags), 2, plan)
    argv = material.arguments("afdcd", killed.name, *flags)
    run(argv, 2, {**plan, "kill_after": [5, 0.0]})
    run(argv, 2, plan)
    return 1, int(step_of(whole) == 8 and content(whole)["skipped"] == 1 and is_same(whole, killed)), ""


def evaluation(material: Material, short: bool, tries: int) -> list[Fault]:
    """The figures of ``eval.py`` under several numbers of processes."""
    return [] if short else [Fault("evaluation with 1, 2, 3, 8 processes: the same figures",
                                   partial(_evaluated, material))]


def _evaluation(material: Material, *more: str) -> list[str]:
    """The command line that evaluates a run on its training images; the run is made when there is none."""
    data, _ = material.data()
    folder = material.base / "evaluated"
    if not folder.is_dir():
        run(material.arguments("none", folder.name, "--max-iterations", "3"))
    return ["--dataset", "folder", "--data", str(data), "--split", "train", "--model", RUN_STUDENT[0], "--backbone",
            RUN_STUDENT[1], "--pretrained", str(folder / f"{STEM}.pth"), "--no-cuda", "--workers", "0", *more]


def _evaluated(material: Material, before: int) -> Result:
    figures = []
    for processes in (1, 2, 3, 8):
        file = material.base / f"evaluation-{processes}.json"
        run(_evaluation(material, "--json", str(file)), processes, program=str(ROOT / "eval.py"))
        figures.append(json.loads(file.read_text()) if file.is_file() else None)
    same = [one is not None and _scores(one) == _scores(figures[0] or {}) for one in figures]
    return len(same), sum(same), ""


def _scores(figures: dict) -> dict:
    """What may not differ: no times, no number of processes."""
    return {k: v for k, v in figures.items() if k not in ("seconds", "processes", "images_per_second", "command")}


def hangs(material: Material, short: bool, tries: int) -> list[Fault]:
    """A loading process and a process of two that are stopped: the program ends with a line that names them."""
    return [] if short else [
        Fault(f"SIGSTOP of {who}, {what}", partial(_hanging, material, program, stopped))
        for program, what in (("train_kd.py", "training"), ("eval.py", "evaluation"))
        for stopped, who in (("worker", "a loading process"), ("1", "one of two processes"))]


def _hanging(material: Material, program: str, stopped: str, before: int) -> Result:
    workers = "1" if stopped == "worker" else "0"
    words = "is stopped (SIGSTOP" if stopped == "worker" else "without an answer: 1:"
    if program == "eval.py":
        arguments = _evaluation(material, "--workers", workers)
    else:
        arguments = material.arguments("none", f"hangs-{stopped}", "--workers", workers)
    with mock.patch.dict(os.environ, {"STOP": stopped}):
        said = run([program, *arguments], 1 if stopped == "worker" else 2,
                   program=str(ROOT / "tests" / "programs" / "stopped.py"))
    return 1, int(said.returncode != 0 and words in said.stderr), ""


CASES: tuple[Case, ...] = (saves, damage, kills, signals, ranks, evaluation, hangs, endurance)
if sys.platform != "linux":
    raise SystemExit("these cases read /proc")
