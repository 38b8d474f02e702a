"""What hangs ends in time with one line: a stopped loading process, a stopped process of two."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from helpers import ROOT, four_steps, train_arguments

STOPPED = ROOT / "tests" / "programs" / "stopped.py"


@contextmanager
def started(what: str, arguments: list[str], *launcher: str) -> Iterator[subprocess.Popen]:
    """A run in which a process stops itself after the first step. It is killed at the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "STOP": what}
    with subprocess.Popen([sys.executable, *launcher, str(STOPPED), *arguments], cwd=ROOT, env=environment,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True) as run:
        try:
            yield run
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)


def test_a_stopped_loading_process_is_named(few_images, tmp_path) -> None:
    with started("worker", four_steps(few_images, tmp_path, "--workers", "1")) as run:
        said = run.communicate(timeout=120)[1]
    assert run.returncode == 2 and len(said.strip().splitlines()) == 1
    assert "stopped.py: error: no batch for 2 s: loading process" in said and "is stopped (SIGSTOP" in said
    assert "--timeout 2" in said


def test_a_stopped_process_is_named(few_images, tmp_path) -> None:
    """Not waited for is the launcher, which gives the stopped process half a minute."""
    arguments = train_arguments(few_images, tmp_path, "--method", "none", "--skip-val")
    with started("1", arguments, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2") as run:
        line = next(line for line in run.stderr if "error: " in line and "stopped.py" in line)
    assert "process 0 of 2 has waited 2 s for the others; without an answer: 1:" in line
