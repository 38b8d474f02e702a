"""Scores that a frozen teacher gives to the images of a training set, computed once (``tools/cache_teacher.py``).

    NAME.json      of which teacher and images they are, and how they are stored
    NAME.scores    a record for every image as it is and one for the image mirrored, all of one size
    NAME.sums      a number for every record, written after it: 0 = not there, else 2^32 + its CRC-32
"""
from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataset.fingerprint import changes
from utils.errors import UserError
from utils.files import readable_size, write_json

FORMAT = "teacher scores 1"
THERE = 2**32  # of a sum, when its record is there
DTYPES = {"float16": torch.float16, "float32": torch.float32}
AGAIN = "tools/cache_teacher.py with the same flags adds what is missing"


class Scores:
    """The scores of one training set. Processes may share it; one may write while no other reads.

    folder, name: of the files. about: the content of the JSON file: "teacher" {"name", "weights"}, "precision" of its
    passes, "data" (a fingerprint), "crop", "images"; and how scores are stored: "taps" {name: channels}, "size" [h, w],
    "dtype", "top_k" (0 = all classes; else the highest of every position, and what the others are on average)."""

    def __init__(self, folder: Path, name: str, about: Mapping[str, Any]) -> None:
        self.about, self.records, self.sums = about, folder / f"{name}.scores", folder / f"{name}.sums"
        self.taps, (self.height, self.width) = dict(about["taps"]), about["size"]
        self.dtype, self.top_k, self.count = DTYPES[about["dtype"]], about["top_k"], 2 * about["images"]
        self._checked = bytearray(self.count)
        self._map: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}

    @property
    def size(self) -> int:
        """Bytes of a record."""
        numbers = [min(self.top_k, classes) for classes in self.taps.values()]
        kept = [n * (self.dtype.itemsize + 2) + self.dtype.itemsize if self.top_k else classes * self.dtype.itemsize
                for n, classes in zip(numbers, self.taps.values(), strict=True)]
        return sum(kept) * self.height * self.width

    def read(self, index: int, mirrored: bool) -> Tensor:
        """The scores [C, h, w] of an image, of all taps one after the other. UserError for a damaged record."""
        number = 2 * index + mirrored
        if self._map is None:
            self._map = np.memmap(self.records, np.uint8, "r", shape=(self.count, self.size))
        record = self._map[number]
        if not self._checked[number]:
            if zlib.crc32(record) + THERE != self._sums()[number]:
                raise UserError(f"{self.records}: the scores of image {index} are damaged; {AGAIN}",
                                settings=["teacher_scores"])
            self._checked[number] = 1
        return self._unpacked(record)

    def missing(self) -> list[int]:
        """The records (2 * index + mirrored) that are not there or damaged."""
        sums = self._sums()
        if not sums.any():
            return list(range(self.count))
        records = np.memmap(self.records, np.uint8, "r", shape=(self.count, self.size))
        return [n for n in range(self.count) if not sums[n] or zlib.crc32(records[n]) + THERE != sums[n]]

    def _sums(self) -> np.ndarray:
        return np.fromfile(self.sums, np.uint64)

    def reserve(self) -> None:
        """Make room for what is not there yet. UserError when there is too little."""
        held = self.records.stat().st_blocks * 512 if self.records.exists() else 0
        needed, free = self.count * self.size - held, shutil.disk_usage(self.records.parent).free
        if needed > free:
            raise UserError(f"{self.records.parent}: the scores need {readable_size(needed)}, but "
                            f"{readable_size(free)} are free; expected a larger disk, or fewer classes by --top-k")
        for path, size in ((self.records, self.count * self.size), (self.sums, 8 * self.count)):
            with open(path, "ab") as file:
                file.truncate(size)

    def write(self, numbers: Sequence[int], scores: Tensor) -> None:
        """Store scores [B, C, h, w] as records; what is written stays when the process dies. UserError for scores that
        are not finite in the precision of the store, and a disk that is full."""
        try:
            with open(self.records, "rb+") as records, open(self.sums, "rb+") as sums:
                for number, one in zip(numbers, scores.cpu(), strict=True):
                    record = self._packed(one)
                    os.pwrite(sums.fileno(), bytes(8), 8 * number)
                    records.seek(number * self.size)
                    records.write(record)
                    records.flush()
                    os.pwrite(sums.fileno(), np.uint64(zlib.crc32(record) + THERE).tobytes(), 8 * number)
        except OSError as error:
            raise UserError(f"{self.records}: cannot be written: {error.strerror or error}") from None

    def _packed(self, scores: Tensor) -> bytes:
        parts: list[Tensor] = []
        for tap in scores.float().split(list(self.taps.values())):
            if self.top_k:
                ordered, classes = tap.sort(dim=0, descending=True)
                kept = min(self.top_k, len(tap))
                # as many equal scores give the others' probabilities their sum
                rest = ordered[kept:].logsumexp(0) - np.log(max(len(tap) - kept, 1)) if kept < len(tap) else ordered[-1]
                parts += [ordered[:kept].to(self.dtype), rest.to(self.dtype), classes[:kept].to(torch.int16)]
            else:
                parts.append(tap.to(self.dtype))
        if not all(part.isfinite().all() for part in parts):
            raise UserError(f"{self.records}: scores that are not finite in {self.about['dtype']}; expected "
                            f"{'--dtype float32' if self.dtype is torch.float16 else 'a teacher with finite scores'}")
        return b"".join(part.contiguous().numpy().tobytes() for part in parts)

    def _unpacked(self, record: np.ndarray) -> Tensor:
        data, area = torch.from_numpy(np.array(record)), self.height * self.width
        if not self.top_k:
            return data.view(self.dtype).view(-1, self.height, self.width)
        taps, start = [], 0
        for classes in self.taps.values():
            kept, parts = min(self.top_k, classes), []
            for rows, dtype in ((kept, self.dtype), (1, self.dtype), (kept, torch.int16)):
                end = start + rows * area * dtype.itemsize
                parts.append(data[start:end].clone().view(dtype).view(rows, self.height, self.width))
                start = end
            values, rest, index = parts
            taps.append(rest.repeat(classes, 1, 1).scatter(0, index.long(), values))
        return torch.cat(taps)


def make_scores(folder: Path, name: str, about: Mapping[str, Any]) -> Scores:
    """Files for scores, or those that are there. UserError when these are of something else."""
    path = folder / f"{name}.json"
    about = {"format": FORMAT, **about}
    if path.exists():
        saved = _read(path)
        if said := difference(saved, about) or [f"another {key}" for key in about if saved[key] != about[key]]:
            raise UserError(f"{path}: scores of something else ({said[0]}); expected another folder",
                            settings=["teacher_scores"])
    else:
        write_json(path, about)
    return Scores(folder, name, about)


def open_scores(folder: Path, name: str, expected: Mapping[str, Any]) -> Scores:
    """The finished scores of a training set. expected: the entries of "about" that say whose they are. UserError when
    they are of another teacher or other images, or not all there."""
    saved = _read(folder / f"{name}.json")
    if said := difference(saved, expected):
        raise UserError(f"{folder / name}.json: {said[0]}; expected the folder that tools/cache_teacher.py has filled "
                        "for this run", settings=["teacher_scores"])
    scores = Scores(folder, name, saved)
    sizes = [path.stat().st_size if path.is_file() else 0 for path in (scores.records, scores.sums)]
    there = int(np.count_nonzero(scores._sums())) if sizes[1] else 0
    if there < scores.count or sizes != [scores.count * scores.size, 8 * scores.count]:
        raise UserError(f"{scores.records}: {there} of {scores.count} scores are there; {AGAIN}",
                        settings=["teacher_scores"])
    return scores


def _read(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; expected the folder of tools/cache_teacher.py",
                        settings=["teacher_scores"]) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected a file of tools/cache_teacher.py",
                        settings=["teacher_scores"]) from None
    kinds = {"teacher": dict, "data": dict, "crop": list, "images": int, "precision": str, "taps": dict, "size": list,
             "dtype": str, "top_k": int}
    if not isinstance(saved, dict) or saved.get("format") != FORMAT or saved.get("dtype") not in DTYPES \
            or not all(isinstance(saved.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"{path}: not a description of scores of this version; expected one of tools/cache_teacher.py",
                        settings=["teacher_scores"])
    return saved


def difference(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In words, why scores are not those that are wanted; nothing when they are."""
    found = []
    before, after = (f"with --teacher-taps {teacher['taps']}" if "taps" in teacher else "without --teacher-taps"
                     for teacher in (saved["teacher"], now["teacher"]))
    if before != after:
        found.append(f"scores of a teacher {before}, not {after}")
    elif saved["teacher"] != now["teacher"]:
        found.append("scores of another teacher ({name}, weights {weights})".format(**saved["teacher"])
                     + ", not of {name}, {weights}".format(**now["teacher"]))
    found += [f"scores of other data: {text}" for text in changes(saved["data"], now["data"])]
    if saved["precision"] not in ("float32", now["precision"]):
        found.append(f"scores of passes in {saved['precision']}, not in {now['precision']} (--teacher-precision)")
    if saved["crop"] != now["crop"]:
        found.append(f"scores of crops of {'x'.join(map(str, saved['crop']))}, not {'x'.join(map(str, now['crop']))}")
    return found
