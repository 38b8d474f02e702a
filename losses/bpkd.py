"""Boundary-privileged distillation (Liu et al., "BPKD", WACV 2024), unofficial: its training code was never released.

Label boundaries split the logits in two. At the edges, where classes touch, every pixel matters by itself: a divergence
of the distributions over the classes (``bpkd_edge``). In the bodies the shape of a class matters: a divergence of
distributions over the positions, as in CWD (``bpkd_body``).
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from losses import core
from losses.core import Batch, Distiller, Needs, NetInfo, OptionGroup, RunFacts, Term, option, register
from losses.core.logit_losses import cwd_loss
from utils.errors import UserError


def _window_max(x: Tensor, size: int) -> Tensor:
    """Largest value in a size x size window around each pixel of [1, K, H, W]; rows first, then columns: the same."""
    return F.max_pool2d(F.max_pool2d(x, (size, 1), 1, (size // 2, 0)), (1, size), 1, (0, size // 2))


@torch.no_grad()
def edge_mask(target: Tensor, num_class: int, size: tuple[int, int], kernel: int, ignore_label: int = -1) -> Tensor:
    """Soft masks [B, num_class, h, w] in 0..1: the share of each cell's pixels that are on the edge of a class. target:
    int64 [B, H, W]. A pixel is on the edge of class c when c and another class are both in the kernel x kernel window
    around it: dilation minus erosion of the class. Ignored pixels are on no edge, and make none."""
    classes = torch.arange(num_class, device=target.device).view(1, -1, 1, 1)
    masks = []
    for image in target.split(1):  # one at a time, since these maps are at label size
        inside = ((image[:, None] == classes) & (image != ignore_label)[:, None]).float()
        labeled = inside.sum(dim=1, keepdim=True)
        edge = _window_max(inside, kernel) * _window_max(labeled - inside, kernel) * labeled
        masks.append(F.adaptive_avg_pool2d(edge, size))
    return torch.cat(masks)


def edge_loss(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """Divergence at the edges: sum over classes of the mean over the class's edge cells, averaged over images. Logits
    [B, K, h, w] are multiplied by mask, [B, K, h, w] from :func:`edge_mask`; T^2 KL(teacher || student) of the softmax
    over classes is weighted with mask once more, and divided by the number of cells where it is not 0. A class without
    edges contributes 0. No gradient reaches the teacher; UserError when the shapes differ."""
    core.check_logits("bpkd", student_logits, teacher_logits)
    log_q, log_p = ((core.at_least_float32(x) * mask / temperature).log_softmax(dim=1)
                    for x in (student_logits, teacher_logits.detach()))
    divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    weighted = (divergence.sum(dim=1, keepdim=True) * mask).sum(dim=(2, 3))
    return (weighted / (mask > 0).sum(dim=(2, 3)).clamp(min=1)).sum(dim=1).mean() * temperature ** 2


def body_loss(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """``core.cwd_loss`` of the logits [B, K, h, w] times (1 - mask): edges count as logit 0 in both."""
    student, teacher = (core.at_least_float32(x) * (1.0 - mask) for x in (student_logits, teacher_logits))
    return cwd_loss(student, teacher, temperature, method="bpkd")


@dataclass(frozen=True)
class BPKDOptions(OptionGroup):
    """Settings of BPKD."""
    bpkd_kernel: int = option(7, "window that makes the edges, in pixels of the crop; odd", at_least=3, metavar="N")
    bpkd_temperature: float = option(1.0, "softmax temperature of both terms", above=0, metavar="T")


@register("bpkd")
class BPKD(Distiller):
    """:func:`edge_loss` and :func:`body_loss` of the logits, with the edges of the labels."""

    title = "boundary-privileged logit distillation (unofficial)"
    paper = "Liu et al., BPKD: Boundary Privileged Knowledge Distillation for Semantic Segmentation"
    year = 2024
    cost = "label edges at crop size, softmaxes of the logits"
    Options = BPKDOptions
    terms = (Term("bpkd_edge", 0.0, "weight of BPKD's divergence per pixel on label edges", needs_labels=True),
             Term("bpkd_body", 0.0, "weight of BPKD's divergence per class map off the edges", needs_labels=True))
    needs = Needs.both("logits", same_classes=True, least_classes=2)
    # the paper's 50 (edge; times its class weight of 2) and 20 (body) with a 7x7 window, as public re-implementations
    # quote them; those disagree about the temperature (1 and 4)
    preset = {"*": {"lambda_bpkd_edge": 100.0, "lambda_bpkd_body": 20.0}}

    def __init__(self, options: BPKDOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> None:
        super().__init__()
        self.options, self.run = options, run

    @classmethod
    def requires(cls, options: BPKDOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> Needs:
        if options.bpkd_kernel % 2 == 0:
            raise UserError(f"bpkd kernel {options.bpkd_kernel}: expected an odd number of at least 3",
                            settings=["bpkd_kernel"])
        return cls.needs

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        student, teacher, o, run = batch.student.logits, batch.teacher.logits, self.options, self.run
        mask = edge_mask(batch.target, run.num_class, student.shape[-2:], o.bpkd_kernel, run.ignore_label)
        losses = {"bpkd_edge": edge_loss, "bpkd_body": body_loss}
        return {name: loss(student, teacher, mask, o.bpkd_temperature) for name, loss in losses.items()
                if name in run.active}
