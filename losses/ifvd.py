"""IFVD: how far each position is from the mean feature of its class (Wang et al., ECCV 2020)."""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from losses import core
from losses.core import Batch, Distiller, Needs, NetInfo, OptionGroup, RunFacts, Term, register


def class_similarity(feature: Tensor, members: Tensor) -> Tensor:
    """Cosine [B, P] between every position of [B, C, h, w] and the mean of its class within the same image. members:
    bool [B, K, P], P = h * w (:func:`losses.core.labels.class_members`). A position without a class is compared with
    itself. Gradients flow through the means too. Two matrix products, both deterministic."""
    flat, weights = feature.flatten(2), members.to(feature.dtype)
    means = torch.bmm(flat, weights.mT) / (weights.sum(dim=2) + 1e-6).unsqueeze(1)
    centers = torch.bmm(means, weights)
    return F.cosine_similarity(flat, torch.where(members.any(dim=1).unsqueeze(1), centers, flat), dim=1)


def ifvd_loss(student: Tensor, teacher: Tensor, target: Tensor, num_class: int, ignore_label: int = -1) -> Tensor:
    """Mean over all positions of (s_student - s_teacher)^2, s = :func:`class_similarity`. student [B, C_s, h, w],
    teacher [B, C_t, h, w]: widths may differ; target: int [B, H, W]. Ignored positions add nothing but count in the
    mean. No gradient reaches the teacher. Raises UserError when B, h, w differ."""
    core.check_maps("ifvd", student, teacher)
    with core.full_precision(student):
        labels = core.position_labels(target, student.shape[-2:], num_class, ignore_label)
        members = core.class_members(labels, num_class)
        similarities = [class_similarity(core.at_least_float32(x), members) for x in (student, teacher.detach())]
        return F.mse_loss(similarities[0], similarities[1].to(similarities[0].dtype))


@register("ifvd")
class IFVD(Distiller):
    """The head features of both networks and the labels through :func:`ifvd_loss`."""

    title = "intra-class feature variation, with the adversarial term"
    paper = "Wang et al., Intra-class Feature Variation Distillation for Semantic Segmentation"
    year = 2020
    terms = (Term("ifvd", 0.0, "weight of IFVD's intra-class feature variation loss", needs_labels=True),)
    needs = Needs.both("head", same_stride=True)
    # CIRKD's Cityscapes script, the only one released; crops of the last two sets are too small for the discriminator
    preset = {"*": {"lambda_kd": 1.0, "lambda_ifvd": 20.0, "lambda_adv": 0.001},
              "camvid": {"lambda_adv": 0.0}, "toy_streets": {"lambda_adv": 0.0}}
    cost = "two matrix products per network; discriminator, three passes of it"
    trial = {"adv_upsample": True}

    def __init__(self, options: OptionGroup, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> None:
        super().__init__()
        self.labels = run.num_class, run.ignore_label

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"ifvd": ifvd_loss(batch.student.head, batch.teacher.head, batch.target, *self.labels)}
