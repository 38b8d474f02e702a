"""Writes the toy streets of one seed in CamVid's folder layout."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import cv2
import numpy as np

from dataset.toy_streets.scene import paint_scene
from utils.errors import UserError

DESCRIPTION = "toy_streets.json"
SPLIT_IDS = {"train": 0, "val": 1, "test": 2}
VERSION = 1
"""Raise it when the painter changes what a seed looks like: folders of another version count as different."""
_MIN_SIDE = 32


def toy_street(seed: int, split: str, index: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Scene `index` of a split: image uint8 [height, width, 3] BGR, label uint8 [height, width].

    Depends on these arguments only, not on how many scenes are made.
    """
    return paint_scene(np.random.default_rng((seed, SPLIT_IDS[split], index)), height, width)


def write_toy_streets(
    root: str | os.PathLike,
    *,
    train: int = 320,
    val: int = 60,
    test: int = 100,
    height: int = 120,
    width: int = 160,
    seed: int = 0,
    overwrite: bool = False,
) -> bool:
    """Write `<root>/{train,val,test}/*.png` with `<root>/{train,val,test}annot/*.png` and a description.

    Everything is written beside `root` first and renamed at the end: an interrupted run leaves nothing half done.

    Args:
        root: folder to create; its parents are created too.
        train, val, test: number of scenes of each split.
        height, width: size of the images in pixels, at least 32.
        seed: not negative.
        overwrite: replace toy streets that were made with other parameters.

    Returns:
        True if it wrote, False if the same toy streets lay there already.

    Raises:
        UserError: bad parameters; other toy streets in `root` (unless `overwrite`); anything else in `root` (always).
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
    }
    _check(wanted)
    root = Path(root).resolve()
    try:
        return _write(root, wanted, overwrite)
    except OSError as error:
        raise UserError(
            f"{root}: cannot be written ({error.strerror}); expected a folder that can be created"
        ) from error


def _write(root: Path, wanted: dict[str, int | str], overwrite: bool) -> bool:
    if _occupied(root):
        if _complete(root, wanted):
            return False
        if not overwrite:
            raise UserError(
                f"{root}: holds toy streets made with other parameters ({_difference(root, wanted)}); "
                f"give --overwrite to replace them, or another folder by --data"
            )
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}.", suffix=".tmp", dir=root.parent) as folder:
        draft, old = Path(folder, "new"), Path(folder, "old")
        draft.mkdir()
        for split in SPLIT_IDS:
            _write_split(draft, split, wanted)
        (draft / DESCRIPTION).write_text(json.dumps(wanted, indent=2) + "\n")
        if root.exists():
            root.rename(old)
        draft.rename(root)
    return True


def _check(wanted: dict[str, int | str]) -> None:
    for name in SPLIT_IDS:
        if wanted[name] < 1:
            raise UserError(f"--{name} {wanted[name]}: expected at least one scene")
    for name in ("height", "width"):
        if wanted[name] < _MIN_SIDE:
            raise UserError(f"--{name} {wanted[name]}: expected at least {_MIN_SIDE} pixels")
    if wanted["seed"] < 0:
        raise UserError(f"--seed {wanted['seed']}: expected 0 or more")


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


def _write_split(root: Path, split: str, wanted: dict[str, int | str]) -> None:
    for folder in (split, f"{split}annot"):
        (root / folder).mkdir()
    for index in range(wanted[split]):
        image, label = toy_street(wanted["seed"], split, index, wanted["height"], wanted["width"])
        name = f"{split}_{index:05d}.png"
        for folder, pixels in ((split, image), (f"{split}annot", label)):
            _, encoded = cv2.imencode(".png", pixels)
            (root / folder / name).write_bytes(encoded.tobytes())
