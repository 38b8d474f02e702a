#!/usr/bin/env python3
"""Compile the Triton kernels for given GPUs, on a machine that needs none, and show what each takes of the GPU.

    python tools/compile_kernels.py --arch 80 90

Prints a Markdown table. Registers are per thread, spills in bytes per thread (0: all sums stay in registers), shared
memory in bytes per program; warps: how many a multiprocessor can hold at a time, of 64. Needs the package triton.
"""
from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from utils.cli import parse_options, run_main
from utils.errors import UserError
from utils.options import OptionGroup, option

REGISTERS, PROGRAMS = 16384, 32  # of a quarter of a multiprocessor, and of all of it
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
COLUMNS = ("kernel", "GPU", "type", "registers", "spills", "shared memory", "warps at a time")


@dataclass(frozen=True, kw_only=True)
class Settings(OptionGroup):
    """The command line."""
    arch: tuple[str, ...] = option(("80", "90"), "compute capabilities", choices=("80", "86", "89", "90"),
                                   metavar="N")
    rows: int = option(256, "vectors per patch: patch height * width * channel groups", at_least=1)
    depth: int = option(128, "numbers per vector: the teacher's channels / groups", at_least=1)


def parse_usage(text: str) -> dict[str, int]:
    """What ``ptxas -v`` says that a kernel takes: registers, spills and shared memory."""
    patterns = {"registers": r"Used (\d+) registers", "spills": r"(\d+) bytes spill stores",
                "shared": r"(\d+) bytes smem"}
    found = {name: re.search(pattern, text) for name, pattern in patterns.items()}
    if not found["registers"] or not found["spills"]:
        raise UserError(f"ptxas: expected its report of registers and spills, got {text.strip()!r}")
    return {name: int(match[1]) if match else 0 for name, match in found.items()}


def assemble(ptx: str, arch: int, shared: int) -> dict[str, int]:
    """:func:`parse_usage` of PTX, by triton's own assembler. shared: bytes that the launch adds."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"\.target (\w+)", ptx)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        done = subprocess.run([get_ptxas(arch).path, "-v", f"--gpu-name={target}", file.name, "-o", os.devnull],
                              capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"ptxas cannot assemble for {target}: {done.stderr.strip()}")
    usage = parse_usage(done.stdout + done.stderr)
    return usage | {"shared": max(usage["shared"], shared)}


def measure(arch: int, rows: int, depth: int) -> list[tuple]:
    """A row of :data:`COLUMNS` for every kernel and type, compiled for a compute capability."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from losses.kernels import contrast_triton

    lines = []
    for tiling, columns, terms in ((contrast_triton.DISTANCES, rows, depth), (contrast_triton.SIGNS, depth, rows)):
        names = tiling.kernel.arg_names
        for name, dtype in DTYPES.items():
            constants = tiling.constants(dtype, rows, depth, columns, terms)
            signature = {x: "constexpr" if x in constants else f"*{name}" for x in names}
            aligned = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(names) if x not in constants}
            source = ASTSource(tiling.kernel, signature, {(names.index(k),): v for k, v in constants.items()}, aligned)
            compiled = compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": tiling.warps})
            usage = assemble(compiled.asm["ptx"], arch, compiled.metadata.shared)
            warps = min(4 * (REGISTERS // (32 * 8 * -(-usage["registers"] // 8))), PROGRAMS * tiling.warps, 64)
            lines.append((tiling.kernel.__name__, f"sm_{arch}", name, *usage.values(), warps))
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and print."""
    settings = parse_options(Settings, argv, prog="compile_kernels.py", description=__doc__.split("\n")[0])
    if importlib.util.find_spec("triton") is None:
        raise UserError("the package triton is not installed: pip install triton")
    lines = [line for arch in settings.arch for line in measure(int(arch), settings.rows, settings.depth)]
    for line in (COLUMNS, ("---",) * len(COLUMNS), *lines):
        print("| " + " | ".join(map(str, line)) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
