"""What the machine does to a program (memory, disks, lost processes), as one line that says what to do about it."""
from __future__ import annotations

import errno
import os
import re
import resource
from contextlib import suppress

#: errors of the system that are no defect of the program
OF_SYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
MEMORY = ("fewer images by --batch-size, or --amp bf16 on a GPU; in training also a smaller --crop-size, or "
          "--grad-accumulation 2 (the same gradients in parts)")
SHARED = ("the shared memory of the loading processes is full: free /dev/shm (df -h /dev/shm; docker run --shm-size "
          "16g), or take fewer --workers")
#: open files that a program asks for: shells allow 1024 as a rule, which many loading processes use up
OPEN_FILES = 65536
FILES = "the limit on open files is reached: raise it (ulimit -n 65536), or take fewer --workers"
#: what PyTorch says, in lower case, and the line that it becomes; the first that fits counts
SIGNS = (
    (r"worker \(pid.*killed by signal: bus error|unable to (allocate|write|resize).*(shared memory|torch_)", SHARED),
    (r"too many open files|received 0 items of ancdata", FILES),
    (r"worker \(pid.*(exited unexpectedly|killed by signal)",
     "a loading process was killed, as a rule by the system since memory ran out (dmesg tells): take fewer --workers, "
     "or more memory; a training goes on by --resume auto"),
    (r"cuda out of memory|cublas_status_alloc_failed|hip out of memory", f"the GPU's memory is full: try {MEMORY}"),
    (r"defaultcpuallocator: can't allocate|insufficient memory|not enough memory", f"the memory is full: try {MEMORY}"),
)
#: the same of several processes
OF_PROCESSES = (
    (r"connection closed by peer|connection reset|broken pipe|remote process exited|socket closed",
     "another process failed; its message is above or below"),
    (r"clients joined|timed out.*(waiting for clients|rendezvous)|client socket has timed out",
     "not all processes have come to the start: check that every machine runs its launcher, with the same address and "
     "number of machines, and that the port is open"),
    (r"(gloo|nccl|store|collective|watchdog|recv|send|waiting|barrier).*(timed out|timeout)|timed out waiting|"
     r"timeout waiting", "another process did not answer in time (--timeout): it is stopped, or its "
     "machine is gone; look there, then start again, a training with --resume auto"),
)


def explained(error: BaseException) -> str | None:
    """One line on an error that the machine has caused; None for any other."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in OF_SYSTEM:
        return f"{error.filename or 'a file'}: {os.strerror(error.errno)}; what was saved before is intact"
    if isinstance(error, MemoryError):
        return f"the memory is full: try {MEMORY}"
    if not isinstance(error, (RuntimeError, OSError)) and type(error).__name__ != "error":  # that of OpenCV
        return None
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    for sign, line in (*SIGNS, *(OF_PROCESSES if several else ())):
        if re.search(sign, text.lower()):
            return f"{line} ({text[:160]})" if line is not OF_PROCESSES[0][1] else line
    return None


def allow_open_files() -> None:
    """Raise this process's limit on open files to :data:`OPEN_FILES`, as far as the system lets any user."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):  # macOS has another limit beside this one
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
