"""Compiling C++ on first use: kept, made once, and what is said where it cannot be made."""
from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path

import pytest

from losses.kernels import build

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="there is no C++ compiler")


@pytest.fixture
def source(tmp_path, monkeypatch, caplog) -> Path:
    """A C++ file; compiled files go to a folder of the test, and the log is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO, "afdcd")
    path = tmp_path / "seven.cpp"
    path.write_text('extern "C" int seven() { return 7; }')
    return path


@needs_compiler
def test_a_file_is_compiled_once(source, caplog):
    assert build.compile_library(source).seven() == 7
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("seven.cpp: compiled in ")
    assert build.compile_library(source).seven() == 7 and len(caplog.messages) == 1
    source.write_text('extern "C" int seven() { return 8; }')
    assert build.compile_library(source).seven() == 8
    kept = sorted(path.suffix for path in build.cache_folder().iterdir())
    assert kept == [".so", ".so"]


@needs_compiler
def test_a_folder_that_cannot_be_written_costs_only_time(source, caplog):
    build.cache_folder().parent.mkdir()
    build.cache_folder().write_text("a file in its place")
    assert build.compile_library(source).seven() == 7
    assert "compiled anew in every process" in caplog.messages[-1]


@needs_compiler
def test_what_the_compiler_refuses_is_said(source, caplog):
    source.write_text("int seven(")
    assert build.library.__wrapped__(source) is None
    assert "seven.cpp cannot be compiled, so PyTorch's operations do its work" in caplog.text
    assert " fails: " in caplog.text


def test_without_a_compiler_that_is_said(source, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.library.__wrapped__(source) is None
    assert "no C++ compiler found" in caplog.text


@needs_compiler
def test_targets_that_a_compiler_does_not_know_are_passed_over(source, monkeypatch, tmp_path):
    """A compiler that knows -march=native only under another name, or not at all."""
    real = shutil.which(build.find_compiler()[0])
    wrapper = tmp_path / "compiler.py"
    wrapper.write_text(f"import subprocess, sys\n"
                       f"sys.exit(1 if any('native' in x for x in sys.argv) else "
                       f"subprocess.call([{real!r}, *sys.argv[1:]]))\n")
    monkeypatch.setenv("CXX", f"{sys.executable} {wrapper}")
    command, _ = build.native_command(build.find_compiler())
    assert not any("native" in word for word in command)
    assert build.compile_library(source).seven() == 7
