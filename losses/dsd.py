"""Double similarity distillation (Feng et al., IEEE TIP 2021).

Pixel similarity (``dsd_psd``): attention maps of several layers, and how they change from one layer to another.
Category similarity (``dsd_csd``): which class channels of the logits look at the same places.
"""
from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from losses.core import Batch, Distiller, Needs, NetInfo, OptionGroup, RunFacts, Term, check_maps, register
from losses.core.checks import at_least_float32, full_precision
from losses.core.feature_losses import attention_map, unit_vectors
from losses.core.needs import both_have_aux, taps_to_resize
from utils.errors import UserError


def attention_residuals(maps: Sequence[Tensor]) -> Tensor:
    """Unit vectors [pairs, B, h w] of a_j - a_i for all i < j, a = attention maps of K maps [B, C_k, h, w]; zero where
    two maps are equal."""
    attention = [attention_map(x) for x in maps]
    return unit_vectors(torch.stack([second - first for first, second in combinations(attention, 2)]))


def psd_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over pairs of layers, images and positions of the squared difference of the residuals. student, teacher: as
    many maps each, at least two, [B, C, h, w] of one size, channels free; otherwise UserError. No gradient reaches the
    teacher."""
    if len(student) != len(teacher) or len(student) < 2:
        raise UserError(f"dsd: {len(student)} student maps and {len(teacher)} teacher maps: expected equally many, "
                        "at least 2")
    for x in (*student, *teacher):
        check_maps("dsd", x, teacher[0])
    return F.mse_loss(attention_residuals(student), attention_residuals([x.detach() for x in teacher]))


def category_similarity(logits: Tensor, temperature: float) -> Tensor:
    """Gram matrix [B, K, K] of the K channels of [B, K, h, w], each a softmax over the 2x2-averaged positions."""
    pooled = F.avg_pool2d(at_least_float32(logits), kernel_size=2, stride=2, ceil_mode=True)
    phi = (pooled.flatten(2) / temperature).softmax(dim=-1)
    return phi @ phi.transpose(1, 2)


def csd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """Mean squared difference of the :func:`category_similarity` of two maps [B, K, h, w]. About 1e-6 at most: the
    entries of the matrices are near 1 / (number of positions), so that the published weight of 10 hardly acts. No
    gradient reaches the teacher; UserError when the shapes differ."""
    check_maps("dsd", student_logits, teacher_logits, channels=True)
    with full_precision(student_logits):  # a product of softmaxes: autocast would do it in half precision
        return F.mse_loss(*(category_similarity(x, temperature) for x in (student_logits, teacher_logits.detach())))


def psd_taps(student: NetInfo, teacher: NetInfo, as_released: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which maps of either network pixel similarity compares, in order.

    The released code takes outputs -2, -1 and 0: aux, head, logits. Without an auxiliary head -2 is the logits again,
    so that a MobileNet student's [logits, head, logits] meets the teacher's [aux, head, logits]: maps that do not
    correspond, and one pair without content. That empty residual is divided by 1e-12 twice, which multiplies its two
    opposite gradients so much that the others round away next to them: no gradient reaches the logits, only the head.
    as_released does the same; otherwise [aux, head, logits] if both networks have all three, else [head, logits]."""
    if as_released:
        return tuple(("aux" if "aux" in net.channels else "logits", "head", "logits") for net in (student, teacher))
    taps = ("aux", "head", "logits") if both_have_aux(student, teacher) else ("head", "logits")
    return taps, taps


def check_one_size(needs: Needs, student: NetInfo, teacher: NetInfo) -> None:
    """UserError unless the maps that pixel similarity reads of either network, and compares with each other, have one
    stride; the student's are as it sees them, those that the teacher has too being resized."""
    seen = student.resized(teacher, taps_to_resize(needs, student, teacher))
    for role, net, taps in (("teacher", teacher, needs.teacher), ("student", seen, needs.student)):
        strides = {tap: net.stride_of(tap) for tap in taps if tap in net.channels}
        if len(set(strides.values())) > 1:
            raise UserError(f"dsd_psd compares maps of the {role} {net.name} with each other, but their strides are "
                            f"{', '.join(f'{tap} {stride}' for tap, stride in strides.items())}: expected one stride",
                            settings=[*(("list_taps", f"{role}_taps") if net.takes_taps else ()), "lambda_dsd_psd"])


@register("dsd")
class DSD(Distiller):
    """:func:`psd_loss` of the maps that :func:`psd_taps` lists, :func:`csd_loss` of the logits (temperature 4)."""

    title = "double similarity: pixels across layers, categories"
    paper = "Feng et al., Double Similarity Distillation for Semantic Image Segmentation"
    year = 2021
    cost = "squares of head and logits, K x K Gram matrices"
    terms = (Term("dsd_psd", 0.0, "weight of DSD's pixel similarity of auxiliary logits, head and logits",
                  of_unit_maps="logits"),
             Term("dsd_csd", 0.0, "weight of DSD's category similarity of the logits"))
    needs = Needs.both("head", "logits", same_stride=True)
    preset = {"*": {"lambda_dsd_psd": 1000.0, "lambda_dsd_csd": 10.0}}  # train_scripts of CIRKD (Cityscapes): no KD
    rows = {"citys/deeplab_mobile-mobilenetv2": {"compat": "reference"}}

    def __init__(self, options: OptionGroup, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> None:
        super().__init__()
        self.student_taps, self.teacher_taps = psd_taps(student, teacher, run.as_released)
        self.active = run.active

    @classmethod
    def requires(cls, options: OptionGroup, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> Needs:
        if teacher is None or "dsd_psd" not in run.active:
            return Needs.both("logits", same_classes=True)
        needs = Needs(*psd_taps(student, teacher, run.as_released), same_stride=True,
                      same_classes="dsd_csd" in run.active)
        check_one_size(needs, student, teacher)
        return needs

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        terms = {}
        if "dsd_psd" in self.active:
            student, teacher = ([getattr(output, tap) for tap in taps] for output, taps in
                                ((batch.student, self.student_taps), (batch.teacher, self.teacher_taps)))
            if self.student_taps[0] == self.student_taps[-1]:
                student[0] = student[2] = student[0].detach()  # the released code's rounding, see psd_taps
            terms["dsd_psd"] = psd_loss(student, teacher)
        if "dsd_csd" in self.active:
            terms["dsd_csd"] = csd_loss(batch.student.logits, batch.teacher.logits)
        return terms
