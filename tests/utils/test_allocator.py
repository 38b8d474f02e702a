"""The allocator's setting, seen from its effect: how many pages the kernel hands out."""
from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
from helpers import ROOT

from utils import allocator

#: prints whether the setting was made, and the fewest page faults of a large block that is made again
PROGRAM = """
import resource, sys
from utils.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * SIZE
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

done = sys.argv[1] == "keep" and keep_freed_memory()
print(done, min(faults() for _ in range(8)))
"""
SIZE = 36 * 2**20  # above the largest size that glibc takes from its heap by itself
PAGES = SIZE // os.sysconf("SC_PAGE_SIZE")
needs_glibc = pytest.mark.skipif(not allocator._is_glibc(), reason="glibc's allocator")


def faults(how: str) -> tuple[bool, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run([sys.executable, "-c", PROGRAM.replace("SIZE", str(SIZE)), how], cwd=ROOT, env=clean,
                         capture_output=True, text=True, timeout=60, check=True)
    done, count = run.stdout.split()
    return done == "True", int(count)


@needs_glibc
def test_memory_that_was_freed_is_used_again() -> None:
    done, count = faults("keep")
    assert done and count < PAGES // 10
    done, count = faults("leave")
    assert not done and count >= PAGES // 2, "what the setting is for"


@pytest.mark.parametrize(("name", "value"), [("MALLOC_TOP_PAD_", "1000000"),
                                             ("GLIBC_TUNABLES", "glibc.malloc.top_pad=1000000")])
def test_own_settings_of_the_user_win(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("the allocator was asked"))
    monkeypatch.setenv(name, value)
    assert allocator.keep_freed_memory() is False


@pytest.mark.parametrize("answer", [None, ValueError("unrecognized configuration name"), OSError()])
def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch, answer: Exception | None) -> None:
    def confstr(name: str) -> None:
        if answer is not None:
            raise answer

    monkeypatch.setattr(os, "confstr", confstr)
    assert allocator.keep_freed_memory() is False


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert allocator.keep_freed_memory() is False
