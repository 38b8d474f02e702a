"""Where a run keeps its files, and what happens to those of an earlier run in the same folder."""
from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import count
from pathlib import Path

from engine.class_map import class_map_changes
from engine.layout import INDENT, fold
from engine.log import LOG
from engine.options import DEAD_OPTIONS
from engine.settings import Settings
from models import network_name
from utils.files import remove_leftovers


class RunFiles:
    """File names of a run: the reference's for the weights, beside them the training state and the configuration."""

    def __init__(self, settings: Settings) -> None:
        n, dataset = settings.networks, settings.data.dataset
        self.directory, self.log_directory = Path(settings.running.save_dir), Path(settings.running.log_dir)
        self.stem = f"kd_{network_name(n.student_model, n.student_backbone)}_{dataset}"
        self.log_name = self._earlier_log_name(settings) or settings.run_name
        self.student = self.directory / f"{self.stem}.pth"
        self.best = self.directory / f"{self.stem}_best_model.pth"
        self.state = self.directory / f"{self.stem}_state.pth"
        self.previous_state = self.directory / f"{self.stem}_state_previous.pth"
        self.replay = self.directory / f"{self.stem}_replay.pth"
        self.config = self.directory / f"{self.stem}_config.json"
        self.json_log = self.log_directory / f"{self.log_name}.jsonl"
        self.text_log = self.log_directory / f"{self.log_name}_log.txt"
        self._resume = settings.running.resume

    def _earlier_log_name(self, settings: Settings) -> str | None:
        """The name of a log that is there and was written by an earlier version, which put "none" for no teacher."""
        n, name = settings.networks, settings.run_name
        if settings.needs_teacher or (self.log_directory / f"{name}.jsonl").exists():
            return None
        earlier = f"{settings.distillation.method}_none_{n.student_model}-{n.student_backbone}_{settings.data.dataset}"
        return earlier if (self.log_directory / f"{earlier}.jsonl").exists() else None

    @cached_property
    def resume_from(self) -> list[Path]:
        """The training states that ``--resume`` means, the best first; none to start afresh ('auto' with nothing
        there). They are looked up when they are first asked for, which has to be when the folder is locked."""
        if self._resume == "auto":
            return self.states()
        return [] if self._resume is None else [Path(self._resume).expanduser()]

    @property
    def goes_on_here(self) -> bool:
        """True when ``--resume`` goes on with a run of this very folder."""
        return bool(self.resume_from) and self.resume_from[0].parent.resolve() == self.directory.resolve()

    def states(self) -> list[Path]:
        """The training states in the folder, the newest first."""
        return [path for path in (self.state, self.previous_state) if path.exists()]

    def set_damaged_aside(self) -> None:
        """Rename a newest state that cannot be read: the one before it must not be replaced by it."""
        if self.state.exists():
            self.state.replace(self.directory / f"{self.stem}_state_damaged.pth")

    def remove_leftovers(self) -> None:
        """Remove what killed runs have left half-written."""
        found = [*remove_leftovers(self.directory, self.stem), *remove_leftovers(self.log_directory, self.log_name)]
        if found:
            LOG.info("removed %d half-written files of a killed run in %s", len(found), found[0].parent)

    def set_aside(self) -> None:
        """Move the weights, state, configuration and log of an earlier run into ``previous-N/``, of the same number
        where weights and log have a folder each: nothing is lost."""
        held: dict[Path, list[Path]] = {}
        for directory, pattern in ((self.directory, f"{self.stem}*.*"), (self.log_directory, f"{self.log_name}*")):
            if old := sorted(directory.glob(pattern)):
                held.setdefault(directory.resolve(), []).extend(directory / path.name for path in old)
        if not held:
            return
        name = next_folders(list(held), "previous")
        for directory, old in held.items():
            for path in old:
                path.rename(directory / name / path.name)
        directories = dict.fromkeys(old[0].parent for old in held.values())
        LOG.info("%s held an earlier run: its %d files are now in %s/", " and ".join(map(str, directories)),
                 sum(map(len, held.values())), name)


def next_folders(directories: Sequence[Path], name: str) -> str:
    """The first of name-1, name-2, … that is in none of the directories, made in each; others may be doing the same."""
    for number in count(1):
        made: list[Path] = []
        try:
            for directory in directories:
                (directory / f"{name}-{number}").mkdir()
                made.append(directory / f"{name}-{number}")
            return f"{name}-{number}"
        except FileExistsError:
            for folder in made:
                folder.rmdir()


def plain(settings: Settings) -> dict[str, object]:
    """{setting: value} as JSON values (tuples become lists)."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.flat().items()}


def changed(name: str, before: object, now: object) -> str:
    """What happened to a setting: "lr: 0.01 -> 0.02"."""
    if name == "class_map":
        return f"--teacher-classes: {class_map_changes(before, now)}"
    return f"{name}: {before} -> {now}"


def readable(settings: Settings) -> str:
    """Every effective setting as ``name=value``, in indented lines."""
    return fold([INDENT + "every setting:", *(f"{name}={written(value)}" for name, value in plain(settings).items()
                                              if name not in DEAD_OPTIONS)])


def written(value: object) -> str:
    """A value as the command line takes it."""
    values = value if isinstance(value, list) else [value]
    return " ".join(f"{v:g}" if isinstance(v, float) else str(v).lower() if isinstance(v, bool) else str(v)
                    for v in values)
