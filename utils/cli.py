"""Command line: one parser class and one wrapper for every program, ``sys.exit(run_main(main))``.

Flags, types and help derive from the dataclasses of ``utils/options.py``. Both spellings of every option work
(``--rand-mask``, ``--rand_mask``), abbreviations do not. Wrong input is one line on stderr and exit code 2, without a
traceback; when all processes under ``torchrun`` find the same fault, one of them says so.
"""
from __future__ import annotations

import argparse
import os
import re
import select
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

from utils.errors import UserError, did_you_mean, nearest
from utils.faults import allow_open_files, explained
from utils.options import Option, OptionGroup, flag, options_of

Group = TypeVar("Group", bound=OptionGroup)

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


def _converter(one: Option) -> Callable[[str], Any]:
    """The ``type=`` of a numeric setting: a finite number within its limits, or ArgumentTypeError."""

    def convert(text: str) -> int | float:
        try:
            value = one.kind(text)
        except ValueError:
            value = None
        if value is None or not one.allows(value):
            raise argparse.ArgumentTypeError(f"expected {one.expected}, got {text!r}")
        return value

    convert.metavar = "N" if one.kind is int else "X"
    return convert


class BooleanAction(argparse.Action):
    """``--flag``, ``--flag true|false|1|0|yes|no`` and ``--no-flag``."""

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
        shown = str(default).lower() if isinstance(default, bool) else str(default)
        if isinstance(default, list):
            shown = " ".join(map(str, default))
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

    Register options with dashes (``--rand-mask``); ``--rand_mask`` is then understood too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", HelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self.options: dict[str, Option] = {}  # by name

    def add_options(self, group: argparse._ActionsContainer, settings: type[OptionGroup]) -> None:
        """Add a flag for every setting of a dataclass that this parser does not have yet."""
        for one in options_of(settings):
            if flag(one.name) not in self._option_string_actions:
                self.add_option(group, one)

    def add_option(self, group: argparse._ActionsContainer, one: Option) -> None:
        """Add the flag of one setting."""
        self.options[one.name] = one
        spellings = [flag(one.name), *map(flag, one.aliases)]
        help = argparse.SUPPRESS if one.hidden else one.help
        if one.kind is bool:
            spellings += [] if one.name.startswith("no_") else [f"--no-{spellings[0][2:]}"]
            group.add_argument(*spellings, action=BooleanAction, default=one.default, help=help)
            return
        many = {"action": "append"} if one.nargs == "append" else {"nargs": one.nargs}
        kind = _converter(one) if one.kind in (int, float) else one.kind
        required = one.default is MISSING
        default = None if required else list(one.default) if isinstance(one.default, tuple) else one.default
        group.add_argument(*spellings, type=kind, choices=one.choices, metavar=one.metavar, required=required,
                           default=default, help=help, **many)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse, after turning the underscores of known options into dashes."""
        given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._normalize(given), namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse; an unknown option is an error that names the closest known ones."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._suggestion(unknown)}")
        return parsed

    def given(self, args: Sequence[str] | None = None) -> frozenset[str]:
        """The settings that a command line names, whatever their defaults."""
        unset = object()
        parsed = self.parse_args(args, argparse.Namespace(**{action.dest: unset for action in self._actions}))
        return frozenset(name for name, value in vars(parsed).items() if value is not unset)

    def format_help(self) -> str:
        """As argparse, with a short usage line: the groups below it list the options."""
        if self.usage is None and all(action.option_strings for action in self._actions):
            self.usage = "%(prog)s [options]"
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """One line on stderr, exit code 2."""
        say(f"{self.prog}: error: {' '.join(message.split())}\n")
        self.exit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            near = did_you_mean(str(value), map(str, action.choices or ()))
            raise argparse.ArgumentError(action, f"{error.message}{near}") from None

    def _normalize(self, args: list[str]) -> list[str]:
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
        close = [match for name in names if (match := nearest(name, known))]
        return f" (did you mean {', '.join(dict.fromkeys(close))}?)" if close else ""


def read_options(values: Mapping[str, Any], settings: type[Group]) -> Group:
    """The settings of one dataclass from {setting: value}; lists become tuples."""
    own = {one.name: values[one.name] for one in options_of(settings)}
    return settings(**{name: tuple(v) if isinstance(v, list) else v for name, v in own.items()})


def parse_options(settings: type[Group], argv: Sequence[str] | None, *, prog: str, description: str) -> Group:
    """Parse a command line whose flags are the fields of one dataclass."""
    parser = ArgumentParser(prog=prog, description=description)
    parser.add_options(parser, settings)
    return read_options(vars(parser.parse_args(argv)), settings)


def run_main(main: Callable[[list[str] | None], int | None], argv: list[str] | None = None, *,
             prog: str | None = None) -> int:
    """Run a program and return its exit code, for ``sys.exit(run_main(main))``.

    UserError and what the machine has caused (``utils/faults.py``) become one line on stderr and code 2, Ctrl-C code
    130, a closed pipe the shell's 141; other exceptions are defects and pass through."""
    prog = prog or os.path.basename(sys.argv[0])
    allow_open_files()
    try:
        code = main(argv) or 0
        sys.stdout.flush()  # a reader that has gone shows here, not when the interpreter ends
        return code
    except UserError as error:
        say(f"{prog}: error: {describe_error(error)}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"{prog}: interrupted\n")
        return 130
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is written at the end
        return 141
    except Exception as error:
        line = explained(error)
        if line is None:
            raise
        say(f"{prog}: error: {line}\n")
        return 2


def _output_is_closed() -> bool:
    """Whether whoever reads our output, such as head, has gone."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def say(line: str) -> None:
    """Write a line to stderr, unless another process of this machine has written the same one."""
    if _is_first(line):
        sys.stderr.write(line)


def _is_first(line: str) -> bool:
    """True for the first of the processes that ``torchrun`` started on this machine with this line, and when in doubt.

    They count in the launcher's store, which outlives them and is there before any process group. Nobody waits, and a
    line that only one process has is its first."""
    store = launcher_store()
    run = [os.environ.get(name, "") for name in ("TORCHELASTIC_RESTART_COUNT", "GROUP_RANK")]
    try:
        return store is None or store.add(f"said/{'/'.join(run)}/{line}", 1) == 1
    except RuntimeError:  # no store any more
        return True


def launcher_store() -> Any:
    """The store of ``torchrun`` that the processes of all machines share; None without one."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import TCPStore  # the command line itself needs no torch

    patience = timedelta(seconds=STORE_PATIENCE)
    try:
        return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=patience)
    except (KeyError, ValueError, RuntimeError):  # no store any more
        return None


def describe_error(error: UserError) -> str:
    """The message in one line, with the flags of the settings that it speaks of and does not name.

    That of a loading process comes wrapped in its traceback, of which the end counts."""
    text = str(error)
    if text.startswith("Caught UserError in "):
        text = text.rsplit("UserError: ", 1)[-1]
    text = " ".join(text.split())
    flags = [flag(name) for name in error.settings if not re.search(rf"{flag(name)}(?![\w-])", text)]
    return f"{text} ({', '.join(flags)})" if flags else text
