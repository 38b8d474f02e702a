"""glibc's memory allocator on a CPU: keep freed memory, in place of giving it back and getting it anew.

Memory of 32 MB and more comes from a system call of its own and goes back when it is freed, so the kernel has to clear
its pages again for every large tensor. With this the process keeps what it has once used until it ends: its peak, and
what lies between blocks of different sizes. Processes that it forks, those of a loader, do the same for themselves.
"""
from __future__ import annotations

import ctypes
import os
import sys

#: parameter of glibc's mallopt -> value: no mapping per block, never trim the heap, grow it by 64 MB at a time
_SETTINGS = {-4: 0, -1: -1, -2: 2**26}  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


def keep_freed_memory() -> bool:
    """Set the allocator of this process and of those it forks to keep what is freed. Returns whether it did.

    Not where the environment has settings for it (``MALLOC_...``, ``GLIBC_TUNABLES``), and not without glibc. Beside a
    preloaded allocator it has no effect."""
    mine = [name for name in os.environ if name.startswith("MALLOC_")]
    if mine or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or not _is_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(parameter, value) == 1 for parameter, value in _SETTINGS.items()])


def _is_glibc() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (ValueError, OSError):  # musl does not know the name
        return False
