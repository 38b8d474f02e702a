"""A network that somebody else wrote, behind the interface of :class:`models.segmentation.SegmentationNet`."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.output import SegOutput
from models.outside.taps import Catcher, Layout, probe, tensors_in
from models.preprocess import IMAGENET_RGB, Preprocess
from utils.errors import UserError
from utils.faults import explained
from utils.tensor_files import first_line


class OtherClasses(UserError):
    """A network that scores another number of classes, ``count``, than was asked for."""

    def __init__(self, what: str, count: int, asked: int) -> None:
        super().__init__(f"{what}: scores {count} classes, {asked} were asked for")
        self.count = count


def first_tensor(output: Any) -> Tensor:
    """The logits of most networks: what they return, its entry ``logits`` or ``out``, or else its first tensor."""
    if isinstance(output, Mapping):
        output = next((output[key] for key in ("logits", "out") if key in output), output)
    found = next(tensors_in(output), None)
    if found is None:
        raise UserError(f"the network returns {type(output).__name__} without a tensor: expected class scores "
                        "[B, K, h, w], alone, first, or under 'out' or 'logits'")
    return found


@dataclass(frozen=True)
class Outside:
    """What a source knows of a network.

    taps: {field of SegOutput: path}, see ``taps.py``. preprocess: of its input. multiple: its input's sides must divide
    by it. side: of the image that it is tried with. logits: from what it returns to class scores, a map [B, K, h, w].
    optional: what the names of tensors start with that a weight file may hold in vain. architecture: what builds it
    again where its name means nothing, as JSON values; None where the name says it all. backbone: what the names of
    tensors start with that an ImageNet file holds; prefix: what that file does not have in front of them."""

    net: nn.Module
    taps: Mapping[str, str] = field(default_factory=dict)
    preprocess: Preprocess = IMAGENET_RGB
    multiple: int = 1
    side: int = 128
    logits: Callable[[Any], Tensor] = first_tensor
    optional: tuple[str, ...] = ()
    architecture: Mapping[str, Any] | None = None
    backbone: tuple[str, ...] = ()
    prefix: str = ""


class OutsideNet(nn.Module):
    """``Outside.net`` as a segmentation network of this repository: same attributes, same output, see
    :class:`models.segmentation.SegmentationNet`.

    The logits are what the network itself returns, at whatever stride: often its final, full-size answer. Fields of
    ``SegOutput`` without a tap are None. strides: {tap: of its map, in pixels of the image}. Images whose sides do not
    divide by ``multiple`` are padded below and on the right with 0, the mean color, and the maps cut. Tensors in a
    state dict have the names that they have in ``net``."""

    own = False
    takes_taps = True

    def __init__(self, source: str, outside: Outside, num_class: int, taps: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.model, self.backbone, self.name, self.num_class, self.in_channels = source, "", source, num_class, 3
        self.trained_on: dict[str, Any] | None = None
        self.preprocess, self.multiple, self.optional = outside.preprocess, outside.multiple, outside.optional
        self.net, self.read_logits, self.architecture = outside.net, outside.logits, outside.architecture
        self.backbone_names, self.backbone_prefix = outside.backbone, outside.prefix
        self.taps = {**outside.taps, **(taps or {})}
        self.layouts: dict[str, Layout] = {}  # of each tap, as the first image has shown it
        self.catcher = Catcher(self.net, self.taps, source)
        self.side = -(-outside.side // self.multiple) * self.multiple
        self._register_load_state_dict_pre_hook(self._add_prefix)
        try:
            output = probe(self, self.side)
        except UserError:
            raise
        except Exception as error:  # of any kind: somebody else's code
            raise UserError(f"{source}: does not run on an image of {self.side}x{self.side} "
                            f"({type(error).__name__}: {first_line(error)})") from error
        maps = {name: value for name, value in output._asdict().items() if value is not None}
        if maps["logits"].shape[1] != num_class:
            raise OtherClasses(source, maps["logits"].shape[1], num_class)
        self.channels = {name: value.shape[1] for name, value in maps.items()}
        self.strides = {name: max(1, round(self.side / value.shape[2])) for name, value in maps.items()}
        self.aux = "aux" in maps
        self.output_stride = self.strides["logits"]

    def forward(self, x: Tensor) -> SegOutput:
        """x: float [B, 3, H, W]; UserError for another shape or an integer type."""
        if x.dim() != 4 or x.shape[1] != 3 or not x.is_floating_point():
            raise UserError(f"{self.name} expects a float image batch [B, 3, H, W], got {x.dtype} {list(x.shape)}")
        size, padded = x.shape[2:], self._pad(x)
        output = self._run(padded)
        maps = self.catcher.take()
        if "logits" not in maps:
            maps["logits"] = self.read_logits(output)
        if lost := [name for name in self.taps if name not in maps]:
            raise UserError(f"{self.name}: nothing has passed at {', '.join(f'{n}={self.taps[n]}' for n in lost)}: the "
                            "module is not called in this mode")
        inside = tuple(padded.shape[2:])
        return SegOutput(*(self._map(name, maps[name], size, inside) if name in maps else None
                           for name in SegOutput._fields))

    def _run(self, x: Tensor) -> Any:
        """What ``net`` returns. UserError where the size of the images is why it fails."""
        try:
            return self.net(x)
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            height, width, side = *x.shape[2:], self.side
            if torch.compiler.is_compiling() or explained(error) or (height, width) == (side, side):
                raise
            try:
                with torch.no_grad():
                    self.net(x.new_zeros(*x.shape[:2], side, side))
            except Exception:  # of any kind: somebody else's code, which the size is no reason for
                raise error from None
            raise UserError(f"{self.name}: runs on images of {side}x{side}, not on {height}x{width} "
                            f"({first_line(error)}): expected --crop-size {side} {side}, in evaluation --window "
                            f"{side} {side}") from error

    def _map(self, name: str, value: Tensor, size: tuple[int, int], padded: tuple[int, int]) -> Tensor:
        """One map in the form [B, C, h, w], cut to the image."""
        what = f"{self.name}: {name}"
        if name not in self.layouts:
            self.layouts[name] = Layout.of(value, padded, what)
        return self._cut(self.layouts[name].map(value, padded, what), size, padded)

    def state_dict(self, *args: Any, destination=None, prefix: str = "", keep_vars: bool = False):
        """As of ``net``: weights go back to where they came from."""
        return self.net.state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _add_prefix(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}net.{key.removeprefix(prefix)}"] = state_dict.pop(key)

    def _pad(self, x: Tensor) -> Tensor:
        below, right = (-side % self.multiple for side in x.shape[2:])
        return F.pad(x, (0, right, 0, below)) if below or right else x

    @staticmethod
    def _cut(value: Tensor, size: tuple[int, int], padded: tuple[int, int]) -> Tensor:
        """The part of a map over the image itself, its sides rounded up."""
        if tuple(size) == padded:
            return value
        height, width = (-(-have * side // whole) for have, side, whole in
                         zip(value.shape[2:], size, padded, strict=True))
        return value[:, :, :height, :width]
