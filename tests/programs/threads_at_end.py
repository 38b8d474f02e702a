"""Run a program and fail if a thread of gloo is still there when it ends.

    torchrun --nproc_per_node 2 threads_at_end.py PROGRAM ARGUMENT ...

Such a thread may drop a tensor while Python shuts down, which aborts the process, once in some hundred runs.
"""
from __future__ import annotations

import runpy
import sys
from contextlib import suppress
from pathlib import Path


def gloo_threads() -> list[str]:
    """Names of this process's threads of gloo (Linux)."""
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # it ended meanwhile
            names.append(path.read_text().strip())
    return [name for name in names if "gloo" in name]


def main() -> None:
    import torch.distributed as dist

    seen, destroy = [], dist.destroy_process_group

    def watched_destroy(*arguments) -> None:
        seen.extend(gloo_threads())
        destroy(*arguments)

    dist.destroy_process_group = watched_destroy
    program = sys.argv[1]
    sys.argv = sys.argv[1:]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise
    if not seen:
        sys.exit(f"{program}: no thread of gloo before the end, so this shows nothing")
    if gloo_threads():
        sys.exit(f"{program}: still running at the end: {', '.join(gloo_threads())}")


if __name__ == "__main__":
    main()
