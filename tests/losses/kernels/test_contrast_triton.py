"""The Triton kernels without a GPU: their results in Triton's interpreter, and what the compiler makes of them."""
from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch
from reference import fill

from losses import kernels
from losses.afdcd import contrast_rows, excluded_pairs
from losses.kernels.contrast import Form, run_blocks
from tools import compile_kernels
from utils.errors import UserError

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                                  reason="the package triton is not installed (extra \"kernels\" of pyproject.toml)")
TAU = 0.7


@pytest.fixture(scope="module")
def interpreted():
    """The kernels' module once more, run by the interpreter; triton itself stays as it is."""
    importlib.import_module("triton.language")
    path = Path(kernels.__file__).with_name("contrast_triton.py")
    spec = importlib.util.spec_from_file_location("contrast_triton_interpreted", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read where a kernel is defined
        spec.loader.exec_module(module)
    return module


@needs_triton
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-6)])
@pytest.mark.parametrize(("patches", "size", "depth", "groups", "tile"), [
    (3, 12, 8, 4, None), (1, 15, 7, 3, None), (2, 18, 13, 2, (4, 8))])
def test_equals_the_plain_twin(interpreted, patches, size, depth, groups, tile, dtype, tolerance, monkeypatch):
    """With ties; less than a tile, and several tiles that do not end where the rows do."""
    if tile:
        for name in ("DISTANCES", "SIGNS"):
            tiling = getattr(interpreted, name)._replace(rows=tile[0], columns=tile[1])
            monkeypatch.setattr(interpreted, name, tiling)
    student, teacher = (fill.tensor(name, (patches, size, depth), 1, dtype=dtype) for name in ("student", "teacher"))
    student.view(-1)[::3] = teacher.view(-1)[::3]
    excluded = excluded_pairs(groups, (1, size // groups))
    form = Form(interpreted.l1_distances, interpreted.weighted_signs)
    losses, gradient = run_blocks(form, student, teacher, excluded, TAU, 2, True)
    want = contrast_rows(student.requires_grad_(), teacher, excluded, TAU)
    want.backward()
    torch.testing.assert_close(losses.sum(), want.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient, student.grad, rtol=tolerance, atol=tolerance)


@needs_triton
def test_compiled_for_gpus_without_one():
    """At the published size: no register is spilled, and enough warps fit to hide each other's waiting."""
    lines = [line for arch in (80, 90) for line in compile_kernels.measure(arch, 256, 128)]
    assert len(lines) == 8 and {line[1] for line in lines} == {"sm_80", "sm_90"}
    for _, _, _, registers, spills, _, warps in lines:
        assert registers > 0 and spills == 0 and warps >= 12


def test_the_report_of_the_assembler_is_read():
    text = ("ptxas info    : Function properties for f\n    8 bytes stack frame, 4 bytes spill stores, 6 bytes spill "
            "loads\nptxas info    : Used 56 registers, used 1 barriers, 2048 bytes smem, 384 bytes cmem[0]\n")
    assert compile_kernels.parse_usage(text) == {"registers": 56, "spills": 4, "shared": 2048}
    assert compile_kernels.parse_usage(text.replace(" 2048 bytes smem,", ""))["shared"] == 0
    with pytest.raises(UserError, match="ptxas: expected its report.*got 'nothing'"):
        compile_kernels.parse_usage("nothing")


def test_the_tool_says_what_it_lacks(monkeypatch, capsys):
    monkeypatch.setattr(compile_kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="the package triton is not installed: pip install triton"):
        compile_kernels.main([])


def test_the_table(monkeypatch, capsys):
    monkeypatch.setattr(compile_kernels.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(compile_kernels, "measure", lambda arch, rows, depth: [("k", f"sm_{arch}", rows, depth)])
    assert compile_kernels.main(["--arch", "80", "90", "--rows", "7"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == ["| k | sm_80 | 7 | 128 |", "| k | sm_90 | 7 | 128 |"]
