"""A teacher of other classes than those of the data set: its class scores become those of the classes in common."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.output import CLASS_TAPS, SegOutput


@dataclass(frozen=True)
class ClassMap:
    """Which classes of a teacher stand for which of a data set.

    common: the data set's classes that the teacher knows, ascending. groups: the teacher's classes that each of them is
    made of. num_class, taught: number of classes of the data set and of the teacher. names: of the teacher's classes,
    where they are known."""

    common: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    num_class: int
    taught: int
    names: tuple[str, ...] | None = None

    @property
    def part(self) -> tuple[int, ...] | None:
        """``common``; None when these are all classes of the data set."""
        return self.common if len(self.common) < self.num_class else None

    @property
    def missing(self) -> tuple[int, ...]:
        """The data set's classes that the teacher does not know."""
        return tuple(k for k in range(self.num_class) if k not in self.common)

    @property
    def unread(self) -> tuple[int, ...]:
        """The teacher's classes that stand for none."""
        read = {k for group in self.groups for k in group}
        return tuple(k for k in range(self.taught) if k not in read)


class MappedTeacher(nn.Module):
    """A teacher whose scores, main and auxiliary, are of the classes in common, in the order of the data set.

    The score of a merged class is the logarithm of the sum of the exponentials of its parts: the softmax then gives it
    the sum of their probabilities. Scores that stand for no class are left out: the softmax shares their probability
    out in proportion. A class that is one of the teacher's keeps its score to the last bit.

    net: the teacher itself, which may be replaced by a prepared one. whole: scores of all classes of the data set,
    those in ``missing`` below every other, for predictions. The other attributes are those of the network."""

    own = False  # it is run as it is, see ``engine.evaluate.prepare_for_inference``

    def __init__(self, net: nn.Module, class_map: ClassMap, whole: bool = False) -> None:
        super().__init__()
        self.net, self.class_map, self.whole = net, class_map, whole
        self.name, self.preprocess, self.output_stride = net.name, net.preprocess, net.output_stride
        self.head_width, self.takes_taps = getattr(net, "head_width", None), getattr(net, "takes_taps", False)
        self.strides, self.num_class = net.strides, class_map.num_class if whole else len(class_map.common)
        table = torch.full((2, class_map.taught), -1)  # of each class: which of the data set it is, and its place
        for place, (k, group) in enumerate(zip(class_map.common, class_map.groups, strict=True)):
            table[:, list(group)] = torch.tensor([[k], [place]])
            if len(group) > 1:
                self.register_buffer(f"merged_{place}", torch.tensor(group), persistent=False)
        self.register_buffer("table", table)  # part of the state: what is learned from a teacher depends on it
        self.register_buffer("first", torch.tensor([group[0] for group in class_map.groups]), persistent=False)
        self.register_buffer("places", torch.tensor(class_map.common), persistent=False)

    @property
    def channels(self) -> Mapping[str, int]:
        """{tap: channel count} of the fields that ``forward`` fills."""
        return {tap: self.num_class if tap in CLASS_TAPS else count for tap, count in self.net.channels.items()}

    def forward(self, x: Tensor) -> SegOutput:
        """As of the network: float images [B, 3, H, W] -> maps."""
        output = self.net(x)
        return output._replace(**{tap: self.scores(getattr(output, tap)) for tap in CLASS_TAPS
                                  if getattr(output, tap) is not None})

    def scores(self, logits: Tensor) -> Tensor:
        """[B, K_teacher, h, w] -> [B, K, h, w], in the same precision."""
        found = logits.index_select(1, self.first)
        for place, group in enumerate(self.class_map.groups):
            if len(group) > 1:
                parts = logits.index_select(1, self.get_buffer(f"merged_{place}"))
                found[:, place] = parts.to(torch.promote_types(parts.dtype, torch.float32)).logsumexp(1)
        if not self.whole or self.class_map.part is None:
            return found
        shape = (len(found), self.num_class, *found.shape[2:])
        # below the others, also when maps are resized and averaged; infinite values would not stand that
        return (found.amin(1, keepdim=True) - 1).expand(shape).index_copy(1, self.places, found)


def for_predictions(teacher: nn.Module) -> nn.Module:
    """A teacher, mapped or not, in eval mode with scores of every class of the data set."""
    if not isinstance(teacher, MappedTeacher):
        return teacher
    return MappedTeacher(teacher.net, teacher.class_map, whole=True).eval().to(teacher.table.device)


def common_classes(teacher: nn.Module | None) -> tuple[int, ...] | None:
    """The data set's classes that a teacher, mapped or not, scores; None for all of them."""
    return teacher.class_map.part if isinstance(teacher, MappedTeacher) else None
