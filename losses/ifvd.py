"""IFVD: how far each position is from the mean feature of its class (Wang et al., ECCV 2020)."""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from losses.adversarial import PUBLISHED_ADVERSARIAL, QUICK_ADVERSARIAL, WITHOUT_ADVERSARIAL
from losses.distiller import BuildContext, Distiller, Term, register
from losses.feature_mse import check_maps
from losses.logits import labels_at
from losses.skd import check_strides
from losses.task import at_least_float32
from models.output import SegOutput


def class_members(target: Tensor, size: tuple[int, int], num_class: int, ignore_label: int = -1) -> Tensor:
    """Bool [B, P, K], P = h * w: which class each position has, labels [B, H, W] being reduced to ``size`` = (h, w).

    A row is all False where the label is ignored (``ignore_label``, or outside 0 .. K-1).
    """
    labels = labels_at(target, size).flatten(1).unsqueeze(2)
    return (labels == torch.arange(num_class, device=target.device)) & (labels != ignore_label)


def class_similarity(feature: Tensor, members: Tensor) -> Tensor:
    """Cosine [B, P] between every position of [B, C, h, w] and the mean of its class within the same image.

    members: bool [B, P, K] of :func:`class_members`. A position without a class is compared with itself. Gradients
    flow through the means too. Two matrix products, whatever the number of classes; both are deterministic.
    """
    flat, weights = feature.flatten(2), members.to(feature.dtype)
    means = torch.bmm(flat, weights) / (weights.sum(dim=1) + 1e-6).unsqueeze(1)
    centres = torch.bmm(means, weights.transpose(1, 2))
    return F.cosine_similarity(flat, torch.where(members.any(dim=2).unsqueeze(1), centres, flat), dim=1)


def ifvd_loss(student: Tensor, teacher: Tensor, target: Tensor, num_class: int, ignore_label: int = -1) -> Tensor:
    """Mean over all positions of (s_student - s_teacher)^2, s = :func:`class_similarity`.

    student [B, C_s, h, w], teacher [B, C_t, h, w]: widths may differ; target: int [B, H, W]. Ignored positions add
    nothing but count in the mean. No gradient reaches the teacher. Raises UserError when B, h, w differ.
    """
    check_maps("ifvd", student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        members = class_members(target, student.shape[-2:], num_class, ignore_label)
        ours, theirs = (class_similarity(at_least_float32(x), members) for x in (student, teacher.detach()))
        return F.mse_loss(ours, theirs.to(ours.dtype))


@register("ifvd")
class IFVD(Distiller):
    """The head features of both networks and the labels through :func:`ifvd_loss`."""

    title = "intra-class feature variation, with the adversarial term"
    paper = "Wang et al., Intra-class Feature Variation Distillation for Semantic Segmentation"
    year = 2020
    terms = (Term("ifvd", 0.0, "weight of IFVD's intra-class feature variation loss"),)
    student_taps = ("head",)
    teacher_taps = ("head",)
    # CIRKD's Cityscapes script of IFVD; no script of another data set was released, the weights are taken over
    preset = {"*": {"lambda_kd": 1.0, "lambda_ifvd": 20.0, **PUBLISHED_ADVERSARIAL}, **WITHOUT_ADVERSARIAL}
    cost = "two matrix products per network; discriminator, three passes of it"
    quick = QUICK_ADVERSARIAL

    def __init__(self, num_class: int, ignore_label: int = -1) -> None:
        super().__init__()
        self.num_class, self.ignore_label = num_class, ignore_label

    @classmethod
    def build(cls, context: BuildContext) -> IFVD:
        """Raises UserError when the output strides differ."""
        check_strides(cls, context)
        return cls(context.num_class, context.ignore_label)

    def forward(self, student: SegOutput, teacher: SegOutput, target: Tensor, step: int,
                generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"ifvd": ifvd_loss(student.head, teacher.head, target, self.num_class, self.ignore_label)}
