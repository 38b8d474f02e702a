"""What a segmentation network returns."""
from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SegOutput(NamedTuple):
    """Named tensors of one forward pass, all at the network's output stride unless said otherwise.

    The order keeps the index habits of the reference code: ``[0]`` logits, ``[-2]`` c4, ``[-1]`` head.
    The field names are the *tap* names that distillation methods ask for.

    logits: [B, K, h, w]            main prediction, not upsampled
    aux:    [B, K, h, w] or None    auxiliary prediction from c3 (None when the network has no auxiliary head)
    c1..c4: [B, C_i, h_i, w_i]      backbone stages (c1 at stride 4, c2..c4 at stride 8)
    head:   [B, C, h, w]            last feature before the classifier
    """

    logits: Tensor
    aux: Tensor | None
    c1: Tensor
    c2: Tensor
    c3: Tensor
    c4: Tensor
    head: Tensor
