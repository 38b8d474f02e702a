"""The supervised part of the objective: cross entropy at label size."""
from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from losses.core.checks import at_least_float32
from losses.core.groups import image_weights
from models.output import SegOutput


class SegCrossEntropyLoss(nn.Module):
    """Mean cross entropy over the pixels whose label is not ``ignore_index``, in groups of images (0 = all). The
    published runs took the mean over the two images of a GPU, then over the GPUs."""

    def __init__(self, ignore_index: int = -1, group_size: int = 0) -> None:
        super().__init__()
        self.ignore_index, self.group_size = ignore_index, group_size

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Scalar in nats. logits: [B, K, h, w], resized bilinearly to the labels; target: integers [B, H, W].

        A batch without a single labeled pixel gives 0 with a zero gradient (a mean over nothing would be NaN)."""
        logits = F.interpolate(at_least_float32(logits), size=target.shape[-2:], mode="bilinear", align_corners=True)
        per_pixel = F.cross_entropy(logits, target.long(), ignore_index=self.ignore_index, reduction="none")
        labeled = (target != self.ignore_index).sum((1, 2))
        return (per_pixel.sum((1, 2)) * image_weights(labeled, self.group_size, per_pixel.dtype)).sum()


def task_loss(output: SegOutput, target: Tensor, criterion: nn.Module) -> dict[str, Tensor]:
    """Unweighted ``{"task": scalar}`` of the main logits, and ``"aux"`` when the network has an auxiliary head."""
    terms = {"task": criterion(output.logits, target)}
    if output.aux is not None:
        terms["aux"] = criterion(output.aux, target)
    return terms
