"""The settings of a run, and the checks of them that need no files. The command line is parsed here and ends here: what
goes on is a :class:`Settings`.
"""
from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from engine.class_map import read_class_map
from engine.options import (
    GROUPS,
    Data,
    Distillation,
    Networks,
    Optimization,
    Running,
    Speed,
    without_teacher,
)
from engine.presets import preset
from engine.recipe import Recipe, check_recipe, recipe_defaults
from engine.saved import CONFIG_HELP, check_registered, repeated
from engine.unlabelled import check_readers
from losses.core import methods
from losses.core.distiller import Distiller
from losses.core.objective import active_methods
from models import (
    brings_weights,
    check_described,
    described_network,
    is_outside,
    network_name,
)
from utils.cli import ArgumentParser, read_options
from utils.errors import UserError
from utils.extras import need
from utils.options import Option, OptionGroup, flag, options_of


@dataclass(frozen=True)
class Settings:
    """Everything that a run was asked for.

    weights: {term: lambda} of every term of every method. options: {method: its Options}, of every method.
    list_methods, list_taps: only print the table of methods, or the maps of the networks. given: the settings that the
    command line named, none when the settings come from elsewhere; no part of saved configurations.
    """

    networks: Networks
    data: Data
    optimization: Optimization
    recipe: Recipe
    distillation: Distillation
    speed: Speed
    running: Running
    weights: Mapping[str, float]
    options: Mapping[str, OptionGroup]
    list_methods: bool = False
    list_taps: bool = False
    given: frozenset[str] = frozenset()

    @property
    def active(self) -> dict[str, float]:
        """{term: weight} of the terms that count."""
        return {name: weight for name, weight in self.weights.items() if weight}

    @property
    def methods(self) -> dict[str, type[Distiller]]:
        """The methods of which a term counts, by name."""
        return active_methods(self.active)

    @property
    def needs_teacher(self) -> bool:
        """Whether a method with a weight reads a teacher."""
        return any(cls.needs.teacher for cls in self.methods.values())

    @property
    def method_options(self) -> dict[str, OptionGroup]:
        """The options that each method is built with: those asked for, but for what its data set fixes."""
        return {name: replace(self.options[name], **cls.dataset_options.get(self.data.dataset, {}))
                for name, cls in methods().items()}

    def flat(self) -> dict[str, object]:
        """{setting: value}, sorted by name: the form of saved configurations and training states."""
        values = {f"lambda_{term}": weight for term, weight in self.weights.items()}
        groups = (self.networks, self.data, self.optimization, self.recipe, self.distillation, self.speed,
                  self.running, *self.options.values())
        for group in groups:
            values.update(asdict(group))
        return dict(sorted(values.items()))

    @property
    def run_name(self) -> str:
        """Method, teacher if there is one, student and data set: the name of the log, and of the default folder."""
        n, method = self.networks, self.distillation.method or "afdcd"
        teacher = [network_name(n.teacher_model, n.teacher_backbone, "-")] if self.needs_teacher else []
        return "_".join(["plain" if method == "none" else method, *teacher,
                         network_name(n.student_model, n.student_backbone, "-"), self.data.dataset])

    def with_folders(self) -> Settings:
        """The same settings with folders for weights and log: those asked for, or ``runs/NAME``. UserError where a name
        and a folder are asked for."""
        r = self.running
        if r.name and r.save_dir:
            raise UserError("--name says where the run's folder is, and so does --save-dir: expected one of them")
        folder = r.save_dir or str(Path("runs") / (r.name or self.run_name))
        return replace(self, running=replace(r, save_dir=folder, log_dir=r.log_dir or folder))

    def with_preset(self, method: str) -> Settings:
        """The same settings with the published ones of another method in their place."""
        values = {**self.flat(), **preset(method, self.data.dataset, self.networks.student_backbone)}
        return from_flat({**values, "method": method})


def build_parser() -> ArgumentParser:
    """The parser of ``train_kd.py``, with the options of every registered method."""
    parser = ArgumentParser(prog="train_kd.py", description="Train a segmentation network, distilled or plain.")
    for title, group in GROUPS:
        about = "Terms combine freely; a term with weight 0 is not computed." if group is Distillation else None
        section = parser.add_argument_group(title, about)
        parser.add_options(section, group)
        if group is Running:
            section.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
        if group is Distillation:
            section.add_argument("--list-methods", action="store_true",
                                 help="print every method with its preset and what it adds to the given networks, and "
                                      "stop")
            section.add_argument("--list-taps", action="store_true",
                                 help="print the maps of both networks and the submodules that could be taps, and stop")
            _add_methods(parser, section)
    return parser


def default_settings() -> Settings:
    """Those of a command line without flags."""
    return _default_settings(tuple(methods().items()))


@cache
def _default_settings(registered: tuple[tuple[str, type[Distiller]], ...]) -> Settings:
    """With the options of these methods."""
    return from_flat(vars(build_parser().parse_args([])))


def _add_methods(parser: ArgumentParser, section) -> None:
    """The weight of every term, and a group of flags for every method with options that no other has declared."""
    for cls in methods().values():
        for term in cls.terms:
            parser.add_option(section, Option(term.setting, float, None, term.weight, term.help, at_least=0,
                                              at_most=1 if term.scales_task else None, metavar="W"))
    for name, cls in methods().items():
        if any(flag(one.name) not in parser._option_string_actions for one in options_of(cls.Options)):
            parser.add_options(parser.add_argument_group(f"method {name}", cls.title), cls.Options)


def parse_settings(argv: list[str] | None = None) -> Settings:
    """Parse and check a command line. Explicit flags win over the preset of ``--method``, which wins over defaults; or
    over what the file of ``--config`` says (see :func:`engine.saved.repeated`).

    Exits with code 2 and one line on a malformed command line; raises :class:`UserError` on settings that cannot be.
    """
    parser = build_parser()
    parsed = parser.parse_args(argv)
    given, kept = parser.given(argv), frozenset()
    if parsed.config is not None:
        parsed, kept = repeated(parser, argv, Path(parsed.config))
    elif parsed.method is not None:
        parser.set_defaults(**preset(parsed.method, parsed.dataset, parsed.student_backbone))
        parsed = parser.parse_args(argv)
    settings = replace(from_flat({**vars(parsed), **recipe_defaults(vars(parsed), given, kept)}), given=given | kept)
    if "teacher_classes" in given:  # else what an earlier run has read
        path = settings.networks.teacher_classes
        settings = replace(settings, networks=replace(settings.networks, class_map=path and read_class_map(path)))
    lists = settings.list_methods or settings.list_taps
    if not lists:
        check_settings(settings)
    networks = settings.networks.with_files(fetch=not lists)
    if settings.needs_teacher or lists:
        networks = with_described_teacher(networks, given)
    return replace(settings, networks=networks).with_folders()


def with_described_teacher(networks: Networks, given: Collection[str]) -> Networks:
    """The same with the teacher that the JSON file beside its weights names. given: the settings of the command line;
    UserError where they name another one."""
    said = described_network(networks.teacher_pretrained, networks.teacher_model, "teacher_")
    known = {f"teacher_{key}": value for key, value in said.items() if f"teacher_{key}" not in given}
    networks = replace(networks, **known)
    check_described(networks.teacher, said, "teacher_")
    return networks


def check_one_method(argv: list[str] | None) -> None:
    """UserError for a command line that names several methods, as ``--method kd --method cwd`` or ``kd+cwd``."""
    reader = ArgumentParser(prog="train_kd.py", add_help=False)
    reader.add_argument("--method", action="append", default=[])
    words = reader.parse_known_args(argv)[0].method
    names = dict.fromkeys(name for word in words for name in re.split(r"[+,\s]+", word))
    if len(names) > 1 and all(name in ("none", *methods()) for name in names):
        weights = [flag(term.setting) for name in names if name in methods() for term in methods()[name].terms]
        raise UserError(f"--method {' --method '.join(words)}: expected one (a script of a published row brings "
                        f"its own); what else is to count gets a weight: {', '.join(weights)}")


def from_flat(values: Mapping[str, object]) -> Settings:
    """Settings from {setting: value} of all of them: the inverse of :meth:`Settings.flat`."""
    groups = [read_options(values, group) for _, group in GROUPS]
    weights = {t.name: float(values[t.setting]) for cls in methods().values() for t in cls.terms}
    options = {name: read_options(values, cls.Options) for name, cls in methods().items()}
    return Settings(*groups, weights, options, bool(values.get("list_methods", False)),
                    bool(values.get("list_taps", False)))


def from_saved(saved: Mapping[str, object], where: object) -> Settings:
    """Settings from those that a run has written; those that are newer than it have their defaults. where: names their
    file in the UserError for settings of another version, or of a method that is not registered here."""
    if not isinstance(saved, Mapping):
        raise UserError(f"{where}: not a configuration of a run of this version (expected a table of settings)")
    check_registered(saved, where)
    try:
        return from_flat({**default_settings().flat(), **saved})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: not a configuration of a run of this version ({error})") from error


def given_teacher_flags(settings: Settings) -> list[str]:
    """Flags of the teacher that the command line or a script has set to something."""
    default, given = asdict(Networks()), asdict(settings.networks)
    return [flag(name) for name, value in given.items()
            if name.startswith("teacher_") and value not in (None, default[name])]


def unread(settings: Settings) -> frozenset[str]:
    """The settings that nothing in a run reads: of the teacher, of methods and of hard pixels, where it has none. The
    cross entropy reads ``group_size`` in any run."""
    owners: dict[str, set[str]] = {}
    for name, cls in methods().items():
        for one in options_of(cls.Options):
            owners.setdefault(one.name, set()).add(name)
    names = {name for name, of in owners.items() if not of & settings.methods.keys()}
    if not settings.methods:
        names.add("compat")
    if not settings.recipe.ohem:
        names |= {"ohem_threshold", "ohem_kept"}
    if not settings.needs_teacher:
        names |= {name for name in asdict(settings.networks) if name.startswith("teacher_")}
    return frozenset(names)


def ineffective_options(settings: Settings) -> list[str]:
    """Flags of methods and of hard pixels that the command line has set to something and nothing reads."""
    default, now = default_settings().flat(), settings.flat()
    return [flag(name) for name in sorted(unread(settings) & settings.given)
            if not name.startswith("teacher_") and now[name] != default[name]]


def ineffective_backbones(settings: Settings) -> list[str]:
    """What to say of a backbone that was asked for beside a network from elsewhere, which has its own."""
    default, now = asdict(Networks()), asdict(settings.networks)
    return [f"{flag(f'{role}_backbone')} {backbone} has no effect on the network: {model} brings its own"
            for role in ("student", "teacher") if is_outside(model := now[f"{role}_model"])
            and (backbone := now[f"{role}_backbone"]) not in ("", default[f"{role}_backbone"])]


def check_settings(settings: Settings) -> None:
    """Raise UserError for settings that contradict each other."""
    method, distills = settings.distillation.method, bool(settings.methods)
    if method == "none" and distills:
        raise UserError("--method none trains without a teacher: drop "
                        f"{', '.join(flag(f'lambda_{term}') for term in settings.active)}, or choose a method")
    if method != "none" and not distills:
        raise UserError("every --lambda-* is 0, so nothing would be distilled: use --method none for plain training")
    if settings.needs_teacher and settings.networks.teacher_pretrained is None \
            and not brings_weights(settings.networks.teacher_model):
        names = [name for name, cls in settings.methods.items() if cls.needs.teacher]
        raise UserError(f"--teacher-pretrained is missing: a trained teacher (a .pth or .safetensors file) for "
                        f"{', '.join(names)}; "
                        f"without one: {', '.join(f'--method {name}' for name in ('none', *without_teacher()))}")
    check_recipe(settings)
    check_readers(settings, settings.methods)
    if settings.running.tracker is not None:
        need(settings.running.tracker, settings.running.tracker)
    o = settings.optimization
    if o.min_lr > o.lr:
        raise UserError(f"--min-lr {o.min_lr:g} is above --lr {o.lr:g}: expected at most that (a method's preset may "
                        "have set it; --min-lr 0 takes it back)")
    if o.nesterov and not o.momentum:
        raise UserError("--nesterov needs a --momentum above 0")
    height, width = settings.data.crop_size
    if min(height, width) < 32:
        raise UserError(f"--crop-size {height} {width}: expected at least 32 pixels a side")
