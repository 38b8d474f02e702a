"""One run at a time in a folder: a lock file that names its owner, shows that it lives, and is taken over when stale.

A hard-killed run leaves its file. On the same machine its process is looked up; an owner on another machine is gone
when its file has not been touched for STALE seconds by the clock of the file system.
"""
from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from engine.log import LOG
from engine.run_files import RunFiles
from utils.errors import UserError
from utils.files import check_target, temporary_name
from utils.tensor_files import first_line

#: seconds between two signs of life
REFRESH = 15.0
#: seconds without one after which an owner on another machine counts as gone
STALE = 120.0
#: seconds between two looks at the file of an owner on another machine
LOOK = 1.0
HIDDEN = "hidden"


@dataclass(frozen=True)
class Owner:
    """A process. space: of process numbers (containers of one host have their own). started: tells it from a later
    process of the same number. inode: of its lock file, tells that from a copy; 0: unknown."""

    host: str
    process: int
    space: str = ""
    started: str = ""
    inode: int = 0

    @classmethod
    def this_process(cls) -> Owner:
        """The process that calls this."""
        return cls(socket.gethostname(), os.getpid(), _space(), _start_of(os.getpid()) or "")

    @property
    def is_local(self) -> bool:
        """Whether the process can be looked up from here."""
        return (self.host, self.space) == (socket.gethostname(), _space())

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}" if self.host else "an unknown process"


def _space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        return ""


def _start_of(process: int) -> str | None:
    """When a process of this machine has started, in ticks since the boot ('' where that is unknown, HIDDEN where it is
    another user's secret); None when there is no such process."""
    unseen = None
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # another user's, of which the system may show nothing more
        unseen = HIDDEN
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()
    except FileNotFoundError:
        return unseen if Path("/proc/self").exists() else ""
    return None if fields[0] in "ZX" else fields[19]  # a zombie has ended


class FileLock:
    """A lock file. what: the flag of its folder, for messages."""

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what, self.mine = path, what, Owner.this_process()
        self._made: list[Path] = []

    def acquire(self) -> Owner | None:
        """Take the lock; from whom, if somebody has left it. UserError when a living process has it, or when the file
        cannot be written."""
        gone = None
        try:
            folder = self.path.parent
            self._made = [one for one in (folder, *folder.parents) if not one.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            while not self._create():
                gone = self._make_way() or gone
        except OSError as error:
            raise UserError(f"{self.what} {self.path.parent}: cannot be written ({first_line(error)})") from error
        return gone

    def check(self) -> None:
        """UserError when the lock is no longer this process's."""
        owner = self._read()
        if owner != self.mine and not (owner and not owner.host):  # one that cannot be read now says nothing
            raise UserError(f"{self.what} {self.path.parent}: {owner or 'somebody'} has taken this run over or removed "
                            f"its lock {self.path.name}: {self.mine} ends here and writes nothing any more")

    def refresh(self) -> None:
        """A sign of life."""
        if self._read() == self.mine:
            os.utime(self.path)

    def release(self) -> None:
        """Give the lock back, if it still is this process's, and remove the folders that were made for it and hold
        nothing."""
        if self._read() == self.mine:
            self.path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            for folder in self._made:
                folder.rmdir()

    def _create(self) -> bool:
        try:
            file = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(file, "w", encoding="utf-8") as stream:
            self.mine = replace(self.mine, inode=os.fstat(file).st_ino)
            json.dump(asdict(self.mine), stream)
        return True

    def _read(self) -> Owner | None:
        """The owner; nameless when the file does not say; None when there is no file."""
        try:
            return Owner(**json.loads(self.path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):
            return Owner("", 0)

    def _make_way(self) -> Owner | None:
        """Remove a stale lock; whose it was. UserError when its owner lives."""
        owner = self._read()
        if owner is None:
            return None
        if self._is_alive(owner):
            raise UserError(f"{self.what} {self.path.parent}: {self._read() or owner} trains the same network here "
                            f"(its lock: {self.path.name}): wait for it, stop it, or choose another folder")
        aside = temporary_name(self.path)
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return None
        try:
            if FileLock(aside, self.what)._read() == owner:
                return owner
            if not self.path.exists():  # another process was faster with the same: its lock goes back
                os.rename(aside, self.path)
            return None
        finally:
            aside.unlink(missing_ok=True)

    def _is_alive(self, owner: Owner) -> bool:
        """Whether the owner lives and this is its file, not one that was copied together with its folder."""
        try:
            if owner.inode not in (0, self.path.stat().st_ino):
                return False
        except FileNotFoundError:
            return False
        if owner.is_local:
            return _start_of(owner.process) in (owner.started, HIDDEN)
        return self._shows_life(owner)

    def _shows_life(self, owner: Owner) -> bool:
        """Whether the owner touches its file before that is STALE seconds old; False too when it goes away."""
        clock = temporary_name(self.path)
        try:
            clock.touch()
            now = clock.stat().st_mtime
        finally:
            clock.unlink(missing_ok=True)
        try:
            touched = self.path.stat().st_mtime
            patience = touched + STALE - now
            if patience > 0:
                LOG.info("%s: waiting up to %.0f s for a sign of life of %s", self.path, patience, owner)
            end = time.monotonic() + patience
            while time.monotonic() < end:
                time.sleep(LOOK)
                if self.path.stat().st_mtime != touched:
                    return True
        except FileNotFoundError:
            return False
        return False


class RunLock:
    """The locks of a run: on its weights in ``--save-dir`` and on its log in ``--log-dir``. A thread keeps them fresh.
    """

    def __init__(self, files: RunFiles) -> None:
        self.locks = [FileLock(files.directory / f".{files.stem}.lock", "--save-dir"),
                      FileLock(files.log_directory / f".{files.log_name}.lock", "--log-dir")]
        self._held: list[FileLock] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep_fresh, name="lock", daemon=True)

    def __enter__(self) -> RunLock:
        gone: dict[str, Path] = {}
        try:
            for lock in self.locks:
                self._held.append(lock)
                if owner := lock.acquire():
                    gone.setdefault(str(owner), lock.path)
        except BaseException:
            self._release()
            raise
        for owner, path in gone.items():
            LOG.warning("%s: took over from %s, which is not there any more", path, owner)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._release()

    def check(self) -> None:
        """UserError when another process has taken a lock."""
        for lock in self._held:
            lock.check()

    def _release(self) -> None:
        for lock in reversed(self._held):
            lock.release()

    def _keep_fresh(self) -> None:
        while not self._end.wait(REFRESH):
            for lock in self._held:
                try:
                    lock.refresh()
                except OSError:  # the next one may work again; a save finds out more
                    continue


@contextmanager
def locked(files: RunFiles, is_main_process: bool) -> Iterator[RunLock | None]:
    """Inside, the folders are this run's own, and nothing half-written is left in them. The main process holds the
    locks, the others get None. UserError when another run has them."""
    for name, folder in (("--save-dir", files.directory), ("--log-dir", files.log_directory)):
        check_target(folder, name, is_folder=True)
    if not is_main_process:
        yield None
        return
    with RunLock(files) as lock:
        files.remove_leftovers()
        yield lock
