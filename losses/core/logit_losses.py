"""Divergences of two maps that several methods are made of: softmax over the classes (KD), over the positions (CWD)."""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from losses.core.checks import at_least_float32, check_logits, check_maps
from utils.errors import UserError
from utils.options import OptionGroup, option

CWD_NORMS = ("channel", "spatial", "channel_mean")
CWD_DIVERGENCES = ("kl", "mse")
CWD_TEMPERATURE = 4.0  # of the published runs


@dataclass(frozen=True)
class KDOptions(OptionGroup):
    """Settings of every method with a plain divergence of logits."""
    kd_temperature: float = option(1.0, "softmax temperature of the logits", above=0, metavar="T")


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, method: str = "kd") -> Tensor:
    """T^2 times the KL divergence of the student from the teacher, summed over classes, averaged over positions (Hinton
    et al., 2015), of logits [B, K, h, w] at the networks' stride: every position counts, also where the label is
    ignored. UserError, which begins with ``method``, when the shapes differ. No gradient reaches the teacher."""
    check_logits(method, student_logits, teacher_logits)
    batch, _, height, width = student_logits.shape
    log_q, log_p = (F.log_softmax(at_least_float32(logits) / temperature, dim=1)
                    for logits in (student_logits, teacher_logits.detach()))
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) * (temperature ** 2 / (batch * height * width))


def _cwd_sum(student: Tensor, teacher: Tensor, norm: str, divergence: str) -> Tensor:
    """Sum of the divergence between maps [B, C, h, w] that are divided by the temperature already."""
    if norm == "channel_mean":
        return F.mse_loss(student.mean(dim=(2, 3)), teacher.mean(dim=(2, 3)), reduction="sum")
    log_q, log_p = (x.flatten(2).log_softmax(dim=2 if norm == "channel" else 1) for x in (student, teacher))
    if divergence == "kl":
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return F.mse_loss(log_q.exp(), log_p.exp(), reduction="sum")


def check_cwd(norm: str, divergence: str) -> None:
    """Raise UserError for a combination that means nothing."""
    settings = ["cwd_norm", "cwd_divergence"]
    if norm not in CWD_NORMS or divergence not in CWD_DIVERGENCES:
        raise UserError(f"cwd: norm {norm} with divergence {divergence}: expected one of {', '.join(CWD_NORMS)} with "
                        f"one of {', '.join(CWD_DIVERGENCES)}", settings=settings)
    if (norm, divergence) == ("channel_mean", "kl"):
        raise UserError("cwd: norm channel_mean compares means, not distributions: expected divergence mse",
                        settings=settings)


def cwd_loss(student: Tensor, teacher: Tensor, temperature: float = CWD_TEMPERATURE, *, channels: int | None = None,
             norm: str = "channel", divergence: str = "kl", method: str = "cwd") -> Tensor:
    """T^2 / (B * channels) times the KL divergence of the student's channels from the teacher's, summed (Shu et al.,
    ICCV 2021, equation 4). student, teacher (no gradient): [B, C, h, w]; a channel is a softmax over the positions at
    temperature T. channels: C unless given. UserError, which begins with ``method``, when the shapes differ.

    TorchDistiller's variants: norm "spatial" takes the softmax over the channels and divides by B * h * w,
    "channel_mean" compares the means of the channels; divergence "mse" takes the squared difference, at temperature 1
    whatever is given ("channel_mean" has no other)."""
    check_maps(method, student, teacher, channels=True)
    check_cwd(norm, divergence)
    temperature = 1.0 if divergence == "mse" else temperature
    student, teacher = (at_least_float32(x) / temperature for x in (student, teacher.detach()))
    count = student.shape[2:].numel() if norm == "spatial" else channels or student.shape[1]
    return _cwd_sum(student, teacher, norm, divergence) * (temperature ** 2 / (len(student) * count))
