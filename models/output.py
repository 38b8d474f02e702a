"""What a segmentation network returns."""
from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

#: the fields of ``SegOutput`` whose channels are classes
CLASS_TAPS = ("logits", "aux")


class SegOutput(NamedTuple):
    """Tensors of one forward pass; the field names are the *taps* that distillation methods ask for.

    A network of another library may lack some, which are None then, and have other strides.
    The order keeps the index habits of the reference code: ``[0]`` logits, ``[-2]`` c4, ``[-1]`` head."""

    logits: Tensor  # [B, K, h, w], not upsampled
    aux: Tensor | None  # [B, K, h, w] from c3; None when the network has no auxiliary head
    c1: Tensor | None  # backbone stages [B, C_i, h_i, w_i]: c1 at stride 4, c2..c4 at the output stride 8
    c2: Tensor | None
    c3: Tensor | None
    c4: Tensor | None
    head: Tensor | None  # [B, C, h, w], last feature before the classifier
