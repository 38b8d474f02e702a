"""What hangs ends in time with one line: a stopped loading process, a stopped process of two."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from helpers import ROOT, STEM, four_steps, train_arguments

STOPPED = ROOT / "tests" / "programs" / "stopped.py"
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@contextmanager
def started(what: str, arguments: list[str], *launcher: str) -> Iterator[subprocess.Popen]:
    """A program in which a process stops itself after its first batch. It is killed at the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "STOP": what}
    with subprocess.Popen([sys.executable, *launcher, str(STOPPED), *arguments], cwd=ROOT, env=environment,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True) as run:
        try:
            yield run
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)


def ends_naming_the_worker(said: str, code: int) -> None:
    assert code == 2 and len(said.strip().splitlines()) == 1, said
    assert "stopped.py: error: no batch for 2 s: loading process" in said and "is stopped (SIGSTOP" in said
    assert "--timeout 2" in said


def first_error(run: subprocess.Popen) -> str:
    """Not waited for is the launcher, which gives the stopped process half a minute."""
    return next((line for line in run.stderr if "error: " in line and "stopped.py" in line), "no line")


def test_a_stopped_loading_process_is_named(few_images, tmp_path) -> None:
    with started("worker", ["train_kd.py", *four_steps(few_images, tmp_path, "--workers", "1")]) as run:
        said = run.communicate(timeout=120)[1]
    ends_naming_the_worker(said, run.returncode)
    assert "go on with --resume auto" in said


def test_a_stopped_process_is_named(few_images, tmp_path) -> None:
    arguments = ["train_kd.py", *train_arguments(few_images, tmp_path, "--method", "none", "--skip-val")]
    with started("1", arguments, *TWO) as run:
        line = first_error(run)
    assert "process 0 of 2 has waited 2 s for the others; without an answer: 1:" in line
    assert "go on with --resume auto" in line


def test_so_they_are_in_an_evaluation(few_images, whole_run) -> None:
    """At the third image the loading process stops, after its first the second of two processes."""
    arguments = ["eval.py", "--dataset", "folder", "--data", str(few_images), "--split", "train", "--pretrained",
                 str(whole_run / f"{STEM}.pth"), "--no-cuda", "--workers"]
    with started("1", [*arguments, "0"], *TWO) as several, started("worker", [*arguments, "1"]) as alone:
        said = alone.communicate(timeout=120)[1]
        line = first_error(several)
    ends_naming_the_worker(said, alone.returncode)
    assert "then start again" in said and "--resume" not in said + line
    assert "process 0 of 2 has waited 2 s for the others; without an answer: 1:" in line
