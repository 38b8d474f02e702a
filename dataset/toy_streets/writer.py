"""Writes the toy streets of one seed in CamVid's folder layout."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path

import cv2
import numpy as np

from dataset.toy_streets.labels import NUM_CLASS
from dataset.toy_streets.scene import paint_scene
from utils.errors import UserError

DESCRIPTION = "toy_streets.json"
SPLIT_IDS = {"train": 0, "val": 1, "test": 2}
VERSION = 1
"""Raise it when the painter changes what a seed looks like: folders of another version count as different."""
_MIN_SIDE = 32
_PROCESS_SCENES = 32
"""Fewer scenes than these are painted before a process has started (it imports torch, as all of `dataset` does)."""


def toy_street(seed: int, split: str, index: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Scene `index` of a split: image uint8 [height, width, 3] BGR, label uint8 [height, width].

    Depends on these arguments only, not on how many scenes are made.
    """
    return paint_scene(np.random.default_rng((seed, SPLIT_IDS[split], index)), height, width)


def label_at_points(label: np.ndarray, points: int, generator: np.random.Generator) -> np.ndarray:
    """A label uint8 [H, W] at so many random points; others get the index after the last class, which is ignored."""
    rows, columns = (generator.integers(0, side, points) for side in label.shape)
    clicked = np.full_like(label, NUM_CLASS)
    clicked[rows, columns] = label[rows, columns]
    return clicked


def write_toy_streets(
    root: str | os.PathLike,
    *,
    train: int = 320,
    val: int = 60,
    test: int = 100,
    height: int = 120,
    width: int = 160,
    seed: int = 0,
    points: int = 0,
    overwrite: bool = False,
    workers: int = 1,
) -> bool:
    """Write `<root>/{train,val,test}/*.png` with `<root>/{train,val,test}annot/*.png` and a description.

    Everything is written beside `root` first and renamed at the end: an interrupted run leaves nothing half done.

    Args:
        root: folder to create; its parents are created too.
        train, val, test: number of scenes of each split.
        height, width: size of the images in pixels, at least 32.
        seed: not negative.
        points: training scenes are labeled at so many random points only, the rest is ignored, as if somebody had
            clicked on them; 0: everywhere. The other splits are labeled everywhere.
        overwrite: replace toy streets that were made with other parameters.
        workers: paint in at most this many processes; the files do not depend on it. More than one are started
            afresh ("spawn"), so that a script which asks for them needs `if __name__ == "__main__":`.

    Returns:
        True if it wrote, False if the same toy streets lay there already.

    Raises:
        UserError: bad parameters; other toy streets in `root` (unless `overwrite`); anything else in `root` (always);
            a file that cannot be written; a process that cannot be started or died.
    """
    wanted = {
        "dataset": "toy_streets",
        "version": VERSION,
        "train": train,
        "val": val,
        "test": test,
        "height": height,
        "width": width,
        "seed": seed,
        **({"points": points} if points else {}),
    }
    _check(wanted, workers)
    root = Path(root).resolve()
    try:
        return _write(root, wanted, overwrite, workers)
    except OSError as error:
        raise UserError(
            f"{root}: cannot be written ({error.strerror}); expected a folder that can be created"
        ) from error


def _write(root: Path, wanted: dict[str, int | str], overwrite: bool, workers: int) -> bool:
    if _occupied(root):
        if _complete(root, wanted):
            return False
        if not overwrite:
            raise UserError(
                f"{root}: holds toy streets made with other parameters ({_difference(root, wanted)}); remove the "
                f"folder or name another one ('python -m dataset.toy_streets --overwrite' replaces them)"
            )
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}.", suffix=".tmp", dir=root.parent) as folder:
        draft, old = Path(folder, "new"), Path(folder, "old")
        draft.mkdir()
        for split in SPLIT_IDS:
            for name in (split, f"{split}annot"):
                (draft / name).mkdir()
        _write_scenes(draft, wanted, workers)
        (draft / DESCRIPTION).write_text(json.dumps(wanted, indent=2) + "\n")
        if root.exists():
            root.rename(old)
        draft.rename(root)
    return True


def _check(wanted: dict[str, int | str], workers: int) -> None:
    for name in SPLIT_IDS:
        if wanted[name] < 1:
            raise UserError(f"--{name} {wanted[name]}: expected at least one scene")
    for name in ("height", "width"):
        if wanted[name] < _MIN_SIDE:
            raise UserError(f"--{name} {wanted[name]}: expected at least {_MIN_SIDE} pixels")
    if wanted["seed"] < 0:
        raise UserError(f"--seed {wanted['seed']}: expected 0 or more")
    if wanted.get("points", 0) < 0:
        raise UserError(f"--points {wanted['points']}: expected 0 or more")
    if workers < 1:
        raise UserError(f"--workers {workers}: expected at least one process")


def _occupied(root: Path) -> bool:
    """Whether toy streets lie in `root`; UserError if something else does."""
    if not root.exists():
        return False
    if root.is_dir():
        if not any(root.iterdir()):
            return False
        if _described(root).get("dataset") == "toy_streets":
            return True
    raise UserError(f"{root}: exists and holds no toy streets (no {DESCRIPTION}); expected a new or an empty folder")


def _described(root: Path) -> dict:
    try:
        described = json.loads((root / DESCRIPTION).read_text())
    except (OSError, ValueError):
        return {}
    return described if isinstance(described, dict) else {}


def _complete(root: Path, wanted: dict[str, int | str]) -> bool:
    """Whether `root` is described as `wanted` and still has all its files."""
    folders = [(split, root / name) for split in SPLIT_IDS for name in (split, f"{split}annot")]
    return _described(root) == wanted and all(
        folder.is_dir() and len(list(folder.glob("*.png"))) == wanted[split] for split, folder in folders
    )


def _difference(root: Path, wanted: dict[str, int | str]) -> str:
    described = _described(root)
    differing = [f"{k} {described.get(k)}, not {v}" for k, v in wanted.items() if described.get(k) != v]
    return "; ".join(differing) or "files are missing"


def _write_scenes(root: Path, wanted: dict[str, int | str], workers: int) -> None:
    """All files of all splits, into folders that exist."""
    scenes = [(split, index) for split in SPLIT_IDS for index in range(wanted[split])]
    processes = min(workers, len(scenes) // _PROCESS_SCENES)
    if processes < 2:
        for scene in scenes:
            _write_scene(root, wanted, *scene)
        return
    strangers = set(active_children())
    pool = None
    try:
        with _interrupts_held_back(), _failed_starts_named(workers):
            # spawned, not forked: the caller may have threads (of torch) that hold locks
            pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_start_painter)
            tasks = [pool.submit(_write_scene, root, wanted, *scene) for scene in scenes]
        for task in as_completed(tasks):
            task.result()
    except BaseException as error:
        for child in set(active_children()) - strangers:
            child.terminate()
        if not isinstance(error, BrokenProcessPool):
            raise
        raise UserError(
            f"--workers {workers}: a painting process ended unexpectedly (out of memory?); "
            f"--workers 1 needs no further process"
        ) from error
    finally:
        if pool is not None:
            with suppress(RuntimeError):  # its thread never started
                pool.shutdown(cancel_futures=True)


def _write_scene(root: Path, wanted: dict[str, int | str], split: str, index: int) -> None:
    image, label = toy_street(wanted["seed"], split, index, wanted["height"], wanted["width"])
    if split == "train" and wanted.get("points"):
        label = label_at_points(label, wanted["points"], np.random.default_rng((wanted["seed"], index)))
    for folder, pixels in ((split, image), (f"{split}annot", label)):
        _, encoded = cv2.imencode(".png", pixels)
        (root / folder / f"{split}_{index:05d}.png").write_bytes(encoded.tobytes())


@contextmanager
def _failed_starts_named(workers: int) -> Iterator[None]:
    """What goes wrong when processes (OSError) and their pool's thread (RuntimeError) start becomes a UserError."""
    try:
        yield
    except BrokenProcessPool:
        raise
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--workers {workers}: the painting processes cannot be started "
            f"({getattr(error, 'strerror', None) or error}); --workers 1 needs no further process"
        ) from error


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C waits until the end of the block; processes that are started in it never see one."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_painter() -> None:
    """Set up a painting process: one thread, and no life without the process that started it."""
    cv2.setNumThreads(0)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)
