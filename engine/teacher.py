"""The teacher of a run: a network of the data set's classes, or one of other classes behind a map."""
from __future__ import annotations

from torch import nn

from dataset import DatasetSpec
from engine.class_map import class_map_of, of_data
from engine.layout import INDENT, fold
from engine.log import LOG
from engine.settings import Settings
from models import NetworkChoice, check_classes
from models.class_map import ClassMap, MappedTeacher
from models.class_names import KnownClasses, classes_of
from models.outside.net import OtherClasses
from utils.errors import UserError


def build_teacher(settings: Settings, spec: DatasetSpec) -> nn.Module | None:
    """The frozen teacher in eval mode, or None when no method of the run reads one.

    UserError when it has other classes than the data set, or the same in another order, and no map; or when the map
    does not fit."""
    return load_teacher(settings, spec) if settings.needs_teacher else None


def load_teacher(settings: Settings, spec: DatasetSpec, choice: NetworkChoice | None = None) -> nn.Module:
    """As :func:`build_teacher`, whether a method reads it or not. choice: another network of the same classes."""
    networks = settings.networks
    choice = choice or networks.teacher
    class_map = class_map_of(networks, spec, choice)
    if class_map is None:
        return _unmapped(choice, spec)
    if class_map.part and 0 <= settings.data.ignore_label < spec.num_class:
        raise UserError(f"--ignore-label {settings.data.ignore_label} is a class, but the labels of the classes that "
                        f"--teacher-classes leaves out are ignored too: expected none of 0 to {spec.num_class - 1}")
    LOG.info("%s", _described(f"--teacher-classes {networks.teacher_classes}", class_map, spec))
    return MappedTeacher(_frozen(choice, class_map.taught), class_map).eval()


def _frozen(choice: NetworkChoice, num_class: int) -> nn.Module:
    return choice.build(num_class).eval().requires_grad_(False)


def _unmapped(choice: NetworkChoice, spec: DatasetSpec) -> nn.Module:
    try:
        net = _frozen(choice, spec.num_class)
    except UserError as error:
        raise _other_classes(error, choice, spec) or error from error
    try:
        note = check_classes(net, choice.pretrained, spec.classes)
    except UserError as error:
        raise UserError(f"{error}, or --teacher-classes FILE, which maps them") from error
    if note is not None:
        LOG.warning("--teacher-pretrained %s", note)
    return net


def _other_classes(error: UserError, choice: NetworkChoice, spec: DatasetSpec) -> UserError | None:
    """The refusal of a teacher with another number of classes; None when it has not, or when that is not known.
    error: what building it has said."""
    try:
        known = classes_of(choice)
    except UserError:  # said already
        return None
    if known.count is None and isinstance(error, OtherClasses):
        known = KnownClasses(error.count)
    if known.count in (None, spec.num_class):
        return None
    return UserError(f"the teacher {choice.pretrained or choice.model} has {known}, {spec.title} has {of_data(spec)}: "
                     "expected --teacher-classes FILE, which says which of them stand for which (docs/networks.md)")


def _described(where: str, class_map: ClassMap, spec: DatasetSpec) -> str:
    """What a map does, in folded lines."""
    names = class_map.names or tuple(f"class {k}" for k in range(class_map.taught))
    pairs = [(spec.classes[k], " + ".join(names[part] for part in group))
             for k, group in zip(class_map.common, class_map.groups, strict=True)]
    lists = {f"{where}: {len(class_map.common)} of the {spec.num_class} classes of {spec.title}:":
             [one if one == other else f"{one} = {other}" for one, other in pairs],
             f"{INDENT}not known to the teacher:": [spec.classes[k] for k in class_map.missing],
             f"{INDENT}of the teacher not used:": [names[k] for k in class_map.unread]}
    return "\n".join(fold([f"{title} {items[0]}", *items[1:]], ",", ", ") for title, items in lists.items() if items)
