"""CWD: every channel as a distribution over the positions (Shu et al., ICCV 2021)."""
from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses.adversarial import PUBLISHED_ADVERSARIAL, QUICK_ADVERSARIAL, WITHOUT_ADVERSARIAL
from losses.distiller import BuildContext, Distiller, Term, check_taps, register
from losses.feature_mse import check_maps
from losses.logits import check_logit_nets
from losses.skd import check_strides
from losses.task import at_least_float32
from models.output import SegOutput
from utils.cli import number
from utils.errors import UserError

NORMS = ("channel", "spatial", "channel_mean")
DIVERGENCES = ("kl", "mse")
TAPS = {"cwd_feat": "head", "cwd_logit": "logits"}
#: Option name without "cwd_" -> default: what CIRKD wrote into its code.
DEFAULTS = {"temperature": 4.0, "norm": "channel", "divergence": "kl", "divide_by": "student"}


def _channel_log_softmax(x: Tensor) -> Tensor:
    return x.flatten(2).log_softmax(dim=2)


def _spatial_log_softmax(x: Tensor) -> Tensor:
    return x.flatten(2).log_softmax(dim=1)


def _divergence_sum(student: Tensor, teacher: Tensor, norm: str, divergence: str) -> Tensor:
    """Sum of the divergence between maps [B, C, h, w] that are divided by the temperature already."""
    if norm == "channel_mean":
        return F.mse_loss(student.mean(dim=(2, 3)), teacher.mean(dim=(2, 3)), reduction="sum")
    log_softmax = _channel_log_softmax if norm == "channel" else _spatial_log_softmax
    ours, theirs = log_softmax(student), log_softmax(teacher)
    if divergence == "kl":
        return F.kl_div(ours, theirs, reduction="sum", log_target=True)
    return F.mse_loss(ours.exp(), theirs.exp(), reduction="sum")


def cwd_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0, *, channels: int | None = None,
             norm: str = "channel", divergence: str = "kl") -> Tensor:
    """T^2 / (B * channels) times the KL divergence of the student's channels from the teacher's, summed.

    student, teacher: [B, C, h, w]; a channel is a softmax over the h * w positions at temperature T. channels: what
    to divide by, C unless given. No gradient reaches the teacher. Raises UserError when the shapes differ.

    TorchDistiller's variants: norm "spatial" takes the softmax over the channels and divides by B * h * w,
    "channel_mean" compares the means of the channels; divergence "mse" takes the squared difference, at temperature 1
    whatever is given ("channel_mean" has no other).
    """
    check_maps("cwd", student, teacher, channels=True)
    if norm not in NORMS or divergence not in DIVERGENCES or (norm, divergence) == ("channel_mean", "kl"):
        raise UserError(f"--cwd-norm {norm}, --cwd-divergence {divergence}: expected one of {', '.join(NORMS)}, and kl "
                        "or mse (channel_mean with mse only)")
    if divergence == "mse":
        temperature = 1.0
    student, teacher = (at_least_float32(x) / temperature for x in (student, teacher.detach()))
    total = _divergence_sum(student, teacher, norm, divergence)
    batch, width, height, breadth = student.shape
    count = height * breadth if norm == "spatial" else channels or width
    return total * (temperature ** 2 / (batch * count))


@register("cwd")
class CWD(Distiller):
    """``cwd_feat``: the head features through :func:`cwd_loss`; ``cwd_logit``: the logits.

    student_channels, teacher_channels: widths of the head features, for a run with cwd_feat; a 1x1 convolution without
    bias maps the student's to the teacher's where they differ. active: the terms to compute. divide_by: "student"
    (as published) or "teacher" channels, see :meth:`feature_loss`.
    """

    title = "channel-wise distillation of features and logits, with the adversarial term"
    paper = "Shu et al., Channel-wise Knowledge Distillation for Dense Prediction"
    year = 2021
    terms = (Term("cwd_feat", 0.0, "weight of CWD on the head features"),
             Term("cwd_logit", 0.0, "weight of CWD on the logits"))
    student_taps = ("logits", "head")
    teacher_taps = ("logits", "head")
    # CIRKD's Cityscapes script of CWD; no script of another data set was released, the weights are taken over
    preset = {"*": {"lambda_kd": 1.0, "lambda_cwd_feat": 50.0, "lambda_cwd_logit": 3.0, **PUBLISHED_ADVERSARIAL},
              **WITHOUT_ADVERSARIAL}
    cost = "softmaxes of head and logits; discriminator, three passes of it"
    quick = QUICK_ADVERSARIAL

    def __init__(self, student_channels: int = 0, teacher_channels: int = 0,
                 active: frozenset[str] = frozenset(TAPS), temperature: float = 4.0, norm: str = "channel",
                 divergence: str = "kl", divide_by: str = "student") -> None:
        super().__init__()
        self.active = [name for name in TAPS if name in active]
        self.student_taps = self.teacher_taps = tuple(TAPS[name] for name in self.active)
        self.settings = {"temperature": temperature, "norm": norm, "divergence": divergence}
        if (norm, divergence) == ("channel_mean", "kl"):
            raise UserError("--cwd-norm channel_mean compares means, not distributions: use --cwd-divergence mse")
        self.divisor = student_channels if divide_by == "student" else teacher_channels
        aligned = "cwd_feat" in active and student_channels != teacher_channels
        self.conv = nn.Conv2d(student_channels, teacher_channels, 1, bias=False) if aligned else nn.Identity()

    @classmethod
    def add_arguments(cls, group: argparse._ArgumentGroup) -> None:
        group.add_argument("--cwd-temperature", type=number(float, 0, open_low=True), metavar="T",
                           default=DEFAULTS["temperature"], help="softmax temperature of both terms")
        group.add_argument("--cwd-norm", choices=NORMS, default=DEFAULTS["norm"],
                           help="softmax over the positions of a channel, over the channels, or means of channels")
        group.add_argument("--cwd-divergence", choices=DIVERGENCES, default=DEFAULTS["divergence"],
                           help="mse: squared difference, at temperature 1")
        group.add_argument("--cwd-divide-by", choices=("student", "teacher"), default=DEFAULTS["divide_by"],
                           help="channels that the feature term is divided by; student: as in the published runs, "
                                "although the sum runs over the teacher's")

    @classmethod
    def build(cls, context: BuildContext) -> CWD:
        """Raises UserError when a tap is missing, or class counts or strides differ."""
        options = {k: getattr(context.options, f"cwd_{k}", v) for k, v in DEFAULTS.items()}
        widths = (net.channels.get("head", 0) for net in (context.student, context.teacher))
        described = cls(active=context.active, **options)
        check_taps(described, context.student, context.teacher)
        (check_logit_nets if "cwd_logit" in context.active else check_strides)(described, context)
        return cls(*widths, context.active, **options)

    def forward(self, student: SegOutput, teacher: SegOutput, target: Tensor, step: int,
                generator: torch.Generator | None = None) -> dict[str, Tensor]:
        terms = {}
        if "cwd_feat" in self.active:
            terms["cwd_feat"] = self.feature_loss(student.head, teacher.head)
        if "cwd_logit" in self.active:
            terms["cwd_logit"] = cwd_loss(student.logits, teacher.logits, **self.settings)
        return terms

    def feature_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """:func:`cwd_loss` of maps [B, C_s, h, w] and [B, C_t, h, w] after alignment.

        The sum runs over C_t channels and is divided by the student's C_s, as in the code behind the published rows:
        with 128 and 256 channels the term is twice the formula, and their weight of 50 belongs to that.
        """
        return cwd_loss(self.conv(student), teacher, channels=self.divisor, **self.settings)
