"""The classes of a network: whether they are those that it is asked for, and what its files say of them."""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from models.outside.huggingface import hf_classes
from models.outside.mmsegmentation import CLASSIFIER
from models.outside.sources import is_folder
from models.registry import ARCHITECTURES, NetworkChoice
from models.weight_files import is_given, open_weights, read_info
from utils.errors import UserError


@dataclass(frozen=True)
class KnownClasses:
    """Of a network's classes, what is known: their number, their names."""

    count: int | None = None
    names: tuple[str, ...] | None = None

    def __str__(self) -> str:
        if self.names is None:
            return f"{self.count} classes without names"
        return f"{self.count} classes ({', '.join(self.names)})"


def classes_of(choice: NetworkChoice) -> KnownClasses:
    """What is said of a network's classes by the file beside its weights, by transformers' or smp's own description, or
    by the shape of its classifier. UserError when one of these cannot be read."""
    info = (read_info(choice.pretrained) if is_given(choice.pretrained) else None) or {}
    names = (info.get("trained_on") or {}).get("classes")
    if names or info.get("num_class"):
        return KnownClasses(len(names) if names else int(info["num_class"]), tuple(names) if names else None)
    source, _, name = choice.model.partition(":")
    if source == "hf":
        names = hf_classes(name)
        return KnownClasses(len(names), names)
    if source == "smp" and is_folder(name):
        return KnownClasses(_of_smp(Path(name).expanduser() / "config.json"))
    classifiers = {"mmseg": CLASSIFIER, **{name: one.classifier for name, one in ARCHITECTURES.items()}}
    if source not in classifiers or not is_given(choice.pretrained):
        return KnownClasses()
    weight = open_weights(choice.pretrained).tensors.get(classifiers[source])
    return KnownClasses(None if weight is None else len(weight))


def _of_smp(path: Path) -> int | None:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("classes")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a description of a network that can be read ({error})") from error


def check_classes(net: nn.Module, source: str | None, classes: Sequence[str]) -> str | None:
    """Compare the classes that a network was trained for, if known, with those of a data set.

    source: where its weights come from. UserError when a class stands at another place, which would count every pixel
    of it as wrong. Names that differ but stand nowhere else are taken for other names of the same classes: they are
    returned as text, None when there are none."""
    if net.trained_on is None:
        return None
    trained, here = net.trained_on["classes"], [plain_name(name) for name in classes]
    if len(trained) != len(classes):
        raise UserError(f"{source}: its description names {len(trained)} classes, the data have {len(classes)}")
    differing = [(i, a, b) for i, (a, b) in enumerate(zip(trained, classes, strict=True)) if plain_name(a) != here[i]]
    shown = ", ".join(f"{i} is {a!r} there and {b!r} here" for i, a, b in differing[:3])
    more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
    if any(plain_name(name) in here for _, name, _ in differing):
        raise UserError(f"{source}: trained for these classes in another order (class {shown}{more}): expected the "
                        "order of the training in the class file of the data")
    return f"{source}: trained for classes of other names (class {shown}{more})" if differing else None


def plain_name(name: str) -> str:
    """A name without what does not count: capitals and further spaces."""
    return " ".join(name.casefold().split())
