"""The lock of a run's folders: a second run is refused, a stale lock is taken over, nothing is left behind."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from helpers import STEM, assert_refused, records, train_arguments, write_folder_dataset

import engine.lock
import train_kd
from engine.lock import FileLock, Owner
from utils.errors import UserError

LOCK = f".{STEM}.lock"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_folder_dataset(tmp_path_factory.mktemp("data") / "set", train=4, val=1)


def run_of(data: Path, save: Path, *more: str) -> list[str]:
    return train_arguments(data, save, "--method", "none", "--max-iterations", "1", "--skip-val", *more)


def leave(path: Path, owner: Owner) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(owner)))
    return path


def ended() -> Owner:
    """A process of this machine that has ended and was waited for."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return replace(Owner.this_process(), process=process.pid)


class TestRuns:
    def test_a_second_run_is_refused_with_host_and_process(self, data, tmp_path, capsys, monkeypatch) -> None:
        """The second starts while the first is in its step."""
        train_batch, tried, mine = train_kd.train_batch, [], Owner.this_process()

        def meanwhile(run, batch):
            tried.append((tmp_path / LOCK).read_text())
            assert_refused(capsys, train_kd.main, run_of(data, tmp_path), "--save-dir", LOCK,
                           f"process {mine.process} on {mine.host}")
            return train_batch(run, batch)

        monkeypatch.setattr(train_kd, "train_batch", meanwhile)
        assert train_kd.main(run_of(data, tmp_path)) == 0
        assert [replace(Owner(**json.loads(text)), inode=0) for text in tried] == [mine]
        assert not [*tmp_path.rglob("*.lock"), *tmp_path.rglob("previous-*")]
        assert [r["step"] for r in records(tmp_path)] == [1]

    def test_a_log_folder_that_is_in_use_is_refused(self, data, tmp_path, capsys) -> None:
        argv = run_of(data, tmp_path / "second", "--log-dir", str(tmp_path / "logs"))
        leave(tmp_path / "logs" / ".plain_deeplab_mobile-mobilenetv2_w0.25_folder.lock", Owner.this_process())
        assert_refused(capsys, train_kd.main, argv, "--log-dir", f"process {os.getpid()} on")
        assert not (tmp_path / "second" / LOCK).exists(), "the first lock is given back"

    def test_a_lock_of_a_process_that_is_gone_is_taken_over(self, data, tmp_path, capsys) -> None:
        owner = ended()
        leave(tmp_path / LOCK, owner)
        leave(tmp_path / "logs" / ".plain_deeplab_mobile-mobilenetv2_w0.25_folder.lock", owner)
        assert train_kd.main(run_of(data, tmp_path)) == 0
        said = capsys.readouterr().out
        assert said.count(f"took over from process {owner.process} on {owner.host}, which is not there any more") == 1
        assert not (tmp_path / LOCK).exists()

    def test_a_run_that_fails_gives_its_lock_back(self, data, tmp_path, monkeypatch) -> None:
        def failing(run, batch):
            raise RuntimeError("broken")

        monkeypatch.setattr(train_kd, "train_batch", failing)
        with pytest.raises(RuntimeError, match="broken"):
            train_kd.main(run_of(data, tmp_path))
        assert not [*tmp_path.rglob("*.lock"), *tmp_path.rglob("*.tmp")]

    def test_a_run_that_lost_its_lock_writes_nothing_any_more(self, data, tmp_path, capsys, monkeypatch) -> None:
        """As after a pause that was longer than others wait for a sign of life."""
        train_batch = train_kd.train_batch
        thief = replace(Owner.this_process(), host="another")

        def robbed(run, batch):
            leave(tmp_path / LOCK, thief)
            return train_batch(run, batch)

        monkeypatch.setattr(train_kd, "train_batch", robbed)
        assert_refused(capsys, train_kd.main, run_of(data, tmp_path), f"process {os.getpid()} on another has taken")
        assert not list(tmp_path.glob("*.pth"))
        assert json.loads((tmp_path / LOCK).read_text()) == asdict(thief), "the lock is the other's"


class TestOwners:
    def test_another_process_of_the_same_number_is_another_owner(self, tmp_path) -> None:
        mine = Owner.this_process()
        assert mine.started, "this machine tells when a process has started"
        lock = FileLock(leave(tmp_path / "x.lock", replace(mine, started="1")), "--save-dir")
        lock.acquire()
        lock.check()

    def test_a_copy_of_a_lock_is_none(self, tmp_path) -> None:
        first, copy = (FileLock(tmp_path / name, "--save-dir") for name in ("x.lock", "y.lock"))
        first.acquire()
        shutil.copy(first.path, copy.path)
        copy.acquire()
        first.check()
        copy.check()

    def test_folders_made_for_a_lock_go_with_it(self, tmp_path) -> None:
        lock = FileLock(tmp_path / "a" / "b" / "x.lock", "--save-dir")
        lock.acquire()
        lock.release()
        assert not (tmp_path / "a").exists()
        lock.acquire()
        (tmp_path / "a" / "kept").touch()
        lock.release()
        assert [p.name for p in tmp_path.rglob("*")] == ["a", "kept"]

    def test_a_zombie_is_gone(self, tmp_path) -> None:
        process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
        process.stdout.read()  # until it has ended
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert engine.lock._start_of(process.pid) is None
        process.wait()

    @pytest.mark.parametrize("change", [{"host": "another"}, {"space": "another container"}])
    def test_an_owner_elsewhere_that_shows_no_life_is_gone(self, tmp_path, change) -> None:
        lock = FileLock(leave(tmp_path / "x.lock", replace(ended(), **change)), "--save-dir")
        long_ago = lock.path.stat().st_mtime - engine.lock.STALE - 1
        os.utime(lock.path, (long_ago, long_ago))
        lock.acquire()
        lock.check()
        assert [p.name for p in tmp_path.iterdir()] == ["x.lock"]

    def test_an_owner_elsewhere_that_shows_life_is_respected(self, tmp_path, monkeypatch) -> None:
        lock = FileLock(leave(tmp_path / "x.lock", replace(ended(), host="another")), "--save-dir")
        monkeypatch.setattr(engine.lock.time, "sleep", lambda seconds: os.utime(lock.path, (1, 1)))
        with pytest.raises(UserError, match="on another trains the same network here"):
            lock.acquire()

    def test_an_owner_elsewhere_is_waited_for(self, tmp_path, monkeypatch) -> None:
        """As long as its last sign of life is not too old; here the time passes at once."""
        lock, slept = FileLock(leave(tmp_path / "x.lock", replace(ended(), host="another")), "--save-dir"), []
        monkeypatch.setattr(engine.lock.time, "sleep", slept.append)
        monkeypatch.setattr(engine.lock.time, "monotonic", lambda: sum(slept))
        lock.acquire()
        assert engine.lock.STALE - 10 < sum(slept) < engine.lock.STALE + 2

    def test_an_owner_refreshes_its_own_lock_only(self, tmp_path) -> None:
        lock = FileLock(tmp_path / "x.lock", "--save-dir")
        lock.acquire()
        os.utime(lock.path, (1, 1))
        lock.refresh()
        assert lock.path.stat().st_mtime > 1
        leave(lock.path, replace(lock.mine, host="another"))
        os.utime(lock.path, (1, 1))
        lock.refresh()
        lock.release()
        assert lock.path.stat().st_mtime == 1

    def test_a_run_keeps_its_locks_fresh(self, tmp_path, monkeypatch) -> None:
        from types import SimpleNamespace

        monkeypatch.setattr(engine.lock, "REFRESH", 0.01)
        files = SimpleNamespace(directory=tmp_path, log_directory=tmp_path / "logs", stem="a", log_name="b")
        with engine.lock.RunLock(files) as held:
            path = held.locks[1].path
            os.utime(path, (1, 1))
            for _ in range(3000):  # half a minute
                if path.stat().st_mtime != 1:
                    break
                engine.lock.time.sleep(0.01)
            assert path.stat().st_mtime != 1
        assert not list(tmp_path.rglob("*.lock"))

    def test_what_is_no_lock_counts_as_one(self, tmp_path, monkeypatch) -> None:
        lock = FileLock(tmp_path / "x.lock", "--save-dir")
        lock.path.write_text("")
        monkeypatch.setattr(engine.lock.time, "sleep", lambda seconds: os.utime(lock.path, (1, 1)))
        with pytest.raises(UserError, match="an unknown process trains"):
            lock.acquire()
