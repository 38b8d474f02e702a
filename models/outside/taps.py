"""Maps inside a network that somebody else wrote: where they are, and how they are brought into one form.

A tap is the path of a submodule, as ``named_modules`` spells it: ``backbone.layer4`` means what that module returns,
``classifier.4:in`` what it is given, ``encoder[3]`` the fourth tensor (counted from 0) of what it returns.
"""
from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.output import SegOutput
from utils.errors import UserError

PATH = re.compile(r"(?P<path>[\w.]+)(\[(?P<index>\d+)\])?(?P<given>:in)?")
#: strides at which maps and tokens are looked for
STRIDES = (1, 2, 4, 7, 8, 14, 16, 28, 32, 64)


class Tap(NamedTuple):
    """path: of the submodule; index: which tensor of several; given: of its input in place of its output."""

    path: str
    index: int = 0
    given: bool = False

    @classmethod
    def parse(cls, text: str) -> Tap:
        """From the form of the command line. UserError when it is not of that form."""
        match = PATH.fullmatch(text)
        if match is None:
            raise UserError(f"tap {text!r}: expected the path of a submodule, as backbone.layer4, optionally with [N] "
                            "for its Nth output or :in for its input")
        return cls(match["path"], int(match["index"] or 0), bool(match["given"]))


def parse_taps(text: str | None) -> dict[str, str]:
    """'c4=backbone.layer4,head=classifier.4:in' -> {'c4': 'backbone.layer4', …}. UserError for anything else."""
    taps: dict[str, str] = {}
    for part in re.split(r"[,\s]+", text.strip()) if text else []:
        name, equals, path = part.partition("=")
        if not equals or name not in SegOutput._fields:
            raise UserError(f"taps {text!r}: expected NAME=PATH, separated by commas, with names among "
                            f"{', '.join(SegOutput._fields)}; got {part!r}")
        Tap.parse(path)
        if name in taps:
            raise UserError(f"taps {text!r}: {name} is given twice")
        taps[name] = path
    return taps


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in what a module returns or is given: nested in tuples, lists and mappings, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)


class Catcher:
    """Keeps what passes at the taps during a forward pass. Of a module that runs several times, the last."""

    def __init__(self, net: nn.Module, taps: Mapping[str, str], name: str) -> None:
        self.caught: dict[str, Tensor] = {}
        modules = dict(net.named_modules())
        for field, text in taps.items():
            tap = Tap.parse(text)
            if tap.path not in modules:
                near = [path for path in modules if path.endswith(tap.path.rpartition(".")[2])] or list(modules)[1:]
                raise UserError(f"{name}: no submodule {tap.path!r} for tap {field} (there is e.g. "
                                f"{', '.join(near[:4])}; --list-taps prints all)")
            if tap.given:
                modules[tap.path].register_forward_pre_hook(Keep(self, field, tap, name), with_kwargs=True)
            else:
                modules[tap.path].register_forward_hook(Keep(self, field, tap, name))

    def take(self) -> dict[str, Tensor]:
        """What was caught since the last call."""
        caught, self.caught = self.caught, {}
        return caught


class Keep:
    """A hook: puts one tensor of a module's input or output where its tap is read."""

    def __init__(self, catcher: Catcher, field: str, tap: Tap, name: str) -> None:
        self.catcher, self.field, self.tap, self.name = catcher, field, tap, name

    def __call__(self, module: nn.Module, args: Any, last: Any) -> None:
        """last: of a forward hook the output, of a hook before the forward pass the named arguments."""
        found = list(tensors_in((args, last) if self.tap.given else last))
        if self.tap.index >= len(found):
            raise UserError(f"{self.name}: tap {self.field}={self.tap.path}[{self.tap.index}], but that module "
                            f"{'is given' if self.tap.given else 'returns'} {len(found)} tensors")
        self.catcher.caught[self.field] = found[self.tap.index]


class Layout(NamedTuple):
    """How a map stands in a tensor: 'map' [B, C, h, w], 'last' [B, h, w, C] or 'tokens' [B, N, C]. stride: of tokens;
    extra: how many of them, the first ones, are no part of the image."""

    kind: str
    stride: int = 0
    extra: int = 0

    @classmethod
    def of(cls, x: Tensor, size: tuple[int, int], what: str) -> Layout:
        """Of a tensor that an image of ``size`` has left. what: for the message of UserError when it is no map."""
        if x.dim() == 4:
            is_last = not fits(x.shape[2:], size) and fits(x.shape[1:3], size)
            return cls("last" if is_last else "map")
        if x.dim() == 3:
            for stride in STRIDES:
                height, width = grid_at(stride, size)
                if height * width <= x.shape[1]:
                    return cls("tokens", stride, x.shape[1] - height * width)
        raise UserError(f"{what}: expected a map [B, C, h, w] or tokens [B, N, C] of images of {size[0]}x{size[1]}, "
                        f"got {list(x.shape)}")

    def map(self, x: Tensor, size: tuple[int, int], what: str) -> Tensor:
        """[B, C, h, w]. size: of the image. UserError for tokens that are not as many as the image has."""
        if self.kind != "tokens":
            return x.permute(0, 3, 1, 2) if self.kind == "last" else x
        count = x.shape[1] - self.extra
        up = grid_at(self.stride, size)
        for height, width in (up, (size[0] // self.stride, size[1] // self.stride)):
            if height * width == count:
                return x[:, self.extra:].transpose(1, 2).unflatten(2, (height, width))
        raise UserError(f"{what}: {count} tokens of an image of {size[0]}x{size[1]}, expected {up[0]} x {up[1]} at "
                        f"stride {self.stride}: use sides that divide by {self.stride}")


def grid_at(stride: int, size: tuple[int, int]) -> tuple[int, int]:
    """Sides of a map at a stride, rounded up."""
    return -(-size[0] // stride), -(-size[1] // stride)


def fits(shape: torch.Size, size: tuple[int, int]) -> bool:
    """Whether these are the sides of a map of the image, rounded down or up."""
    return any(shape[0] in (size[0] // s, -(-size[0] // s)) and shape[1] in (size[1] // s, -(-size[1] // s))
               for s in STRIDES)


def candidates(net: nn.Module, side: int) -> list[tuple[str, list[int]]]:
    """(path, shape) of every submodule that returns one map of an image of ``side`` x ``side``, in the order in which
    they run; with ``[N]`` where one returns several."""
    found: dict[str, list[int]] = {}

    def look(path: str):
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensors = list(tensors_in(output))
            for i, x in enumerate(tensors):
                if x.dim() in (3, 4) and x.is_floating_point():
                    found[path if len(tensors) == 1 else f"{path}[{i}]"] = list(x.shape)
        return hook

    hooks = [module.register_forward_hook(look(path)) for path, module in net.named_modules() if path]
    try:
        probe(net, side)
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.items())


@torch.no_grad()
def probe(net: nn.Module, side: int) -> Any:
    """What a network returns for one black image, in eval mode; its modes are left as they were."""
    modes = [(module, module.training) for module in net.modules()]
    weight = next(net.parameters())
    try:
        return net.eval()(torch.zeros(1, 3, side, side, device=weight.device, dtype=weight.dtype))
    finally:
        for module, training in modes:
            module.training = training
