"""SKD's pair-wise term: similarities between all positions of a map (Liu et al., CVPR 2019 / TPAMI 2020). Its holistic
half is the term ``adv`` of ``losses/adversarial.py``, which the preset adds."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from losses.core import Batch, Distiller, Needs, NetInfo, OptionGroup, RunFacts, Term, check_maps, option, register
from losses.core.checks import at_least_float32, full_precision


def pool_nodes(feature: Tensor, form: str) -> Tensor:
    """Max-pool a map [B, C, h, w] to the nodes that are compared. cirkd: 2x2, the last window partial where a side is
    odd. original: windows of half the height and width, so 2x2 nodes (3 along an odd side)."""
    window = 2 if form == "cirkd" else [max(side // 2, 1) for side in feature.shape[-2:]]
    return F.max_pool2d(feature, window, ceil_mode=True)


def unit_nodes(nodes: Tensor, form: str) -> Tensor:
    """Nodes [B, C, ...] as unit vectors [B, C, P]; in the original form no gradient passes through the length."""
    nodes = nodes.flatten(2)
    if form == "original":
        return nodes / (nodes.detach().norm(dim=1, keepdim=True) + 1e-8)
    length = nodes.norm(dim=1, keepdim=True)
    # where normalize would divide by 1e-12, a zero vector stays zero, and so do half-precision gradients behind it
    return nodes / length.masked_fill(length <= 1e-12, 1.0)


def gram_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """||S'S - T'T||^2 of unit nodes S [B, C_s, P], T [B, C_t, P], summed over the batch, without any P x P matrix: as
    ||SS'||^2 + ||TT'||^2 - 2 ||ST'||^2, a difference of large numbers, for which half precision will not do."""
    own, taught, cross = (torch.bmm(a, b.transpose(1, 2)).square().sum()
                          for a, b in ((student, student), (teacher, teacher), (student, teacher)))
    return own + taught - 2 * cross


def map_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The same as :func:`gram_distance` by the P x P similarity maps themselves: for few nodes."""
    maps = (torch.bmm(x.transpose(1, 2), x) for x in (student, teacher))
    return (next(maps) - next(maps)).square().sum()


def pairwise_loss(student: Tensor, teacher: Tensor, form: str = "cirkd") -> Tensor:
    """Mean squared difference of the cosine similarities of all node pairs: (1 / B P^2) sum (A_s - A_t)^2.
    student [B, C_s, h, w], teacher [B, C_t, h, w]: widths may differ. form: "cirkd" or "original", two losses of
    different size whose weights do not transfer. No gradient reaches the teacher. Raises UserError when h, w differ."""
    check_maps("skd", student, teacher)
    with full_precision(student):
        nodes = [unit_nodes(pool_nodes(at_least_float32(x), form), form) for x in (student, teacher.detach())]
        batch, _, count = nodes[0].shape
        few = count <= min(x.shape[1] for x in nodes)
        return (map_distance if few else gram_distance)(*nodes) / (batch * count ** 2)


@dataclass(frozen=True)
class SKDOptions(OptionGroup):
    """Settings of the pair-wise term."""
    skd_form: str = option("cirkd", "cirkd: 2x2 pooling, weight 10; original: four nodes per image, weight 0.5 to 1",
                           choices=("cirkd", "original"))


@register("skd")
class SKD(Distiller):
    """The head features of both networks, compared by :func:`pairwise_loss`."""

    title = "structured distillation: pair-wise similarities and an adversarial term"
    paper = "Liu et al., Structured Knowledge Distillation for Semantic Segmentation"
    year = 2019
    Options = SKDOptions
    terms = (Term("skd", 0.0, "weight of SKD's pair-wise similarity loss"),)
    needs = Needs.both("head", same_stride=True)
    # CIRKD's Cityscapes script, the only one released; crops of the last two sets are too small for the discriminator
    preset = {"*": {"lambda_kd": 1.0, "lambda_skd": 10.0, "lambda_adv": 0.001},
              "camvid": {"lambda_adv": 0.0}, "toy_streets": {"lambda_adv": 0.0}}
    cost = "channel Gram matrices; discriminator, three passes of it"
    trial = {"adv_upsample": True}

    def __init__(self, options: SKDOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> None:
        super().__init__()
        self.form = options.skd_form

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"skd": pairwise_loss(batch.student.head, batch.teacher.head, self.form)}
