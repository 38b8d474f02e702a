"""The table of ``train_kd.py --list-methods``: what every method reads, weighs and adds, for the networks asked for."""
from __future__ import annotations

import shutil
import textwrap
from dataclasses import dataclass

import torch

from dataset import get_dataset_spec
from engine.build import run_facts
from engine.class_map import class_map_of
from engine.presets import published
from engine.settings import Settings
from losses.core import Distiller, NetInfo, RunFacts, methods
from losses.core.objective import build_distillers
from models import NetworkChoice
from utils.cli import describe_error
from utils.errors import UserError
from utils.options import flag

WIDTHS = (10, 4, 10, 8, 17)  # method, year, parameters, state, taps; the preset takes the rest of the line
INDENT = " " * (WIDTHS[0] + 2)


@dataclass(frozen=True)
class MethodFacts:
    """One method as ``--method NAME`` would run it.

    All of it covers what the preset switches on of other methods too (KD, the discriminator of SKD). weights: {term:
    lambda}. settings: {setting: value}, what else the preset sets. parameters: how many numbers are trained beside the
    student. state: bytes of buffers and frozen parameters (queues, masks, networks). refused: why the method cannot run
    with these settings, "" when it can; the figures are then empty.
    """

    cls: type[Distiller]
    weights: dict[str, float]
    settings: dict[str, object]
    taps: str = ""
    parameters: int = 0
    state: int = 0
    refused: str = ""


def unallocated_network(choice: NetworkChoice, num_class: int) -> NetInfo:
    """Channels of a network that is never allocated, and whose weights are not read."""
    with torch.device("meta"):
        return NetInfo.of(choice.build_bare(num_class))


def method_facts(name: str, settings: Settings, student: NetInfo, teacher: NetInfo,
                 common: tuple[int, ...] | None = None) -> MethodFacts:
    """Build one method without memory and count what it adds. common: the classes that the teacher scores, None for
    all."""
    settings = settings.with_preset(name)
    others = published(name, settings.data.dataset, settings.networks.student_backbone)
    others = {setting: value for setting, value in others.items() if not setting.startswith("lambda_")}
    cls, active = methods()[name], settings.active
    own = [t.name for t in cls.terms if t.name in active]
    weights = {term: active[term] for term in (*own, *active)}
    run = run_facts(settings, student.num_class, common=common)
    try:
        taps = [tap for c in (cls, *settings.methods.values()) for tap in _taps(c, settings, run, student, teacher)]
        with torch.device("meta"):
            built = build_distillers(settings.method_options, run, student, teacher)
    except UserError as error:
        return MethodFacts(cls, weights, others, refused=describe_error(error))
    kept = [*built.buffers(), *(p for p in built.parameters() if not p.requires_grad)]
    return MethodFacts(cls, weights, others, ", ".join(dict.fromkeys(taps)),
                       sum(p.numel() for p in built.parameters() if p.requires_grad),
                       sum(t.numel() * t.element_size() for t in kept))


def _taps(cls: type[Distiller], settings: Settings, run: RunFacts, student: NetInfo, teacher: NetInfo) -> list[str]:
    needs = cls.requires(settings.method_options[cls.method], run, student, teacher)
    return [*needs.student, *needs.teacher]


def amount(number: float, unit: str = "") -> str:
    """A number with three digits and k, M or G: 76546048 -> "76.5 M"; 0 -> "-"."""
    if not number:
        return "-"
    size = min(3, max(0, (len(str(int(number))) - 1) // 3))
    return f"{number / 1000 ** size:.3g} {('', 'k', 'M', 'G')[size]}{unit}".strip()


def written(value: object) -> str:
    """An option's value as the command line takes it: False -> "false", 0.0005 -> "0.0005", (4, 4) -> "4 4"."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(written, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _row(facts: MethodFacts, width: int) -> str:
    cls = facts.cls
    state = amount(facts.state, "B")
    cells = (cls.method, str(cls.year), amount(facts.parameters).rjust(WIDTHS[2]), state.rjust(WIDTHS[3]), facts.taps)
    head = "  ".join(cell.ljust(size) for cell, size in zip(cells, WIDTHS, strict=True)) + "  "
    cells = [f"{name}\0{weight:g}" for name, weight in facts.weights.items()]  # \0: no line break here
    cells += [f"{flag(name)}\0{written(value)}" for name, value in facts.settings.items()]
    lines = textwrap.wrap(head + ", ".join(cells), width, subsequent_indent=" " * len(head), break_on_hyphens=False)
    notes = [f"{cls.title}. Computes {cls.cost}." if cls.cost else cls.title, cls.paper]
    notes += [f"not with these settings: {facts.refused}"] if facts.refused else []
    for note in notes:
        lines += textwrap.wrap(note, width, initial_indent=INDENT, subsequent_indent=INDENT + "  ")
    return "\n".join(line.replace("\0", " ") for line in lines)


def method_table(settings: Settings, width: int | None = None) -> str:
    """Every registered method for the networks, data set and crop of ``settings``, as text of ``width`` columns.

    width: the terminal's by default, from 100 to 140. Raises :class:`UserError` for unknown networks or data sets.
    """
    width = width or min(140, max(100, shutil.get_terminal_size((120, 40)).columns))
    data = settings.data
    spec = get_dataset_spec(data.dataset, data.data)
    num_class, class_map, networks = spec.num_class, class_map_of(settings.networks, spec), settings.networks
    student = unallocated_network(networks.student, num_class)
    teacher = unallocated_network(networks.teacher, class_map.taught if class_map else num_class)
    if class_map:
        teacher = teacher.of_classes(len(class_map.common))
    titles = ("method", "year", "parameters".rjust(WIDTHS[2]), "state".rjust(WIDTHS[3]), "taps", "preset")
    intro = (f"Methods for {teacher.name} -> {student.name} on {data.dataset} ({num_class} classes, crop "
             f"{data.crop_size[0]}x{data.crop_size[1]}). parameters: trained beside the student; state: "
             "buffers and frozen networks (queues, masks, a method's own teacher). None of it is part of the exported "
             "student. taps: what is read of either network. What the preset takes from other methods is counted too. "
             "preset: weights of the loss terms, then the other options that --method sets; --weight-decay, --min-lr "
             "and --aux-weight among them depart from the protocol that the methods have in common.")
    header = "  ".join([t.ljust(size) for t, size in zip(titles, (*WIDTHS, 0), strict=True)])
    common = class_map and class_map.part
    rows = [_row(method_facts(name, settings, student, teacher, common), width) for name in methods()]
    return "\n".join([*textwrap.wrap(intro, width), "", header, "-" * width, *rows])
