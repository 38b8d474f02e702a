"""What the folder of a run, its ``--save-dir``, holds."""
from __future__ import annotations

from pathlib import Path

from models.weight_files import is_given
from utils.errors import UserError


def config_of(folder: Path, flag: str = "", instead: str = "") -> Path:
    """The configuration in the folder of a run. flag: what named it, instead: what else it might have been, for
    messages. UserError when there is not exactly one."""
    found = sorted(folder.glob("*_config.json"))
    if len(found) != 1:
        held = ", ".join(path.name for path in found) or "none"
        if not folder.is_dir():
            held = "no folder, but a file" if folder.exists() else "no such folder"
        raise UserError(f"{flag} {folder}: expected the --save-dir of one run, with its kd_..._config.json"
                        f"{instead} ({held})".strip())
    return found[0]


def weights_of(config: Path, which: str, last: str = "--weights last") -> Path:
    """The best or the last weights of the run with a configuration. last: how a caller names the last ones, for the
    UserError when there are no best ones."""
    stem = config.name.removesuffix("_config.json")
    path = config.with_name(f"{stem}{'_best_model' if which == 'best' else ''}.pth")
    if not path.is_file():
        other = f"; a run without validation has only {last.format(stem=stem)}" if which == "best" else ""
        raise UserError(f"{config.parent}: no {path.name}; expected the weights of a finished run{other}")
    return path


def weights_file(source: str | None, flag: str) -> str | None:
    """A weights file as it is named; of the folder of a run its best weights. flag: what named it, for messages."""
    if not is_given(source) or not (folder := Path(source).expanduser()).is_dir():
        return source
    return str(weights_of(config_of(folder, flag, ", or a weights file"), "best", "{stem}.pth: name that"))
