"""Adaptive inter-class similarity distillation (Mansourian, Ahmadi and Kasaei, arXiv 2308.04243; MTAP 2025).

Each class channel of the logits becomes a distribution over the positions; the divergences between the classes of one
image form a matrix, and the student's matrix has to be like the teacher's (``aicsd``). A schedule moves the weight
from imitation to supervision and similarity: the objective is a (CE + aicsd) + (1 - a) KD, with a growing from 0 to 1.
``ickd`` is the inter-channel correlation of Liu et al. (ICCV 2021) on logits, which the authors compare with.

The default is the paper's form. The released code (``--compat reference``) departs from it: the softmax runs along the
rows of the map only, the divergence is sum(p_j log p_j - p_j p_i) because a probability is passed where its logarithm
is expected, one triangle of the matrix is mirrored although the divergence is not symmetric, the matrix is averaged
over the images of a GPU (6 in the authors' runs; ``--group-size``) and the error divided by their number once more.
The published weight of 9500 fits that form only, see the preset.
"""
from __future__ import annotations

import argparse

import torch
from torch import Tensor
from torch.nn import functional as F

from losses.dist import mean_over_groups
from losses.distiller import BuildContext, Distiller, Term, register
from losses.kd import kd_loss
from losses.logits import check_logit_maps, check_logit_nets
from losses.task import SegCrossEntropyLoss, at_least_float32
from models.output import SegOutput
from utils.cli import BooleanAction
from utils.errors import UserError


def divergence_matrix(logits: Tensor) -> Tensor:
    """KL(p_i || p_j) [B, K, K] between the classes of each image, p = softmax of [B, K, h, w] over all positions."""
    log_p = at_least_float32(logits).flatten(2).log_softmax(dim=-1)
    p = log_p.exp()
    own = (p * log_p).sum(dim=-1, keepdim=True)
    return own - p @ log_p.transpose(1, 2)


def released_matrix(logits: Tensor) -> Tensor:
    """The released code's matrix [groups, K, K] of [groups, images, K, h, w], an average over the images of a group.

    See the module for its peculiarities.
    """
    log_p = at_least_float32(logits).log_softmax(dim=-2)
    p = log_p.exp()
    own = (p * log_p).sum(dim=(1, 3, 4))
    rows = p.transpose(1, 2).flatten(2)
    upper = torch.triu(own[:, None] - rows @ rows.transpose(1, 2)) / logits.shape[1]
    return upper + upper.triu(1).transpose(1, 2)


def _released_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Of [groups, images, K, h, w]: the error of the matrices of a group over its images, averaged over groups."""
    rows = (F.normalize(released_matrix(x), dim=-1) for x in (student, teacher))
    return F.mse_loss(*rows) / student.shape[1]


def aicsd_loss(student_logits: Tensor, teacher_logits: Tensor, form: str = "paper", group_size: int = 0) -> Tensor:
    """Mean squared difference of the inter-class matrices, each row of a matrix at unit length.

    Logits [B, K, h, w] of equal shapes, or UserError. form: "paper" for the matrices of single images,
    :func:`divergence_matrix`; "released" for :func:`released_matrix` of ``group_size`` neighbouring images (0 = all),
    and the division by their number. Computed in float32 or better; no gradient reaches the teacher.
    """
    check_logit_maps("aicsd", student_logits, teacher_logits)
    teacher_logits = teacher_logits.detach()
    with torch.autocast(student_logits.device.type, enabled=False):
        if form == "released":
            return mean_over_groups(_released_difference, student_logits, teacher_logits, group_size)
        return F.mse_loss(*(F.normalize(divergence_matrix(x), dim=-1) for x in (student_logits, teacher_logits)))


def aicsd_kd_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The KL divergence of the logits per pixel, averaged over pixels *and classes*: ``kd_loss`` / K."""
    return kd_loss(student_logits, teacher_logits) / student_logits.shape[1]


def ickd_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Squared difference of the channel correlations of [B, K, h, w], rows at unit length, summed over a row of the
    K x K matrix and averaged over rows and images. No gradient reaches the teacher."""
    check_logit_maps("ickd", student_logits, teacher_logits)
    with torch.autocast(student_logits.device.type, enabled=False):
        flat = [at_least_float32(x).flatten(2) for x in (student_logits, teacher_logits.detach())]
        student, teacher = (F.normalize(x @ x.transpose(1, 2), dim=-1) for x in flat)
    return (student - teacher).square().sum(dim=-1).mean()


@register("aicsd")
class AICSD(Distiller):
    """:func:`aicsd_loss` and its companions on the logits, under the schedule a = (step + 1) / max_iterations.

    ``aicsd_task`` is (a - 1) CE of the main logits: with weight 1 it turns the supervised cross entropy, which is
    always there with weight 1, into a CE (both over the same groups of images). The auxiliary cross entropy keeps its
    weight: the authors' networks have no auxiliary head. Without the schedule (what the authors call ICSD, when
    ``aicsd_kd`` is off too) it is 0.
    """

    title = "adaptive inter-class similarity"
    paper = "Mansourian et al., AICSD: Adaptive Inter-Class Similarity Distillation for Semantic Segmentation"
    year = 2023
    cost = "softmaxes and K x K matrices of the logits"
    terms = (Term("aicsd", 0.0, "weight of the inter-class similarity of the logits (times a, growing from 0 to 1); "
                                "9500 was published for --compat reference --group-size 6"),
             Term("aicsd_kd", 0.0, "weight of AICSD's logit distillation, a mean over classes too (times 1 - a)"),
             Term("aicsd_task", 0.0, "1: scale the cross entropy by a as well, as AICSD does"),
             Term("ickd", 0.0, "weight of the inter-channel correlation of the logits"))
    student_taps = ("logits",)
    teacher_taps = ("logits",)
    # KD 10 is the released code's. 100 is ours, for the paper's form, whose values are larger. Of trained networks (toy
    # streets, 11 classes) they are 90 to 120 times those of the released form in groups of 6 on 15x20 positions, 240 to
    # 330 times with the same logits enlarged to 64x64, and more for logits that are less alike; 100 times the paper's
    # is then 0.3, beside a cross entropy of 0.8. The README of the released code has pa_lambda 9500, which fits its
    # form and 6 images per GPU: --compat reference --lambda-aicsd 9500 --group-size 6 --no-aicsd-schedule. Its flags
    # (--pa_lambda, --ALW) are not those of its parser, and the schedule ALW is commented out there.
    preset = {"*": {"lambda_aicsd": 100.0, "lambda_aicsd_kd": 10.0, "lambda_aicsd_task": 1.0}}

    def __init__(self, max_iterations: int | None, form: str = "paper", ignore_label: int = -1, group_size: int = 0,
                 active: frozenset[str] = frozenset({"aicsd", "aicsd_kd", "aicsd_task", "ickd"})) -> None:
        """max_iterations: length of the schedule, None = no schedule. form: see :func:`aicsd_loss`. group_size: images
        per matrix of the released form, and per mean of the cross entropy."""
        super().__init__()
        if max_iterations is not None and max_iterations < 1:
            raise UserError(f"--max-iterations {max_iterations}: the schedule of aicsd needs 1 or more")
        self.max_iterations, self.form, self.group_size, self.active = max_iterations, form, group_size, active
        self.cross_entropy = SegCrossEntropyLoss(ignore_label, group_size)

    @classmethod
    def add_arguments(cls, group: argparse._ArgumentGroup) -> None:
        group.add_argument("--aicsd-schedule", "--no-aicsd-schedule", action=BooleanAction, default=True,
                           help="move the weight from logit distillation to labels and similarity")

    @classmethod
    def build(cls, context: BuildContext) -> AICSD:
        """Raises UserError when the logits of the networks do not correspond, or there is only one class."""
        check_logit_nets(cls, context, least_classes=2)
        options = context.options
        length = getattr(options, "max_iterations", 40000) if getattr(options, "aicsd_schedule", True) else None
        form = "released" if getattr(options, "compat", "fixed") == "reference" else "paper"
        return cls(length, form, context.ignore_label, getattr(options, "group_size", 2), context.active)

    def schedule(self, step: int) -> tuple[float, float]:
        """(a, 1 - a) of step 0, 1, ...: a is above 0 at the first and 1 at the last; (1, 1) without a schedule."""
        if self.max_iterations is None:
            return 1.0, 1.0
        a = min((step + 1) / self.max_iterations, 1.0)
        return a, 1.0 - a

    def forward(self, student: SegOutput, teacher: SegOutput, target: Tensor, step: int,
                generator: torch.Generator | None = None) -> dict[str, Tensor]:
        similarity, imitation = self.schedule(step)
        terms = {}
        if "aicsd" in self.active:
            terms["aicsd"] = similarity * aicsd_loss(student.logits, teacher.logits, self.form, self.group_size)
        if "aicsd_kd" in self.active:
            terms["aicsd_kd"] = imitation * aicsd_kd_loss(student.logits, teacher.logits)
        if "aicsd_task" in self.active:
            terms["aicsd_task"] = (similarity - 1.0) * self.cross_entropy(student.logits, target)
        if "ickd" in self.active:
            terms["ickd"] = ickd_loss(student.logits, teacher.logits)
        return terms
