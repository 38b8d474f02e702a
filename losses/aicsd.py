"""Adaptive inter-class similarity distillation (Mansourian, Ahmadi and Kasaei, arXiv 2308.04243; MTAP 2025).

Each class channel of the logits becomes a distribution over the positions; the divergences between the classes of one
image form a matrix, and the student's matrix has to be like the teacher's (``aicsd``). A schedule moves the weight
from imitation to supervision and similarity: the objective is a (CE + aicsd) + (1 - a) KD, with a growing from 0 to 1.
``ickd`` is the inter-channel correlation of Liu et al. (ICCV 2021) on logits, which the authors compare with.

The default is the paper's form. The released code (``compat="reference"``) departs from it: the softmax runs along the
rows of the map only, the divergence is sum(p_j log p_j - p_j p_i) because a probability is passed where its logarithm
is expected, one triangle of the matrix is mirrored although the divergence is not symmetric, the matrix is averaged
over the images of a GPU (6 in the authors' runs; ``group_size``) and the error divided by their number once more.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from losses import core
from losses.core import Batch, Distiller, Needs, NetInfo, OptionGroup, RunFacts, Term, option, register
from losses.core.logit_losses import kd_loss


def divergence_matrix(logits: Tensor) -> Tensor:
    """KL(p_i || p_j) [B, K, K] between the classes of each image, p = softmax of [B, K, h, w] over all positions."""
    log_p = core.at_least_float32(logits).flatten(2).log_softmax(dim=-1)
    p = log_p.exp()
    return (p * log_p).sum(dim=-1, keepdim=True) - p @ log_p.transpose(1, 2)


def released_matrix(logits: Tensor) -> Tensor:
    """The released code's matrix [groups, K, K] of [groups, images, K, h, w], an average over the images of a group."""
    log_p = core.at_least_float32(logits).log_softmax(dim=-2)
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
    """Mean squared difference of the inter-class matrices, each row of a matrix at unit length. Logits [B, K, h, w] of
    equal shapes, or UserError. form: "paper" for the matrices of single images, :func:`divergence_matrix`; "released"
    for :func:`released_matrix` of ``group_size`` neighboring images (0 = all), and the division by their number.
    Computed in float32 or better; no gradient reaches the teacher."""
    core.check_logits("aicsd", student_logits, teacher_logits)
    teacher_logits = teacher_logits.detach()
    with core.full_precision(student_logits):
        if form == "released":
            return core.mean_over_groups(_released_difference, student_logits, teacher_logits, group_size)
        return F.mse_loss(*(F.normalize(divergence_matrix(x), dim=-1) for x in (student_logits, teacher_logits)))


def aicsd_kd_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The KL divergence of the logits per pixel, averaged over pixels *and classes*: ``kd_loss`` / K."""
    return kd_loss(student_logits, teacher_logits, method="aicsd") / student_logits.shape[1]


def ickd_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Squared difference of the channel correlations of [B, K, h, w], rows at unit length, summed over a row of the
    K x K matrix and averaged over rows and images. No gradient reaches the teacher."""
    core.check_logits("ickd", student_logits, teacher_logits)
    with core.full_precision(student_logits):
        flat = [core.at_least_float32(x).flatten(2) for x in (student_logits, teacher_logits.detach())]
        student, teacher = (F.normalize(x @ x.transpose(1, 2), dim=-1) for x in flat)
    return (student - teacher).square().sum(dim=-1).mean()


@dataclass(frozen=True)
class AICSDOptions(OptionGroup):
    """Settings of AICSD."""
    aicsd_schedule: bool = option(True, "move the weight from logit distillation to labels and similarity")


@register("aicsd")
class AICSD(Distiller):
    """:func:`aicsd_loss` and its companions on the logits, under the schedule a = (step + 1) / max_iterations.
    ``aicsd_task`` is no loss: with weight 1 the cross entropy of the main logits is multiplied by a. That of auxiliary
    logits keeps its weight: the authors' networks have none. Without the schedule (which the authors call ICSD, when
    ``aicsd_kd`` is off too) a and 1 - a are 1."""

    title = "adaptive inter-class similarity"
    paper = "Mansourian et al., AICSD: Adaptive Inter-Class Similarity Distillation for Semantic Segmentation"
    year = 2023
    cost = "softmaxes and K x K matrices of the logits"
    Options = AICSDOptions
    terms = (Term("aicsd", 0.0, "weight of the inter-class similarity of the logits (times a, growing from 0 to 1); "
                                "9500 was published for the released form in groups of 6 images"),
             Term("aicsd_kd", 0.0, "weight of AICSD's logit distillation, a mean over classes too (times 1 - a)"),
             Term("aicsd_task", 0.0, "1: scale the cross entropy by a as well, as AICSD does; below 1: in part",
                  scales_task=True),
             Term("ickd", 0.0, "weight of the inter-channel correlation of the logits"))
    needs = Needs.both("logits", same_classes=True, least_classes=2)
    # KD 10 is the released code's; 100 is this project's, for the paper's form. Its values, of trained networks (toy
    # streets, 11 classes), are 90 to 120 times those of the released form in groups of 6 on 15x20 positions, 240 to 330
    # times at 64x64, more for logits that are less alike; times 100 that is 0.3, beside a cross entropy of 0.8. The
    # released README has pa_lambda 9500, which fits its form and 6 images per GPU only: compat reference, lambda_aicsd
    # 9500, group_size 6, no schedule. Its flags (pa_lambda, ALW) are not in its parser; ALW is commented out there.
    preset = {"*": {"lambda_aicsd": 100.0, "lambda_aicsd_kd": 10.0, "lambda_aicsd_task": 1.0}}

    def __init__(self, options: AICSDOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> None:
        super().__init__()
        self.max_iterations = run.max_iterations if options.aicsd_schedule else None
        self.form, self.group_size, self.active = "released" if run.as_released else "paper", run.group_size, run.active

    def schedule(self, step: int) -> tuple[float, float]:
        """(a, 1 - a) of step 0, 1, ...: a is above 0 at the first and 1 at the last; (1, 1) without a schedule."""
        if self.max_iterations is None:
            return 1.0, 1.0
        a = min((step + 1) / self.max_iterations, 1.0)
        return a, 1.0 - a

    def task_scale(self, step: int) -> float:
        return self.schedule(step)[0]

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        pair, (similarity, imitation) = (batch.student.logits, batch.teacher.logits), self.schedule(batch.step)
        every = {"aicsd": lambda: similarity * aicsd_loss(*pair, self.form, self.group_size),
                 "aicsd_kd": lambda: imitation * aicsd_kd_loss(*pair), "ickd": lambda: ickd_loss(*pair)}
        return {name: loss() for name, loss in every.items() if name in self.active}
