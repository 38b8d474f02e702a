"""The holistic term that SKD introduced and that the published SKD, IFVD and CWD rows share.

A discriminator (self-attention GAN: Zhang et al., ICML 2019) learns to tell the teacher's logits from the student's,
and the student to be taken for the teacher. It has its own Adam, stepped after the student's update; parameters,
power-iteration vectors and Adam's moments are in the method's state_dict.

Several processes have the same discriminator: the power iteration depends on the weights only, and batch norm uses the
statistics of all images of all processes, as in the published runs. Gradients are averaged; in the published runs they
were not (the student's backward pass had used up DDP's hooks), so that every GPU trained a discriminator of its own. So
DDP has nothing to synchronize, and rank 0 saves the state of all.
"""
from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from losses import core
from losses.core import Batch, Distiller, Needs, NetInfo, OptionGroup, RunFacts, Term, option, register
from utils.distributed import average_gradients, centered_over_processes
from utils.errors import UserError

#: Smallest side of the logits: four halvings leave the 4x4 that the last convolution covers.
SMALLEST = 64


class SpectralNorm(nn.Module):
    """A convolution whose weight is divided by an estimate of its largest singular value: one step of power iteration
    per forward pass in train mode, so the number and order of passes are part of the state."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        weight = conv.weight.detach()
        del conv.weight
        conv.weight_bar = nn.Parameter(weight)
        for name, size in (("weight_u", len(weight)), ("weight_v", weight[0].numel())):
            conv.register_buffer(name, F.normalize(torch.randn(size), dim=0))
        self.module = conv

    def forward(self, x: Tensor) -> Tensor:
        conv = self.module
        matrix, u, v = conv.weight_bar.flatten(1), conv.weight_u, conv.weight_v
        if self.training:
            # .data hides the update from autograd: as in the reference, a backward pass after several forward passes
            # takes the gradient of sigma at the vectors of the last pass (1e-5 of the gradient at random weights)
            with torch.no_grad():
                v.data.copy_(F.normalize(matrix.t() @ u, dim=0))
                u.data.copy_(F.normalize(matrix @ v, dim=0))
        return F.conv2d(x, conv.weight_bar / (u @ (matrix @ v)), conv.bias, conv.stride, conv.padding)


class SelfAttention(nn.Module):
    """Every position of [B, C, h, w] looks at all others; the result is added with a factor that starts at 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query_conv, self.key_conv = (nn.Conv2d(channels, channels // 8, 1) for _ in range(2))
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (conv(x).flatten(2) for conv in (self.query_conv, self.key_conv, self.value_conv))
        attention = (query.transpose(1, 2) @ key).softmax(dim=-1)
        return x + self.gamma * (value @ attention.transpose(1, 2)).view_as(x)


class WholeBatchNorm2d(nn.Module):
    """Batch norm of [B, C, h, w] over the images of every process. Not a subclass of torch's, which would be turned
    into ``SyncBatchNorm`` on GPUs: that has no second derivative, which the gradient penalty needs."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps, self.momentum = 1e-5, 0.1
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        centered, mean, var, count = centered_over_processes(x)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1).clamp(min=1)), self.momentum)
        return centered * (self.weight * torch.rsqrt(var + self.eps))[:, None, None] + self.bias[:, None, None]


class Discriminator(nn.Module):
    """Raw logits [B, K, h, w], h and w at least 64 -> scores [B, 1, h // 16 - 3, w // 16 - 3], high = teacher. The
    names of parameters and buffers are those of the reference."""

    def __init__(self, num_class: int, width: int = 64) -> None:
        super().__init__()
        widths = [num_class, *(width * 2 ** i for i in range(4))]
        self.preprocess_additional = WholeBatchNorm2d(num_class)
        self.l1, self.l2, self.l3, self.l4 = (
            nn.Sequential(SpectralNorm(nn.Conv2d(a, b, 4, stride=2, padding=1)), nn.LeakyReLU(0.1))
            for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.attn1, self.attn2 = SelfAttention(widths[3]), SelfAttention(widths[4])
        self.last = nn.Sequential(nn.Conv2d(widths[4], 1, 4))

    def forward(self, logits: Tensor) -> Tensor:
        """Scores, computed in the precision of the weights. Raises UserError when the logits are too small."""
        if min(logits.shape[-2:]) < SMALLEST:
            raise UserError(f"adv: the discriminator needs logits of {SMALLEST}x{SMALLEST} or more, got "
                            f"{logits.shape[-2]}x{logits.shape[-1]}")
        with core.full_precision(logits):
            x = self.preprocess_additional(logits.to(self.last[0].weight.dtype))
            return self.last(self.attn2(self.l4(self.attn1(self.l3(self.l2(self.l1(x)))))))

    def frozen(self, logits: Tensor) -> Tensor:
        """As :meth:`forward`, with gradients to the logits only."""
        return functional_call(self, {name: p.detach() for name, p in self.named_parameters()}, (logits,))


def generator_loss(student_score: Tensor) -> Tensor:
    """Minus the mean score of the student's logits: low when they pass for the teacher's."""
    return -student_score.mean()


def discriminator_loss(student_score: Tensor, teacher_score: Tensor, kind: str = "hinge") -> Tensor:
    """What the discriminator minimizes: hinge around -1 and 1, or (wgan-gp) the plain difference of the means."""
    if kind == "hinge":
        return F.relu(1 + student_score).mean() + F.relu(1 - teacher_score).mean()
    return student_score.mean() - teacher_score.mean()


def gradient_penalty(discriminator: Callable[[Tensor], Tensor], student: Tensor, teacher: Tensor, share: Tensor,
                     weight: float = 10.0) -> Tensor:
    """``weight`` times the mean of (||d score / d x|| - 1)^2 at x = share * teacher + (1 - share) * student.
    student, teacher: [B, K, h, w]; share: [B, 1, 1, 1], uniform in [0, 1). The norm is taken per image."""
    between = torch.lerp(student.detach(), teacher.detach(), share).requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(between).sum(), between, create_graph=True)
    return weight * (slope.flatten(1).norm(dim=1) - 1).square().mean()


@dataclass(frozen=True)
class AdversarialOptions(OptionGroup):
    """Settings of the discriminator."""
    adv_d_weight: float = option(0.1, "weight of the discriminator's own loss", above=0, metavar="W")
    adv_lr: float = option(4e-4, "learning rate of the discriminator's Adam, constant", above=0, metavar="LR")
    adv_loss: str = option("hinge", "loss of the discriminator; the published tables used hinge, SKD and IFVD wgan-gp",
                           choices=("hinge", "wgan-gp"))
    adv_upsample: bool = option(False, "enlarge logits below 64x64 for the discriminator (default: refuse such crops)")


@register("adv")
class Adversarial(Distiller):
    """Discriminator, its optimizer and the student's adversarial term ``adv`` = :func:`generator_loss`. width: channels
    of the discriminator's first convolution."""

    title = "adversarial term of SKD, IFVD and CWD alone, beside KD"
    paper = "Liu et al., Structured Knowledge Distillation for Semantic Segmentation (holistic term)"
    year = 2019
    Options = AdversarialOptions
    terms = (Term("adv", 0.0, "weight of the adversarial term; builds a discriminator of the logits"),)
    needs = Needs.both("logits", same_classes=True)
    preset = {"*": {"lambda_kd": 1.0, "lambda_adv": 0.001}}
    cost = "discriminator of the logits, three passes of it"
    whole_batch = True  # every pass is a step of the power iteration
    trial = {"adv_upsample": True}

    def __init__(self, options: AdversarialOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None,
                 width: int = 64) -> None:
        super().__init__()
        self.options = options
        self.discriminator = Discriminator(run.num_class, width)
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=options.adv_lr, betas=(0.9, 0.99))
        self._last: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._diagnostics: dict[str, Tensor] = {}

    @classmethod
    def requires(cls, options: AdversarialOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> Needs:
        if options.adv_upsample:
            return cls.needs
        return Needs.both("logits", same_classes=True, smallest_map=(SMALLEST, SMALLEST),
                          why="the discriminator halves them four times; use weight 0 or upsampled logits",
                          settings=("lambda_adv", "adv_upsample"))

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        core.check_logits("adv", batch.student.logits, batch.teacher.logits)
        student, teacher = (self._sized(core.at_least_float32(logits))
                            for logits in (batch.student.logits, batch.teacher.logits.detach()))
        if self.training:
            share = None
            if self.options.adv_loss == "wgan-gp":  # where the gradient penalty is taken
                share = torch.rand((len(student), 1, 1, 1), generator=generator, device=student.device,
                                   dtype=student.dtype)
            self._last = (student.detach(), teacher, share)
        return {"adv": generator_loss(self.discriminator.frozen(student))}

    def after_step(self, step: int) -> None:
        """Train the discriminator on the logits of the last forward pass: first the student's, then the teacher's."""
        if self._last is None:
            return
        (student, teacher, share), self._last = self._last, None
        self.optimizer.zero_grad(set_to_none=True)
        scores = self.discriminator(student), self.discriminator(teacher)
        loss = discriminator_loss(*scores, self.options.adv_loss)
        if share is not None:
            loss = loss + gradient_penalty(self.discriminator, student, teacher, share)
        (self.options.adv_d_weight * loss).backward()
        average_gradients(self.discriminator.parameters())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        means = (x.detach().mean() for x in (loss, *scores))
        self._diagnostics = dict(zip(("d_loss", "score_student", "score_teacher"), means, strict=True))

    def diagnostics(self) -> dict[str, Tensor]:
        """Unweighted loss of the discriminator's last step, and its mean scores of student and teacher."""
        return self._diagnostics

    def unsynchronized(self) -> set[str]:
        return {f"discriminator.{name}" for name in self.discriminator.state_dict()}

    def get_extra_state(self) -> dict:
        return self.optimizer.state_dict()

    def set_extra_state(self, state: dict) -> None:
        self.optimizer.load_state_dict(copy.deepcopy(state))  # torch would share the moments with the given state
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.adv_lr

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adversarial:
        """Moves and casts Adam's moments together with the parameters, whenever the state was loaded."""
        super()._apply(fn, recurse)
        for moments in self.optimizer.state.values():
            moments.update({name: fn(x) for name, x in moments.items() if name != "step"})
        return self

    def _sized(self, logits: Tensor) -> Tensor:
        size = [max(side, SMALLEST) for side in logits.shape[-2:]]
        if not self.options.adv_upsample or list(logits.shape[-2:]) == size:
            return logits
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=True)
