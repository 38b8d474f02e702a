"""Knowledge tailoring (Cheung et al., 2025; public code, a fork of CIRKD).

Logit tailoring (``kt_logit``): inside a class's label mask logits are raised to their mean, outside they are clipped
to theirs, and CWD compares what results. Feature tailoring (``kt_feature``): the channels of one head map are mixed
into the space of the other's by their correlations; for the first 10000 iterations the student's, then the teacher's.
Contrast (``kt_contrast``): a mixture by correlation has to be nearer than one by (1 - correlation).

Kept from the released code: the projections are random and stay so, because they are in no optimizer, and the
distances of the contrast run along the rows of the maps, as a triplet loss of maps with four axes takes them. Trained
projections (``--kt-train-projections``) solve the contrast by themselves: it is 0 within a few iterations.
``--compat reference`` compares logits at crop size, ``fixed`` at their stride, which gives the same numbers but for
cells that label edges cut.
"""
from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses.cwd import cwd_loss
from losses.distiller import BuildContext, Distiller, Term, check_taps, register
from losses.feature_mse import check_maps
from losses.kd import kd_loss
from losses.logits import check_logit_maps, check_logit_nets, labels_at
from losses.task import at_least_float32
from models.output import SegOutput
from utils.cli import BooleanAction, number
from utils.errors import UserError


class Tailored(NamedTuple):
    """Tailored logits [B, K, h, w] inside and outside the label mask of each class, 0 elsewhere."""

    inside: Tensor
    outside: Tensor


def tailor_logits(logits: Tensor, mask: Tensor) -> Tailored:
    """Sharpen logits [B, K, h, w] with mask, bool [B, K, h, w]: where the label is that class.

    Inside, nothing stays below the mean of the class's *positive* logits inside (nothing changes without one).
    Outside, nothing stays above the sum of the logits outside divided by the number of *all* positions. Both per
    image and class, as in the released code.
    """
    inside, outside = logits * mask, logits * ~mask
    positive = (inside > 0).sum(dim=(2, 3), keepdim=True)
    floor = inside.clamp(min=0).sum(dim=(2, 3), keepdim=True) / positive.clamp(min=1)
    raised = torch.where(positive > 0, torch.maximum(inside, floor), inside)
    clipped = torch.minimum(outside, outside.mean(dim=(2, 3), keepdim=True))
    return Tailored(raised * mask, clipped * ~mask)


def logit_tailoring_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 4.0,
                         ignore_label: int = -1) -> Tensor:
    """Sum of three CWD terms: student and tailored teacher, and both tailored inside and outside the masks.

    Logits [B, K, h, w] of equal shapes, or UserError; labels: int64 [B, h, w]. Pixels that are ignored are outside of
    every class. No gradient reaches the teacher.
    """
    check_logit_maps("kt", student_logits, teacher_logits)
    classes = torch.arange(student_logits.shape[1], device=labels.device).view(1, -1, 1, 1)
    mask = (labels[:, None] == classes) & (labels != ignore_label)[:, None]
    student_logits, teacher_logits = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    student, teacher = tailor_logits(student_logits, mask), tailor_logits(teacher_logits, mask)
    return (cwd_loss(student_logits, teacher.inside + teacher.outside, temperature)
            + cwd_loss(student.inside, teacher.inside, temperature)
            + cwd_loss(student.outside, teacher.outside, temperature))


def mix_channels(source: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """(R source, (1 - R) source): source [B, C, h, w] mixed into the channels of goal [B, D, h, w]; both [B, D, h, w].

    R [B, D, C] holds the cosine similarities over the positions between the channels of goal and source.
    """
    with torch.autocast(source.device.type, enabled=False):
        flat, other = at_least_float32(source).flatten(2), at_least_float32(goal).flatten(2)
        correlation = F.normalize(other, dim=2) @ F.normalize(flat, dim=2).transpose(1, 2)
        high = correlation @ flat
        low = flat.sum(dim=1, keepdim=True) - high
    return tuple(x.unflatten(2, source.shape[-2:]) for x in (high, low))


def contrast_loss(anchor: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """Mean of max(0, |anchor - high| - |anchor - low| + 1) for maps [B, C, h, w].

    The lengths are Euclidean and over the w columns of each row and channel.
    """
    return F.triplet_margin_loss(*(at_least_float32(x) for x in (anchor, high, low)), margin=1.0, p=2.0, eps=1e-7)


def bottleneck(channels: int) -> nn.Sequential:
    """Three 1x1 convolutions by way of half the channels: [B, C, h, w] -> the same shape."""
    hidden = max(channels // 2, 1)
    return nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, hidden, 1), nn.ReLU(),
                         nn.Conv2d(hidden, channels, 1))


class FeatureTailoring(nn.Module):
    """The terms on head maps, and their projections.

    switch: iterations during which the student's channels are mixed into the teacher's space; afterwards the reverse.
    trained: train the projections; otherwise they stay as they were drawn.
    """

    def __init__(self, student_channels: int, teacher_channels: int, switch: int = 10000, temperature: float = 4.0,
                 trained: bool = False) -> None:
        super().__init__()
        self.switch, self.temperature, self.trained = switch, temperature, trained
        self.student_tail, self.teacher_tail = bottleneck(teacher_channels), bottleneck(student_channels)
        self.anchor = nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=False)
        self.requires_grad_(trained)

    def forward(self, student: Tensor, teacher: Tensor, step: int) -> dict[str, Tensor]:
        """``kt_feature`` and ``kt_contrast`` of maps [B, C_s, h, w] and [B, C_t, h, w]; UserError if the sizes differ.

        No gradient reaches the teacher.
        """
        check_maps("kt", student, teacher)
        teacher = teacher.detach()
        if step + 1 < self.switch:
            high, low = (self.student_tail(x) for x in mix_channels(student, teacher))
            terms = {"kt_feature": cwd_loss(high, teacher, self.temperature),
                     "kt_contrast": contrast_loss(self.anchor(student), high, low)}
        else:
            high, low = (self.teacher_tail(x) for x in mix_channels(teacher, student))
            terms = {"kt_feature": cwd_loss(student, high, self.temperature),
                     "kt_contrast": contrast_loss(student, high, low)}
        if self.trained:
            # every process has to see a gradient, if only zero, for the projections that this stage does not use
            unused = sum(p.sum() for p in self.parameters()) * 0.0
            terms = {name: term + unused for name, term in terms.items()}
        return terms


@register("kt")
class KT(Distiller):
    """Logit and feature tailoring, and the published runs' distillation of the auxiliary logits (``kt_aux``), which is
    left out where a network has no auxiliary head."""

    title = "knowledge tailoring of logits and features"
    paper = "Cheung et al., Knowledge Tailoring: Bridging the Teacher-Student Gap in Semantic Segmentation"
    year = 2025
    cost = "softmaxes of head and logits, masked means, channel correlations, three 1x1 convs twice"
    terms = (Term("kt_logit", 0.0, "weight of KT's tailored logits"),
             Term("kt_feature", 0.0, "weight of KT's tailored head features"),
             Term("kt_contrast", 0.0, "weight of KT's contrast of high and low correlations"),
             Term("kt_aux", 0.0, "weight of KT's divergence between auxiliary logits (at --kd-temperature)"))
    student_taps = ("logits", "head")
    teacher_taps = ("logits", "head")
    # train_KT.sh and the parser's defaults of the released code (Cityscapes)
    preset = {"*": {"lambda_kd": 1.0, "kd_temperature": 4.0, "lambda_kt_logit": 1.0, "lambda_kt_feature": 1.0,
                    "lambda_kt_contrast": 1.0, "lambda_kt_aux": 0.4, "weight_decay": 5e-4}}

    def __init__(self, features: FeatureTailoring | None, *, temperature: float = 4.0, kd_temperature: float = 4.0,
                 released: bool = False, ignore_label: int = -1,
                 active: frozenset[str] = frozenset({"kt_logit", "kt_feature", "kt_contrast", "kt_aux"})) -> None:
        super().__init__()
        for flag, value in (("kt", temperature), ("kd", kd_temperature)):
            if value <= 0:
                raise UserError(f"--{flag}-temperature {value:g}: expected a number above 0")
        self.features, self.temperature, self.kd_temperature = features, temperature, kd_temperature
        self.released, self.ignore_label, self.active = released, ignore_label, active
        reads = {"logits": {"kt_logit"}, "aux": {"kt_aux"}, "head": {"kt_feature", "kt_contrast"}}
        self.student_taps = self.teacher_taps = tuple(tap for tap, terms in reads.items() if terms & active)

    @classmethod
    def add_arguments(cls, group: argparse._ArgumentGroup) -> None:
        group.add_argument("--kt-switch", type=number(int, 0), default=10000, metavar="N",
                           help="iterations of feature tailoring in the teacher's space; then in the student's")
        group.add_argument("--kt-temperature", type=number(float, 0, open_low=True), default=4.0, metavar="T",
                           help="softmax temperature of kt_logit and kt_feature")
        group.add_argument("--kt-train-projections", "--no-kt-train-projections", action=BooleanAction, default=False,
                           help="train the projections of the head maps (released code: random ones)")

    @classmethod
    def build(cls, context: BuildContext) -> KT:
        """Raises UserError when a network lacks a tap, or the logits do not correspond."""
        check_taps(cls, context.student, context.teacher)
        check_logit_nets(cls, context)
        options, active = context.options, context.active
        if not all("aux" in net.channels for net in (context.student, context.teacher)):
            active = active - {"kt_aux"}
        if not active & {t.name for t in cls.terms}:
            raise UserError("--lambda-kt-aux: student and teacher need an auxiliary head each (--aux), and no other "
                            "term of kt has a weight")
        released = getattr(options, "compat", "fixed") == "reference"
        temperature = getattr(options, "kt_temperature", 4.0)
        features = None
        if active & {"kt_feature", "kt_contrast"}:
            features = FeatureTailoring(context.student.channels["head"], context.teacher.channels["head"],
                                        getattr(options, "kt_switch", 10000), temperature,
                                        getattr(options, "kt_train_projections", False))
        return cls(features, temperature=temperature, kd_temperature=getattr(options, "kd_temperature", 4.0),
                   released=released, ignore_label=context.ignore_label, active=active)

    def forward(self, student: SegOutput, teacher: SegOutput, target: Tensor, step: int,
                generator: torch.Generator | None = None) -> dict[str, Tensor]:
        terms = self.features(student.head, teacher.head, step) if self.features is not None else {}
        if "kt_logit" in self.active:
            terms["kt_logit"] = self.logit_term(student.logits, teacher.logits, target)
        if "kt_aux" in self.active:
            terms["kt_aux"] = kd_loss(student.aux, teacher.aux, self.kd_temperature)
        return {name: term for name, term in terms.items() if name in self.active}

    def logit_term(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """:func:`logit_tailoring_loss` of [B, K, h, w] at label size (as released) or with labels at logit size."""
        if self.released:
            student, teacher = (F.interpolate(x, size=target.shape[-2:], mode="nearest") for x in (student, teacher))
        else:
            target = labels_at(target, student.shape[-2:])
        return logit_tailoring_loss(student, teacher, target, self.temperature, self.ignore_label)
