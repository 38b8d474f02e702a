"""Whether a network's outputs are the classes that it is asked for: names and their order."""
from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from utils.errors import UserError


def check_classes(net: nn.Module, source: str | None, classes: Sequence[str]) -> str | None:
    """Compare the classes that a network was trained for, if known, with those of a data set.

    source: where its weights come from. UserError when a class stands at another place, which would count every pixel
    of it as wrong. Names that differ but stand nowhere else are taken for other names of the same classes: they are
    returned as text, None when there are none."""
    if net.trained_on is None:
        return None
    trained, here = net.trained_on["classes"], [_plain(name) for name in classes]
    if len(trained) != len(classes):
        raise UserError(f"{source}: its description names {len(trained)} classes, the data have {len(classes)}")
    differing = [(i, a, b) for i, (a, b) in enumerate(zip(trained, classes, strict=True)) if _plain(a) != here[i]]
    shown = ", ".join(f"{i} is {a!r} there and {b!r} here" for i, a, b in differing[:3])
    more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
    if any(_plain(name) in here for _, name, _ in differing):
        raise UserError(f"{source}: trained for these classes in another order (class {shown}{more}): expected the "
                        "order of the training in the class file of the data")
    return f"{source}: trained for classes of other names (class {shown}{more})" if differing else None


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())
