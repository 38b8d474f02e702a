"""Where a run keeps its files, and what happens to those of an earlier run in the same folder."""
from __future__ import annotations

import textwrap
from contextlib import suppress
from itertools import count
from pathlib import Path

from engine.log import LOG
from engine.settings import DEAD_OPTIONS, Settings
from models import network_name
from utils.files import remove_leftovers


class RunFiles:
    """File names of a run: the reference's for the weights, beside them the training state and the configuration.

    resume_from: the training states that ``--resume`` means, the best first; none to start afresh ('auto' with nothing
    there).
    """

    def __init__(self, settings: Settings) -> None:
        n, dataset = settings.networks, settings.data.dataset
        self.directory, self.log_directory = Path(settings.running.save_dir), Path(settings.running.log_dir)
        self.stem = f"kd_{network_name(n.student_model, n.student_backbone)}_{dataset}"
        teacher = network_name(n.teacher_model, n.teacher_backbone, "-") if settings.needs_teacher else "none"
        student = network_name(n.student_model, n.student_backbone, "-")
        self.log_name = f"{settings.distillation.method or 'afdcd'}_{teacher}_{student}_{dataset}"
        self.student = self.directory / f"{self.stem}.pth"
        self.best = self.directory / f"{self.stem}_best_model.pth"
        self.state = self.directory / f"{self.stem}_state.pth"
        self.previous_state = self.directory / f"{self.stem}_state_previous.pth"
        self.replay = self.directory / f"{self.stem}_replay.pth"
        self.config = self.directory / f"{self.stem}_config.json"
        self.text_log = self.log_directory / f"{self.log_name}_log.txt"
        choice = settings.running.resume
        self.resume_from: list[Path] = [] if choice is None else [Path(choice).expanduser()]
        if choice == "auto":
            self.resume_from = self.states()

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
        """Move the weights, state, configuration and log of an earlier run into ``previous-N/``: nothing is lost."""
        for directory, pattern in ((self.directory, f"{self.stem}*.*"), (self.log_directory, f"{self.log_name}*")):
            old = sorted(p for p in directory.glob(pattern)) if directory.is_dir() else []
            if not old:
                continue
            target = next_folder(directory, "previous")
            for path in old:
                path.rename(target / path.name)
            LOG.info("%s held an earlier run: its %d files are now in %s", directory, len(old), target)


def next_folder(directory: Path, name: str) -> Path:
    """Make the first of name-1, name-2, … that is not there; others may be doing the same."""
    for number in count(1):
        with suppress(FileExistsError):
            (directory / f"{name}-{number}").mkdir()
            return directory / f"{name}-{number}"


def plain(settings: Settings) -> dict[str, object]:
    """{setting: value} as JSON values (tuples become lists)."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.flat().items()}


def readable(settings: Settings) -> str:
    """Every effective setting as ``name=value``, in indented lines of at most 120 columns."""
    pairs = [f"{k}={' '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in plain(settings).items()
             if k not in DEAD_OPTIONS]
    protected = "  ".join(pair.replace(" ", "\0") for pair in pairs)
    lines = textwrap.wrap(protected, 116, break_long_words=False, break_on_hyphens=False)
    return "\n".join("    " + line.replace("\0", " ") for line in lines)
