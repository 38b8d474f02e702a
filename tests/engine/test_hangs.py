"""What hangs ends in time with one line: a stopped loading process, a stopped process of two."""
from __future__ import annotations

import os
import signal
import subprocess
import sys

from helpers import ROOT, four_steps, train_arguments

STOPPED = ROOT / "tests" / "programs" / "stopped.py"


def run_stopped(what: str, arguments: list[str], *launcher: str) -> tuple[int, str]:
    """(exit code, stderr) of a run in which a process stops itself after the first step."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "STOP": what, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"}
    with subprocess.Popen([sys.executable, *launcher, str(STOPPED), *arguments], cwd=ROOT, env=environment,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True) as run:
        try:
            said = run.communicate(timeout=120)[1]
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
    return run.returncode, said


def test_a_stopped_loading_process_is_named(few_images, tmp_path) -> None:
    code, said = run_stopped("worker", four_steps(few_images, tmp_path, "--workers", "1"))
    assert code == 2 and len(said.strip().splitlines()) == 1
    assert "stopped.py: error: no batch for 2 s: loading process" in said and "is stopped (SIGSTOP" in said
    assert "--timeout 2" in said


def test_a_stopped_process_is_named(few_images, tmp_path) -> None:
    arguments = train_arguments(few_images, tmp_path, "--method", "none", "--skip-val")
    code, said = run_stopped("1", arguments, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    assert code != 0
    (line,) = (line for line in said.splitlines() if "error: " in line and "stopped.py" in line)
    assert "process 0 of 2 has waited 2 s for the others; without an answer: 1:" in line
