"""The classes that a teacher and the data set have in common, as methods that read the teacher's scores see them.

Such a method is given a problem of these classes alone: the student's scores of them, and labels numbered in their
order, where every other label is "ignore". So it needs to know nothing of it.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from losses.core.needs import Needs
from models.output import CLASS_TAPS, SegOutput


def reads_scores(needs: Needs) -> bool:
    """Whether a method reads class scores of the teacher."""
    return any(tap in CLASS_TAPS for tap in needs.teacher)


class CommonClasses(nn.Module):
    """common: those of the ``num_class`` classes that the teacher scores. ignore_label: none of 0..num_class-1."""

    def __init__(self, common: Sequence[int], num_class: int, ignore_label: int) -> None:
        super().__init__()
        self.num_class = num_class
        index, table = torch.tensor(common), torch.full((num_class + 1,), ignore_label)
        table[index] = torch.arange(len(index))
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("table", table, persistent=False)

    def scores(self, output: SegOutput) -> SegOutput:
        """The output with the scores [B, C, h, w] of the common classes in place of those of all."""
        return output._replace(**{tap: getattr(output, tap).index_select(1, self.index) for tap in CLASS_TAPS
                                  if getattr(output, tap) is not None})

    def labels(self, target: Tensor) -> Tensor:
        """int64 [B, H, W]: the place of each label among the common classes, "ignore" for any other value."""
        known = (target >= 0) & (target < self.num_class)
        return self.table[torch.where(known, target, self.num_class)]
