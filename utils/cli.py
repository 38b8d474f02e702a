"""Command line: one parser class and one wrapper for every program of the repository.

* both spellings of every option (``--rand-mask``, ``--rand_mask``), booleans that work, no abbreviations;
* wrong input is one line on stderr and exit code 2, without usage text and without a traceback; when all processes
  under ``torchrun`` find the same fault, one of them says so.

    def main(argv: list[str] | None = None) -> int | None:
        parser = ArgumentParser(prog="train_kd.py", description="...")
        ...
        return 0

    if __name__ == "__main__":
        sys.exit(run_main(main))
"""
from __future__ import annotations

import argparse
import difflib
import math
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn

from utils.errors import UserError

#: seconds to wait for the launcher's store before a message is written in any case
STORE_PATIENCE = 5.0
_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})


def parse_bool(text: str) -> bool:
    """'true', '1', 'yes', 'on' -> True; 'false', '0', 'no', 'off' -> False, in any case; else ArgumentTypeError."""
    word = text.strip().lower()
    if word not in _TRUE | _FALSE:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return word in _TRUE


def number(kind: type[int] | type[float], low: float | None = None, high: float | None = None,
           *, open_low: bool = False) -> Callable[[str], int | float]:
    """A ``type=`` for add_argument: a finite int or float in [low, high] (in (low, high] with ``open_low``)."""
    noun = "a whole number" if kind is int else "a number"
    limits = [] if low is None else [f"above {low:g}" if open_low else f"of at least {low:g}"]
    limits += [] if high is None else [f"of at most {high:g}"]
    expected = " ".join([noun, " and ".join(limits)]).strip()

    def convert(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        fits = value is not None and math.isfinite(value)
        fits = fits and (low is None or (value > low if open_low else value >= low))
        if not fits or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    convert.metavar = "N" if kind is int else "X"
    return convert


class BooleanAction(argparse.Action):
    """``--flag``, ``--flag true|false|1|0|yes|no`` and ``--no-flag``; made by `ArgumentParser.boolean`."""

    def __init__(self, option_strings: Sequence[str], dest: str, default: bool | None = False,
                 help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs="?", default=default, help=help, metavar="BOOL")

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        negated = option_string != self.option_strings[0]
        if negated and values is not None:
            raise argparse.ArgumentError(self, f"{option_string} takes no value, got {values!r}")
        try:
            value = not negated if values is None else parse_bool(values)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        setattr(namespace, self.dest, value)


class HelpFormatter(argparse.HelpFormatter):
    """Help in 110 columns with the default of every option that has one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=110)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        if not action.option_strings or action.nargs == 0 and not isinstance(action, BooleanAction):
            return text
        if default in (None, argparse.SUPPRESS, "", []) or "(default" in text:
            return text
        if isinstance(default, bool):
            shown = str(default).lower()
        elif isinstance(default, (list, tuple)):
            shown = " ".join(str(item) for item in default)
        else:
            shown = str(default)
        shown = shown.replace("%", "%%")  # argparse formats the help text with %
        return f"{text} (default: {shown})".strip()

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "N" if action.type is int else getattr(action.type, "metavar", action.dest.split("_")[-1].upper())

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0 or isinstance(action, BooleanAction):
            return ", ".join(action.option_strings) or super()._format_action_invocation(action)
        values = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {values}"


class ArgumentParser(argparse.ArgumentParser):
    """argparse with both spellings of every option, working booleans and one-line errors (exit code 2).

    Register options with dashes (``--rand-mask``); ``--rand_mask`` is then understood too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", HelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def boolean(self, group: argparse._ActionsContainer, flag: str, default: bool | None,
                help: str) -> argparse.Action:
        """Add ``flag`` (with dashes) to ``group``; it also gets a ``--no-...`` form unless it is one itself."""
        spellings = [flag] if flag.startswith("--no-") else [flag, f"--no-{flag[2:]}"]
        return group.add_argument(*spellings, action=BooleanAction, default=default, help=help)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse, after turning the underscores of known options into dashes."""
        given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._normalise(given), namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse; an unknown option is an error that names the closest known ones."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._suggestion(unknown)}")
        return parsed

    def format_help(self) -> str:
        """As argparse, with a short usage line: the groups below it list the options."""
        if self.usage is None and all(action.option_strings for action in self._actions):
            self.usage = "%(prog)s [options]"
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """One line on stderr, exit code 2."""
        _say(f"{self.prog}: error: {' '.join(message.split())}\n")
        self.exit(2)

    def _normalise(self, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        return [self._dashed(arg) for arg in args[:end]] + args[end:]

    def _dashed(self, arg: str) -> str:
        if not arg.startswith("--") or "_" not in arg:
            return arg
        name, equals, value = arg.partition("=")
        dashed = name.replace("_", "-")
        return dashed + equals + value if dashed in self._option_string_actions else arg

    def _suggestion(self, unknown: list[str]) -> str:
        names = [arg.partition("=")[0].replace("_", "-") for arg in unknown if arg.startswith("--")]
        known = list(self._option_string_actions)
        close = [match for name in names for match in difflib.get_close_matches(name, known, n=1, cutoff=0.7)]
        return f" (did you mean {', '.join(dict.fromkeys(close))}?)" if close else ""


def run_main(main: Callable[[list[str] | None], int | None], argv: list[str] | None = None, *,
             prog: str | None = None) -> int:
    """Run a program and return its exit code, for ``sys.exit(run_main(main))``.

    UserError becomes one line on stderr and code 2, Ctrl-C code 130; other exceptions are defects and pass through.
    """
    prog = prog or os.path.basename(sys.argv[0])
    try:
        return main(argv) or 0
    except UserError as error:
        _say(f"{prog}: error: {_message(error)}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"{prog}: interrupted\n")
        return 130
    except RuntimeError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not _is_lost_connection(error):
            raise
        _say(f"{prog}: another process failed; its message is above or below\n")
        return 2


def _say(line: str) -> None:
    """Write a line to stderr, unless another process of this machine has written the same one."""
    if _is_first(line):
        sys.stderr.write(line)


def _is_first(line: str) -> bool:
    """True for the first of the processes that ``torchrun`` started on this machine with this line, and when in doubt.

    They count in the launcher's store, which outlives them and is there before any process group. Nobody waits, and a
    line that only one process has is its first.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import TCPStore  # the command line itself needs no torch

    patience = timedelta(seconds=STORE_PATIENCE)
    run = [os.environ.get(name, "") for name in ("TORCHELASTIC_RESTART_COUNT", "GROUP_RANK")]
    try:
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=patience)
        return store.add(f"said/{'/'.join(run)}/{line}", 1) == 1
    except (KeyError, ValueError, RuntimeError):  # no store any more
        return True


def _is_lost_connection(error: RuntimeError) -> bool:
    """What gloo and NCCL raise in a process whose partner has gone."""
    text = str(error).lower()
    return any(words in text for words in ("connection closed by peer", "connection reset", "broken pipe",
                                           "remote process exited", "socket closed"))


def _message(error: UserError) -> str:
    """The message in one line; that of a loading process comes wrapped in its traceback, of which the end counts."""
    text = str(error)
    if text.startswith("Caught UserError in "):
        text = text.rsplit("UserError: ", 1)[-1]
    return " ".join(text.split())
