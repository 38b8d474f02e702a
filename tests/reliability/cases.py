"""The faults: each case yields (fault, tries, survived)."""
from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from helpers import ROOT
from method_cases import RUN_STUDENT
from reliability.disk import counted_writes
from reliability.endurance import endurance
from reliability.runs import STEM, Material, content, is_same, run, run_here, start, step_of

import train_kd
from engine.checkpoint import load_state, newest_state, save_run
from utils.errors import UserError

Result = tuple[str, int, int]
Case = Callable[[Material, bool], Iterator[Result]]
AUTO = ("--resume", "auto")
WRITES = 2000  # of a save of such a run there are a few more
METHODS = {"afdcd": "Af-DCD", "skd": "SKD", "cirkd": "CIRKD"}


def kills(material: Material, short: bool) -> Iterator[Result]:
    """kill -9 of a process at random moments, half of them inside a save; then the run goes on to its end."""
    for method in list(METHODS)[:1] if short else METHODS:
        for processes in (1,) if short else (1, 2):
            count, steps = (1, 7) if short else (20, 110)
            whole, killed = (material.arguments(method, f"{method}-{processes}-{name}", "--max-iterations", str(steps))
                             for name in ("whole", "killed"))
            ends = run_here if short else lambda argv, n=processes: run(argv, n).returncode
            ends(whole)
            rng, hit = random.Random(f"{method} {processes}"), 0
            for number in range(count):
                if number % 2 or short:
                    plan = {"kill_in_save": [rng.randint(1, 2), rng.randint(1, WRITES)], "rank": 0}
                else:
                    plan = {"kill_after": [rng.randint(1, 6), rng.uniform(0, 0.3)], "rank": rng.randrange(processes)}
                hit += run([*killed, *AUTO], processes, plan).returncode != 0
            good = ends([*killed, *AUTO]) == 0 and is_same(*(material.base / f"{method}-{processes}-{name}"
                                                             for name in ("whole", "killed")))
            yield f"kill -9, {METHODS[method]}, {_processes(processes)}", hit, hit * good


def saves(material: Material, short: bool) -> Iterator[Result]:
    """A save that fails at each of its writes, in this process: the error names a file, what was there is whole."""
    for number in (errno.ENOSPC, errno.EIO):
        runs = _trained(material, f"saves-{number}")
        with counted_writes() as writes:
            save_run(runs)
        tries = survived = 0
        for at in range(1, writes.count + 1, 97 if short else 1):
            tries += 1
            survived += _fails_well(runs, at, number)
        yield f"{errno.errorcode[number]} in a save, at every write", tries, survived


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


def damage(material: Material, short: bool) -> Iterator[Result]:
    """A training state cut off or with one bit changed: it is refused, and the one before it is taken."""
    runs, rng = _trained(material, "damage"), random.Random(0)
    save_run(runs)
    whole, tries = runs.files.state.read_bytes(), 10 if short else 200
    for fault in ("training state cut off", "one bit of a training state flipped"):
        survived = 0
        for _ in range(tries):
            at = rng.randrange(len(whole))
            changed = bytearray(whole[:at] if "cut" in fault else whole)
            if "cut" not in fault:
                changed[at] ^= 1 << rng.randrange(8)
            runs.files.state.write_bytes(changed)
            try:
                path, _, told = newest_state(runs.files.states())
                survived += told and path == runs.files.previous_state
            except UserError:
                continue
        yield fault, tries, survived
    runs.files.state.write_bytes(whole)


def signals(material: Material, short: bool) -> Iterator[Result]:
    """A run that is asked to stop: it saves at once, and goes on to the same end."""
    if short:
        return
    for processes in (1, 2):
        name, steps = f"signals-{processes}", ("--max-iterations", "9", "--save-per-iters", "100")
        run(material.arguments("afdcd", f"{name}-whole", *steps), processes)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            survived, folder = 0, f"{name}-{number.name}"
            for at in (1, 4, 8):
                shutil.rmtree(material.base / folder, ignore_errors=True)
                argv = material.arguments("afdcd", folder, *steps, *AUTO)
                run(argv, processes, {"signal": [at, int(number)], "rank": processes - 1})
                stopped = step_of(material.base / folder) == at
                ended = run(argv, processes).returncode == 0
                survived += stopped and ended and is_same(material.base / folder, material.base / f"{name}-whole")
            yield f"{number.name}, {_processes(processes)}", 3, survived


def ranks(material: Material, short: bool) -> Iterator[Result]:
    """Restarts by torchrun, two launchers, other numbers of processes, a skipped step that one of two has seen."""
    if short:
        return
    steps = ("--max-iterations", "12", *AUTO)
    whole = material.base / "ranks-whole"
    run(material.arguments("afdcd", whole.name, *steps), 2)
    survived = 0
    for number in range(4):
        folder = material.base / f"ranks-restart-{number}"
        done = run(material.arguments("afdcd", folder.name, *steps), 2,
                   {"kill_after": [2 + 2 * number, 0.05], "rank": number % 2}, ("--standalone", "--max-restarts=1"))
        survived += done.returncode == 0 and is_same(folder, whole)
    yield "torchrun --max-restarts=1, one of two processes killed", 4, survived
    yield "two launchers as two machines, against one launcher", 1, int(_two_launchers(material, whole, steps))
    yield "1, 2, 1 processes in turn: the order of the images", 1, int(_order(material))
    yield "--skip-nonfinite, a bad step in one of two processes", 1, int(_skipped(material))


def _two_launchers(material: Material, whole: Path, steps: tuple[str, ...]) -> bool:
    folder, port = material.base / "ranks-launchers", _free_port()
    processes = [start(material.arguments("afdcd", folder.name, *steps), 1, None, (
        "--nnodes=2", f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}")) for node in (0, 1)]
    for process in processes:
        process.communicate(timeout=600)
    return all(process.returncode == 0 for process in processes) and is_same(folder, whole)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _order(material: Material) -> bool:
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
    return found[0] == found[1] and len(found[0]) == 10


def _skipped(material: Material) -> bool:
    """Both skip it; and killed after it, the run still ends the same."""
    flags, plan = ("--max-iterations", "8", "--skip-nonfinite", "1", *AUTO), {"not_finite": [2], "rank": 1}
    whole, killed = material.base / "skip-whole", material.base / "skip-killed"
    run(material.arguments("afdcd", whole.name, *flags), 2, plan)
    argv = material.arguments("afdcd", killed.name, *flags)
    run(argv, 2, {**plan, "kill_after": [5, 0.0]})
    run(argv, 2, plan)
    return step_of(whole) == 8 and content(whole)["skipped"] == 1 and is_same(whole, killed)


def evaluation(material: Material, short: bool) -> Iterator[Result]:
    """The figures of ``eval.py`` under several numbers of processes."""
    if short:
        return
    data, _ = material.data()
    run(material.arguments("none", "evaluated", "--max-iterations", "3"))
    figures = []
    for processes in (1, 2, 3, 8):
        file = material.base / f"evaluation-{processes}.json"
        run(["--dataset", "folder", "--data", str(data), "--split", "train", "--model", RUN_STUDENT[0], "--backbone",
             RUN_STUDENT[1], "--pretrained", str(material.base / "evaluated" / f"{STEM}.pth"), "--no-cuda", "--workers",
             "0", "--json", str(file)], processes, program=str(ROOT / "eval.py"))
        figures.append(json.loads(file.read_text()) if file.is_file() else None)
    survived = sum(one is not None and _scores(one) == _scores(figures[0] or {}) for one in figures)
    yield "evaluation with 1, 2, 3, 8 processes: the same figures", 4, survived


def _scores(figures: dict) -> dict:
    """What may not differ: no times, no number of processes."""
    return {k: v for k, v in figures.items() if k not in ("seconds", "processes", "images_per_second", "command")}


def hangs(material: Material, short: bool) -> Iterator[Result]:
    """A loading process and a process of two that are stopped: the run ends with a line that names them."""
    if short:
        return
    program = str(ROOT / "tests" / "programs" / "stopped.py")
    for stopped, processes, more, words in (("worker", 1, ("--workers", "1"), "is stopped (SIGSTOP"),
                                            ("1", 2, (), "without an answer: 1:")):
        os.environ["STOP"] = stopped
        said = run(material.arguments("none", f"hangs-{stopped}", *more), processes, program=program)
        survived = said.returncode != 0 and words in said.stderr
        yield f"SIGSTOP of {'a loading process' if processes == 1 else 'one of two processes'}", 1, int(survived)


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


CASES: tuple[Case, ...] = (saves, damage, kills, signals, ranks, evaluation, hangs, endurance)
if sys.platform != "linux":
    raise SystemExit("these cases read /proc")
