"""A run repeats from its own file: ``--config`` and the ``…_config.json`` that every run leaves in its folder."""
from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.presets import preset
from engine.recipe import ADAMW, without_recipe
from engine.run_folder import config_of
from losses.core import methods
from utils.cli import ArgumentParser
from utils.errors import UserError, did_you_mean
from utils.options import Option

CONFIG_HELP = ("the settings of an earlier run, from its …_config.json or its folder; flags override them. Folders, "
               "--results and --resume are not taken from it: the run begins anew, by default in FOLDER-repeat")
#: where a run writes and what it goes on from: not taken over
OWN = ("name", "save_dir", "log_dir", "results", "resume", "local_rank")
#: how a setting of text spells "nothing"
NOTHING = (None, "None")


def check_registered(saved: Mapping[str, Any], where: object) -> None:
    """UserError when the settings of a run name a method, or weigh a term, that no file here has registered.

    where: names them in the message."""
    weights = [term.setting for cls in methods().values() for term in cls.terms]
    terms = [name for name, value in saved.items() if name.startswith("lambda_") and value and name not in weights]
    what = f"the method of its term {terms[0].removeprefix('lambda_')!r}" if terms else ""
    if saved.get("method") not in (None, "none", *methods()):
        what = f"method {saved['method']!r}"
    if what:
        raise UserError(f"{where}: {what} is not registered here: start the program from a file that imports it "
                        "(docs/package.md, Own code)")


def repeated(parser: ArgumentParser, argv: Sequence[str] | None, path: Path) -> tuple[Namespace, frozenset[str]]:
    """The settings of a command line on top of those of a saved configuration, and which of these stay what they were.

    Another ``--method`` than the file's brings its preset; what the preset of the file's method sets is then dropped.
    parser: of ``train_kd.py``; its defaults are changed. UserError for a file that is missing, cannot be read, has a
    setting that does not exist, or a value that is not allowed."""
    path = path.expanduser()
    path = config_of(path, "--config") if path.is_dir() else path
    saved, given = _read(path, parser.options), parser.given(argv)
    parser.set_defaults(**{**without_recipe(), **saved})
    parsed = parser.parse_args(argv)
    before = saved.get("method")
    if parsed.method != before:
        rest = preset(before, parsed.dataset, parsed.student_backbone) if before else {}
        fresh = preset(parsed.method, parsed.dataset, parsed.student_backbone) if parsed.method else {}
        parser.set_defaults(**{**{name: _default(parser.options[name]) for name in rest}, **fresh}, scale_weights=None)
    if parsed.optimizer != saved.get("optimizer", "sgd"):  # whose values do not fit this one
        usual = {name: _default(parser.options[name]) for name in ADAMW}
        published = preset(parsed.method, parsed.dataset, parsed.student_backbone) if parsed.method else {}
        parser.set_defaults(**{name: published.get(name, value) for name, value in usual.items()})
        saved = {name: value for name, value in saved.items() if name not in ADAMW}
    if "max_iterations" in given:  # in place of the file's epochs
        parser.set_defaults(epochs=None)
    if not given & {"name", "save_dir"}:
        folder = path.resolve().parent
        parser.set_defaults(save_dir=str(folder.with_name(f"{folder.name}-repeat")))
    parsed = parser.parse_args(argv)
    if not given & {"name", "log_dir"}:
        parsed.log_dir = parsed.save_dir
    return parsed, frozenset(saved)


def _default(one: Option) -> Any:
    return list(one.default) if isinstance(one.default, tuple) else one.default


def _read(path: Path, options: Mapping[str, Option]) -> dict[str, Any]:
    """{setting: value} of a file, without those in OWN."""
    try:
        saved = dict(json.loads(path.read_text(encoding="utf-8"))["config"])
    except FileNotFoundError:
        raise UserError(f"--config {path}: not found; expected the kd_..._config.json of a run, or its folder"
                        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else error
        raise UserError(f"--config {path}: not a configuration that a run has written ({reason})") from error
    check_registered(saved, f"--config {path}")
    for name, value in saved.items():
        if name in OWN:
            continue
        if name not in options:
            raise UserError(f"--config {path}: there is no setting '{name}'{did_you_mean(name, options)}")
        if not _fits(options[name], value):
            raise UserError(f"--config {path}: {name} is {json.dumps(value)}; expected {_expected(options[name])}")
    return {name: value for name, value in saved.items() if name not in OWN}


def _fits(one: Option, value: Any) -> bool:
    """Whether a value from a file is of the kind of a setting and within its limits."""
    if value is None:
        return one.default in NOTHING
    if isinstance(value, list) != (one.nargs is not None):
        return False
    kinds = (int, float) if one.kind is float else one.kind
    return all(isinstance(item, kinds) and isinstance(item, bool) == (one.kind is bool) and one.allows(item)
               for item in (value if one.nargs is not None else [value]))


def _expected(one: Option) -> str:
    nothing = ", or null" if one.default in NOTHING else ""
    return f"{'a list, each ' if one.nargs is not None else ''}{one.expected}{nothing}"
