"""Knowledge tailoring (Cheung et al., 2025; public code, a fork of CIRKD).

Logit tailoring (``kt_logit``): inside a class's label mask logits are raised to their mean, outside they are clipped
to theirs, and CWD compares what results. Feature tailoring (``kt_feature``): the channels of one head map are mixed
into the space of the other's by their correlations; before iteration 10000 the student's, from it on the teacher's.
Contrast (``kt_contrast``): a mixture by correlation has to be nearer than one by (1 - correlation).

Kept from the released code: the projections are random and stay so, because they are in no optimizer, and the
distances of the contrast run along the rows of the maps, as a triplet loss of four axes takes them. Trained projections
(``kt_train_projections``) solve the contrast by themselves: it is 0 within a few iterations. ``compat="reference"``
compares logits at crop size, ``fixed`` at their stride: the same numbers but for cells that label edges cut.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses import core
from losses.core import Batch, Distiller, Needs, NetInfo, RunFacts, Term, at_least_float32, option, register
from losses.core.logit_losses import KDOptions, cwd_loss, kd_loss
from losses.core.needs import both_have_aux
from utils.errors import UserError


def tailor_logits(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, K, h, w] sharpened (inside, outside) of mask, bool [B, K, h, w]: where the label is that class; 0
    elsewhere. Inside, nothing stays below the mean of the class's *positive* logits inside (nothing changes without
    one). Outside, nothing stays above the sum of the logits outside divided by the number of *all* positions. Both per
    image and class, as released."""
    inside, outside = logits * mask, logits * ~mask
    positive = (inside > 0).sum(dim=(2, 3), keepdim=True)
    floor = inside.clamp(min=0).sum(dim=(2, 3), keepdim=True) / positive.clamp(min=1)
    raised = torch.where(positive > 0, torch.maximum(inside, floor), inside)
    clipped = torch.minimum(outside, outside.mean(dim=(2, 3), keepdim=True))
    return raised * mask, clipped * ~mask


def logit_tailoring_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float,
                         ignore_label: int = -1) -> Tensor:
    """Sum of three CWD terms: student and tailored teacher, and both tailored inside and outside the masks.
    Logits [B, K, h, w] of equal shapes, or UserError; labels: int64 [B, h, w]; ignored pixels are outside of every
    class. No gradient reaches the teacher."""
    core.check_logits("kt", student_logits, teacher_logits)
    classes = torch.arange(student_logits.shape[1], device=labels.device).view(1, -1, 1, 1)
    mask = (labels[:, None] == classes) & (labels != ignore_label)[:, None]
    student_logits = at_least_float32(student_logits)
    student, teacher = (tailor_logits(x, mask) for x in (student_logits, at_least_float32(teacher_logits.detach())))
    pairs = (student_logits, teacher[0] + teacher[1]), *zip(student, teacher, strict=True)
    return sum(cwd_loss(*pair, temperature) for pair in pairs)


def mix_channels(source: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """(R source, (1 - R) source): source [B, C, h, w] mixed into the channels of goal [B, D, h, w]; both [B, D, h, w].
    R [B, D, C] holds the cosine similarities over the positions between the channels of goal and source."""
    with core.full_precision(source):
        flat, other = (at_least_float32(x).flatten(2) for x in (source, goal))
        correlation = F.normalize(other, dim=2) @ F.normalize(flat, dim=2).transpose(1, 2)
        high = correlation @ flat
        low = flat.sum(dim=1, keepdim=True) - high
    return tuple(x.unflatten(2, source.shape[-2:]) for x in (high, low))


def contrast_loss(anchor: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """Mean of max(0, |anchor - high| - |anchor - low| + 1) for maps [B, C, h, w], the lengths Euclidean and over the w
    columns of each row and channel."""
    return F.triplet_margin_loss(*(at_least_float32(x) for x in (anchor, high, low)), margin=1.0, p=2.0, eps=1e-7)


def bottleneck(channels: int) -> nn.Sequential:
    """Three 1x1 convolutions by way of half the channels: [B, C, h, w] -> the same shape."""
    hidden = max(channels // 2, 1)
    return nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, hidden, 1), nn.ReLU(),
                         nn.Conv2d(hidden, channels, 1))


class FeatureTailoring(nn.Module):
    """The terms on head maps, and their projections."""

    def __init__(self, student_channels: int, teacher_channels: int, options: KTOptions) -> None:
        super().__init__()
        self.options = options
        self.student_tail, self.teacher_tail = bottleneck(teacher_channels), bottleneck(student_channels)
        self.anchor = nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=False)
        self.requires_grad_(options.kt_train_projections)

    def forward(self, student: Tensor, teacher: Tensor, step: int) -> dict[str, Tensor]:
        """``kt_feature`` and ``kt_contrast`` of maps [B, C_s, h, w] and [B, C_t, h, w]; UserError if the sizes differ.
        No gradient reaches the teacher."""
        core.check_maps("kt", student, teacher)
        teacher = teacher.detach()
        if step + 1 < self.options.kt_switch:
            high, low = (self.student_tail(x) for x in mix_channels(student, teacher))
            pair, anchor = (high, teacher), self.anchor(student)
        else:
            high, low = (self.teacher_tail(x) for x in mix_channels(teacher, student))
            pair, anchor = (student, high), student
        terms = {"kt_feature": cwd_loss(*pair, self.options.kt_temperature),
                 "kt_contrast": contrast_loss(anchor, high, low)}
        if self.options.kt_train_projections:
            # every process has to see a gradient, if only zero, for the projections that this stage does not use
            unused = sum(p.sum() for p in self.parameters()) * 0.0
            terms = {name: term + unused for name, term in terms.items()}
        return terms


@dataclass(frozen=True)
class KTOptions(KDOptions):
    """Settings of KT; its divergence of auxiliary logits has KD's temperature."""
    kt_switch: int = option(10000, "first iteration, counted from 1, of feature tailoring in the student's space; "
                                   "before it, in the teacher's", at_least=0, metavar="N")
    kt_temperature: float = option(4.0, "softmax temperature of kt_logit and kt_feature", above=0, metavar="T")
    kt_train_projections: bool = option(False, "train the projections of the head maps (released code: random ones)")


@register("kt")
class KT(Distiller):
    """Logit and feature tailoring, and the published runs' distillation of the auxiliary logits (``kt_aux``), which is
    left out where a network has no auxiliary head."""

    title = "knowledge tailoring of logits and features"
    paper = "Cheung et al., Knowledge Tailoring: Bridging the Teacher-Student Gap in Semantic Segmentation"
    year = 2025
    cost = "softmaxes of head and logits, masked means, channel correlations, three 1x1 convs twice"
    Options = KTOptions
    terms = (Term("kt_logit", 0.0, "weight of KT's tailored logits", needs_labels=True),
             Term("kt_feature", 0.0, "weight of KT's tailored head features"),
             Term("kt_contrast", 0.0, "weight of KT's contrast of high and low correlations"),
             Term("kt_aux", 0.0, "weight of KT's divergence between auxiliary logits (at the temperature of KD)"))
    needs = Needs.both("logits", "head", same_classes=True)
    # train_KT.sh and the parser's defaults of the released code (Cityscapes)
    preset = {"*": {"lambda_kd": 1.0, "kd_temperature": 4.0, "lambda_kt_logit": 1.0, "lambda_kt_feature": 1.0,
                    "lambda_kt_contrast": 1.0, "lambda_kt_aux": 0.4, "weight_decay": 5e-4}}

    def __init__(self, options: KTOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> None:
        super().__init__()
        self.options, self.as_released, self.ignore_label = options, run.as_released, run.ignore_label
        if not both_have_aux(student, teacher):
            self.terms = tuple(term for term in self.terms if term.name != "kt_aux")
        self.active = {term.name for term in self.terms} & set(run.active)
        self.features = None
        if self.active & {"kt_feature", "kt_contrast"}:
            self.features = FeatureTailoring(student.channels["head"], teacher.channels["head"], options)

    @classmethod
    def requires(cls, options: KTOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> Needs:
        aux = {"kt_aux"} if both_have_aux(student, teacher) else set()
        terms_of = {"logits": {"kt_logit"}, "head": {"kt_feature", "kt_contrast"}, "aux": aux}
        taps = [tap for tap, terms in terms_of.items() if terms & set(run.active)]
        if not taps:
            raise UserError("kt_aux: student and teacher need an auxiliary head each, and no other term of kt has a "
                            "weight", settings=["lambda_kt_aux", "aux"])
        return Needs.both(*taps, same_classes="logits" in taps or "aux" in taps, same_stride=True)

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        student, teacher = batch.student, batch.teacher
        terms = self.features(student.head, teacher.head, batch.step) if self.features else {}
        if "kt_logit" in self.active:
            labeled = batch.with_labels()
            logits, target = (labeled.student.logits, labeled.teacher.logits), labeled.target
            if self.as_released:
                logits = (F.interpolate(x, size=target.shape[-2:], mode="nearest") for x in logits)
            else:
                target = core.labels_at(target, student.logits.shape[-2:])
            terms["kt_logit"] = logit_tailoring_loss(*logits, target, self.options.kt_temperature, self.ignore_label)
        if "kt_aux" in self.active:
            terms["kt_aux"] = kd_loss(student.aux, teacher.aux, self.options.kd_temperature, "kt")
        return {name: term for name, term in terms.items() if name in self.active}
