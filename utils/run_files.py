"""Where a run keeps its files, and what happens to those of an earlier run in the same folder."""
from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Collection
from pathlib import Path

from utils.checkpoint import versions
from utils.config import DEAD_OPTIONS, needs_teacher
from utils.files import write_json
from utils.logger import LOG


class RunFiles:
    """File names of a run: the reference's for the weights, beside them the training state and the configuration."""

    def __init__(self, config: argparse.Namespace) -> None:
        self.directory, self.log_directory = Path(config.save_dir), Path(config.log_dir)
        self.stem = f"kd_{config.student_model}_{config.student_backbone}_{config.dataset}"
        teacher = f"{config.teacher_model}-{config.teacher_backbone}" if needs_teacher(config) else "none"
        student = f"{config.student_model}-{config.student_backbone}"
        self.log_name = f"{config.method or 'afdcd'}_{teacher}_{student}_{config.dataset}"
        self.student = self.directory / f"{self.stem}.pth"
        self.best = self.directory / f"{self.stem}_best_model.pth"
        self.state = self.directory / f"{self.stem}_state.pth"
        self.config = self.directory / f"{self.stem}_config.json"
        self.text_log = self.log_directory / f"{self.log_name}_log.txt"

    def resume_from(self, choice: str | None) -> Path | None:
        """The training state that ``--resume`` means; None to start afresh ('auto' with nothing there)."""
        if choice is None:
            return None
        if choice != "auto":
            return Path(choice).expanduser()
        return self.state if self.state.is_file() else None

    def holds(self, choice: str | None) -> bool:
        """True when ``--resume choice`` goes on with a run of this very folder."""
        path = self.resume_from(choice)
        return path is not None and path.parent.resolve() == self.directory.resolve()

    def set_aside(self) -> None:
        """Move the weights, state, configuration and log of an earlier run into ``previous-N/``: nothing is lost."""
        for directory, pattern in ((self.directory, f"{self.stem}*.*"), (self.log_directory, f"{self.log_name}*")):
            old = sorted(p for p in directory.glob(pattern)) if directory.is_dir() else []
            if not old:
                continue
            number = 1
            while (directory / f"previous-{number}").exists():
                number += 1
            target = directory / f"previous-{number}"
            target.mkdir()
            for path in old:
                path.rename(target / path.name)
            LOG.info("%s held an earlier run: its %d files are now in %s", directory, len(old), target)

    def save_config(self, config: argparse.Namespace, world_size: int) -> None:
        """Write every effective setting, the command line and the versions beside the weights."""
        write_json(self.config, {"config": plain(config), "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
                                 "processes": world_size, "versions": versions()})


def plain(config: argparse.Namespace) -> dict:
    """A configuration as JSON values (tuples become lists)."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in sorted(vars(config).items())}


def readable(config: argparse.Namespace) -> str:
    """Every effective setting as ``name=value``, in indented lines of at most 120 columns."""
    pairs = [f"{k}={' '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in plain(config).items()
             if k not in DEAD_OPTIONS]
    protected = "  ".join(pair.replace(" ", "\0") for pair in pairs)
    lines = textwrap.wrap(protected, 116, break_long_words=False, break_on_hyphens=False)
    return "\n".join("    " + line.replace("\0", " ") for line in lines)


#: settings that may differ between a run and its continuation without changing the result
FREE_TO_CHANGE = frozenset((
    "resume", "workers", "data", "save_dir", "log_dir", "log_iter", "save_per_iters", "val_per_iters", "skip_val",
    "tensorboard", "panels", "local_rank", "no_cuda", "teacher_pretrained", "teacher_pretrained_base",
    "student_pretrained", "student_pretrained_base"))


def changed_settings(saved: dict, config: argparse.Namespace, finished: Collection[str] = ()) -> list[str]:
    """'name: old -> new' for every setting that matters and differs from the saved run.

    finished: options of a stage that a resumed run does not repeat.
    """
    now = plain(config)
    return [f"{k}: {saved.get(k)} -> {now[k]}" for k in now
            if k in saved and saved[k] != now[k] and k not in FREE_TO_CHANGE and k not in finished]
