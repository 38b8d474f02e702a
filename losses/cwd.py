"""CWD: every channel as a distribution over the positions (Shu et al., ICCV 2021)."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from losses.core import Batch, Distiller, Needs, NetInfo, OptionGroup, RunFacts, Term, option, register
from losses.core.logit_losses import CWD_DIVERGENCES, CWD_NORMS, CWD_TEMPERATURE, check_cwd, cwd_loss

TAPS = {"cwd_logit": "logits", "cwd_feat": "head"}


@dataclass(frozen=True)
class CWDOptions(OptionGroup):
    """Settings of both terms. Defaults: what CIRKD wrote into its code."""
    cwd_temperature: float = option(CWD_TEMPERATURE, "softmax temperature of both terms", above=0, metavar="T")
    cwd_norm: str = option("channel", "softmax over the positions of a channel, over the channels, or means of "
                                      "channels", choices=CWD_NORMS)
    cwd_divergence: str = option("kl", "mse: squared difference, at temperature 1", choices=CWD_DIVERGENCES)
    cwd_divide_by: str = option("student", "channels that the feature term is divided by; student: as in the published "
                                "runs, although the sum runs over the teacher's; no effect with norm spatial",
                                choices=("student", "teacher"))



@register("cwd")
class CWD(Distiller):
    """``cwd_feat``: the head features through :func:`cwd_loss`; ``cwd_logit``: the logits. Where the widths of the head
    features differ, a 1x1 convolution without bias maps the student's to the teacher's."""

    title = "channel-wise distillation of features and logits, with the adversarial term"
    paper = "Shu et al., Channel-wise Knowledge Distillation for Dense Prediction"
    year = 2021
    Options = CWDOptions
    terms = (Term("cwd_feat", 0.0, "weight of CWD on the head features"),
             Term("cwd_logit", 0.0, "weight of CWD on the logits"))
    needs = Needs.both("logits", "head", same_classes=True)
    # CIRKD's Cityscapes script, the only one released; crops of the last two sets are too small for the discriminator
    preset = {"*": {"lambda_kd": 1.0, "lambda_cwd_feat": 50.0, "lambda_cwd_logit": 3.0, "lambda_adv": 0.001},
              "camvid": {"lambda_adv": 0.0}, "toy_streets": {"lambda_adv": 0.0}}
    cost = "softmaxes of head and logits; discriminator, three passes of it"
    trial = {"adv_upsample": True}

    def __init__(self, student_channels: int, teacher_channels: int, options: CWDOptions,
                 active: Iterable[str]) -> None:
        super().__init__()
        self.active = frozenset(active) & set(TAPS)
        self.settings = {"temperature": options.cwd_temperature, "norm": options.cwd_norm,
                         "divergence": options.cwd_divergence}
        self.divisor = student_channels if options.cwd_divide_by == "student" else teacher_channels
        aligned = "cwd_feat" in self.active and student_channels != teacher_channels
        self.conv = nn.Conv2d(student_channels, teacher_channels, 1, bias=False) if aligned else nn.Identity()

    @classmethod
    def requires(cls, options: CWDOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> Needs:
        check_cwd(options.cwd_norm, options.cwd_divergence)
        taps = [tap for term, tap in TAPS.items() if term in run.active]
        return Needs.both(*taps, same_stride=True, same_classes="logits" in taps)

    @classmethod
    def build(cls, options: CWDOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> CWD:
        return cls(*(net.channels.get("head", 0) for net in (student, teacher)), options, run.active)

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        terms = {}
        if "cwd_feat" in self.active:
            terms["cwd_feat"] = self.feature_loss(batch.student.head, batch.teacher.head)
        if "cwd_logit" in self.active:
            terms["cwd_logit"] = cwd_loss(batch.student.logits, batch.teacher.logits, **self.settings)
        return terms

    def feature_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """:func:`cwd_loss` of maps [B, C_s, h, w] and [B, C_t, h, w] after alignment: a sum over C_t channels, divided
        by the student's C_s as in the code behind the published rows. With 128 and 256 channels that is twice the
        formula, and the published weight of 50 belongs to it."""
        return cwd_loss(self.conv(student), teacher, channels=self.divisor, **self.settings)
