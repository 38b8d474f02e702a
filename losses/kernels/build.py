"""C++ beside the Python files, compiled with the machine's own compiler when it is first needed, and kept."""
from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from utils.files import write_atomically

log = logging.getLogger("afdcd")

FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread")
#: for this very processor; not every compiler knows the first
TARGETS = (("-march=native",), ("-mcpu=native",), ())
PATIENCE = 120.0  # seconds for one call of the compiler


def find_compiler() -> list[str] | None:
    """The command of a C++ compiler: the environment's ``CXX``, else the first of the usual names that is there."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    for words in [chosen] if chosen else (["c++"], ["g++"], ["clang++"]):
        if shutil.which(words[0]):
            return words
    return None


def run_compiler(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)


def native_command(compiler: list[str]) -> tuple[list[str], str]:
    """The compiler with the flags for this processor, and what it predefines: its version and the instruction sets.
    Raises OSError when it works with no target."""
    for target in TARGETS:
        command = [*compiler, *FLAGS, *target]
        asked = run_compiler([*command, "-dM", "-E", "-x", "c++", os.devnull])
        if asked.returncode == 0:
            return command, asked.stdout
    raise OSError(f"{shlex.join(compiler)} does not work: {last_line(asked.stderr)}")


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def cache_folder() -> Path:
    """Where compiled files are kept: ``afdcd`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "afdcd"


def compile_library(source: Path) -> ctypes.CDLL:
    """The shared library of a C++ file, compiled unless that was done for this source, compiler and processor before.
    Raises OSError, RuntimeError or TimeoutExpired where it cannot be made."""
    compiler = find_compiler()
    if compiler is None:
        raise OSError("no C++ compiler found (the environment's CXX, else c++, g++ or clang++)")
    command, target = native_command(compiler)
    text = source.read_text(encoding="utf-8")
    key = hashlib.sha256("\0".join((text, *command, target)).encode()).hexdigest()[:16]
    kept = cache_folder() / f"{source.stem}-{key}.so"
    if kept.exists():
        return ctypes.CDLL(str(kept))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / kept.name
        done = run_compiler([*command, str(source), "-o", str(made)])
        if done.returncode:
            raise OSError(f"{shlex.join(command)} fails: {last_line(done.stderr)}")
        library = ctypes.CDLL(str(made))  # it stays loaded although the file goes
        log.info("%s: compiled in %.1f s by %s", source.name, time.perf_counter() - start, compiler[0])
        try:
            write_atomically(kept, lambda path: shutil.copyfile(made, path))
        except OSError as error:
            log.info("%s: compiled anew in every process: %s", source.name, error)
    return library


@functools.cache
def library(source: Path) -> ctypes.CDLL | None:
    """:func:`compile_library`, or None where that is impossible, with the reason in the log. Asked once per process."""
    try:
        return compile_library(source)
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        log.info("%s cannot be compiled, so PyTorch's operations do its work, slower: %s", source.name, error)
        return None
