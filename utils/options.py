"""Typed settings. A frozen dataclass states default, help and limits of each setting once; flags derive from it.

    @dataclass(frozen=True)
    class Options(OptionGroup):
        kd_temperature: float = option(1.0, "softmax temperature of the logits", above=0)

The name of the field is the name of the setting everywhere: ``--kd-temperature`` on the command line, a key of presets,
of the saved configuration and of training states. ``utils.cli`` makes the flags.
"""
from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

from utils.errors import UserError


@dataclass(frozen=True)
class Option:
    """One setting.

    kind: type of a value. nargs: None for a single value, a number or "+" for a tuple of them, "append" for a flag that
    may be repeated. default: MISSING for a setting that must be given. above, at_least, at_most: limits of numbers.
    choices: allowed values. metavar: stand-in for the value in the help. aliases: other names of the flag. hidden: not
    in the help."""

    name: str
    kind: type
    nargs: int | str | None
    default: Any
    help: str = ""
    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] | None = None
    metavar: str | tuple[str, ...] | None = None
    aliases: tuple[str, ...] = ()
    hidden: bool = False

    @property
    def expected(self) -> str:
        """The values that are allowed, in words: "a number above 0 and of at most 1"."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.kind not in (int, float):
            return {bool: "true or false"}.get(self.kind, "text")
        limits = [] if self.above is None else [f"above {self.above:g}"]
        limits += [] if self.at_least is None else [f"of at least {self.at_least:g}"]
        limits += [] if self.at_most is None else [f"of at most {self.at_most:g}"]
        return " ".join(["a whole number" if self.kind is int else "a number", " and ".join(limits)]).strip()

    def allows(self, value: Any) -> bool:
        """Whether a single value (not a tuple) is within the limits."""
        if self.choices:
            return value in self.choices
        if self.kind not in (int, float):
            return True
        return (math.isfinite(value) and (self.above is None or value > self.above)
                and (self.at_least is None or value >= self.at_least)
                and (self.at_most is None or value <= self.at_most))

    def check(self, value: Any) -> None:
        """`UserError` unless the value, or each of a tuple, is allowed; None is, where it is the default."""
        if value is None and self.default is None:
            return
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if not self.allows(item):
                raise UserError(f"{self.name.replace('_', ' ')} {item!r}: expected {self.expected}",
                                settings=[self.name])


def flag(name: str) -> str:
    """The command-line flag of a setting: kd_temperature -> --kd-temperature."""
    return "--" + name.replace("_", "-")


def option(default: Any, help: str | Callable[[], str] = "", **more: Any) -> Any:
    """A field of an :class:`OptionGroup`. more: fields of :class:`Option`.

    Each may be a function, asked when it is needed. nargs is needed only where the annotation does not
    say it: ``tuple[int, int]`` takes two values, ``tuple[int, ...]`` one or more."""
    return field(default=default, metadata={"option": {"help": help, **more}})


@dataclass(frozen=True)
class OptionGroup:
    """Base of every group of settings: values are checked against their limits, however an object is made."""

    def __post_init__(self) -> None:
        for one in options_of(type(self)):
            one.check(getattr(self, one.name))


def options_of(group: type[OptionGroup]) -> tuple[Option, ...]:
    """The settings of a group, in the order of their fields (inherited ones first)."""
    return tuple(Option(*fixed, **{key: value() if callable(value) else value for key, value in more.items()})
                 for *fixed, more in _described(group))


@cache
def _described(group: type[OptionGroup]) -> tuple[tuple[str, type, int | str | None, Any, dict[str, Any]], ...]:
    """The arguments of the group's :class:`Option` objects, functions not yet asked: type hints take long to read."""
    hints = typing.get_type_hints(group)
    return tuple(_describe(f.name, hints[f.name], f.default, dict(f.metadata["option"]))
                 for f in fields(group) if "option" in f.metadata)


def _describe(name: str, hint: Any, default: Any,
              known: dict[str, Any]) -> tuple[str, type, int | str | None, Any, dict[str, Any]]:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    nargs = known.pop("nargs", None)
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        hint, nargs = parts[0], nargs or ("+" if parts[-1] is Ellipsis else len(parts))
    return name, hint, nargs, default, known
