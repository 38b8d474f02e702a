"""Loading processes, which outlive a signal that asks their run to stop, and end when their parent says so."""
from __future__ import annotations

import os
import signal
import threading
from multiprocessing import parent_process


def leave_signals_to_parent() -> None:
    """Called in a loading process: ignore what a terminal or a scheduler sends to all processes of a run. The parent
    may still need batches; its own SIGTERM ends this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for, args=(parent_process().pid,), daemon=True).start()


def _end_for(parent: int) -> None:
    """Wait for SIGTERM from that process, then end this one."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        continue
    os._exit(0)
