"""What the machine does to a program is one line with a remedy; defects of the program keep their traceback."""
from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from utils.cli import run_main
from utils.distributed import init_distributed
from utils.errors import UserError
from utils.faults import explained

WORKER = "DataLoader worker (pid 7) is killed by signal: "


@pytest.mark.parametrize(("error", "words"), [
    (RuntimeError(f"{WORKER}Bus error. It is possible that dataloader's workers are out of shared memory."), "shm"),
    (RuntimeError("unable to write to file </torch_12_3>: No space left on device (28)"), "/dev/shm"),
    (RuntimeError("Too many open files. Communication with the workers is no longer possible."), "ulimit -n"),
    (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
    (RuntimeError(f"{WORKER}Killed. "), "fewer --workers"),
    (RuntimeError("DataLoader worker (pid(s) 26237) exited unexpectedly"), "fewer --workers"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "--grad-accumulation 2"),
    (MemoryError(), "--batch-size"),
    (OSError(errno.ENOSPC, "No space left on device", "a.json"), "a.json: No space left on device"),
])
def test_a_line_with_a_remedy(error, words, capsys) -> None:
    def failing(_) -> None:
        raise error

    assert run_main(failing, [], prog="prog.py") == 2
    said = capsys.readouterr().err
    assert said.startswith("prog.py: error: ") and words in said and said.count("\n") == 1


def test_memory_of_a_cpu_that_is_full() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 50)
    assert "the memory is full" in explained(found.value)


def test_open_files_that_are_used_up() -> None:
    """Of real loading processes."""
    program = ("import resource, sys, torch\nfrom torch.utils.data import DataLoader\nfrom utils.cli import run_main\n"
               "def main(argv):\n    resource.setrlimit(resource.RLIMIT_NOFILE, (28, 28))\n"
               "    return len([*DataLoader(torch.zeros(64, 9), num_workers=1)]) and 0\n"
               "sys.exit(run_main(main, [], prog='prog.py'))")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "prog.py: error: the limit on open files is reached" in done.stderr


def test_a_program_raises_its_limit_on_open_files() -> None:
    program = ("import resource, sys\nfrom utils.cli import run_main\nlimit = resource.RLIMIT_NOFILE\n"
               "resource.setrlimit(limit, (64, 300))\n"
               "sys.exit(run_main(lambda _: print(*resource.getrlimit(limit)), []))")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["300", "300"], done.stderr


def test_defects_pass_through(monkeypatch) -> None:
    for error in (RuntimeError("shapes differ"), ValueError("timed out"), OSError(errno.ENOENT, "no such file")):
        assert explained(error) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--timeout" in explained(RuntimeError("Timed out waiting 5000ms for recv operation to complete"))
    assert "launcher" in explained(RuntimeError("Timed out after 31 seconds waiting for clients. 1/2 clients joined."))


@pytest.mark.parametrize(("variables", "words"), [
    ({"WORLD_SIZE": "2"}, "torchrun --nproc_per_node 2"), ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR"),
    ({"WORLD_SIZE": "two"}, "expected a number")])
def test_several_processes_without_a_launcher(monkeypatch, variables, words) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="WORLD_SIZE") as found:
        init_distributed(no_cuda=True)
    assert words in str(found.value)
    assert os.environ["WORLD_SIZE"] == variables["WORLD_SIZE"]
