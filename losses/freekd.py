"""FreeKD: distillation of the frequencies that a prompt finds important (Zhang et al., "FreeKD: Knowledge Distillation
via Semantic Frequency Prompt", CVPR 2024).

Three levels of a Haar transform split a map into high bands H_l [C, 3, h_l, w_l] (three orientations) and a low one,
which is not distilled. Tokens E_l [T, C] give masks of the teacher's bands, m = sigmoid(E_l * sum of orientations), and

    L = sum over the levels of the mean over images, tokens, channels, orientations, positions of  |m H_S - m H_T|

The public code is for detectors, has a squared error of the maps beside this loss, and tokens learned elsewhere.
Unofficial here: the segmentation taps and the stage that learns the tokens, after the paper's text: in the frozen
teacher, the prompted map (high bands times the mean of their masks) has to classify well, the masks to differ (Dice).
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses.core import Batch, Distiller, Needs, NetInfo, OptionGroup, Preparation, RunFacts, Term, option, register
from losses.core.checks import at_least_float32, check_maps, full_precision
from losses.core.feature_losses import dice_overlap, feature_mse_loss
from losses.core.task import SegCrossEntropyLoss
from losses.stages.stage import check_shares, stage_settings
from losses.stages.tokens import hold_tokens, initial_tokens, learn_tokens, read_tokens
from models.class_map import MappedTeacher
from models.output import SegOutput
from utils.errors import UserError

LEVELS = 3


def haar_split(x: Tensor) -> tuple[Tensor, Tensor]:
    """One level of the orthonormal Haar transform of [B, C, h, w]: low [B, C, h', w'], high [B, C, 3, h', w']. h', w'
    are half the sides, rounded up: an odd side gets a row or column of zeros at its end."""
    x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    upper, lower, left, right = a + b, c + d, a - b, c - d
    return (upper + lower) / 2, torch.stack([upper - lower, left + right, left - right], dim=2) / 2


def haar_join(low: Tensor, high: Tensor, size: tuple[int, int]) -> Tensor:
    """The map [B, C, *size] that :func:`haar_split` splits into ``low`` and ``high``."""
    rows, columns, both = high.unbind(2)
    upper = torch.stack([low + rows + columns + both, low + rows - columns - both], dim=-1).flatten(-2)
    lower = torch.stack([low - rows + columns - both, low - rows - columns + both], dim=-1).flatten(-2)
    joined = torch.stack([upper, lower], dim=-2).flatten(-3, -2) / 2
    return joined[..., :size[0], :size[1]]


def haar_bands(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(low band, [high bands of level 1, 2, 3]) of [B, C, h, w]."""
    bands = []
    for _ in range(LEVELS):
        x, high = haar_split(x)
        bands.append(high)
    return x, bands


def prompt_masks(bands: list[Tensor], tokens: Tensor) -> list[Tensor]:
    """Masks [B, T, h_l, w_l] in (0, 1) of each level's bands [B, C, 3, h_l, w_l]. Call it outside of autocast. tokens:
    [4, T, C]; the first is for the low band and has no part in anything."""
    return [torch.einsum("tc,bchw->bthw", e.to(high.dtype), high.sum(dim=2)).sigmoid()
            for e, high in zip(tokens[1:], bands, strict=True)]


def freekd_loss(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    """FreeKD of two maps [B, C, h, w] of one shape under tokens [4, T, C]; UserError when the shapes do not fit. The
    masks are not negative, so that their mean over the tokens is all that the difference needs: nothing of size B x T x
    C x 3 x h x w exists. Gradients reach the student (and tokens that ask for them)."""
    check_maps("freekd", student, teacher, channels=True)
    if tokens.ndim != 3 or len(tokens) != LEVELS + 1 or tokens.shape[2] != teacher.shape[1]:
        raise UserError(f"freekd: tokens {tuple(tokens.shape)}: expected [{LEVELS + 1}, T, {teacher.shape[1]}]")
    with full_precision(student):
        student_bands, teacher_bands = (haar_bands(at_least_float32(x))[1] for x in (student, teacher.detach()))
        masks = prompt_masks(teacher_bands, tokens)
        return sum((mask.mean(dim=1)[:, None, None] * (s - t).abs()).mean()
                   for mask, s, t in zip(masks, student_bands, teacher_bands, strict=True))


def prompted_map(feature: Tensor, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(map [B, C, h, w] whose high bands are multiplied by the mean of their masks, the masks of the levels)."""
    low, bands = haar_bands(feature)
    masks = prompt_masks(bands, tokens)
    sizes = [feature.shape[-2:], *(high.shape[-2:] for high in bands[:-1])]
    for size, high, mask in zip(reversed(sizes), reversed(bands), reversed(masks), strict=True):
        low = haar_join(low, high * mask.mean(dim=1)[:, None, None], size)
    return low, masks


def rest_of_network(teacher: nn.Module, tap: str, feature: Tensor) -> Tensor:
    """Logits [B, K, h, w] of a network from its ``c4`` or ``head`` map [B, C, h, w] on."""
    if isinstance(teacher, MappedTeacher):
        return teacher.scores(rest_of_network(teacher.net, tap, feature))
    if tap == "c4":
        return teacher.head(feature)[0]
    return [m for m in teacher.head.modules() if isinstance(m, nn.Conv2d)][-1](feature)


def check_has_head(teacher: nn.Module) -> None:
    """UserError for a teacher that :func:`rest_of_network` cannot take apart."""
    if not hasattr(teacher.net if isinstance(teacher, MappedTeacher) else teacher, "head"):
        raise UserError(f"method 'freekd' learns its masks through the teacher's own head, which {teacher.name} does "
                        "not have by itself: use masks that are learned already, or a teacher of this repository",
                        settings=["freekd_masks"])


def prompt_learning_losses(teacher: nn.Module, tap: str, feature: Tensor, tokens: Tensor, target: Tensor,
                           ignore_label: int = -1, group_size: int = 0) -> dict[str, Tensor]:
    """{"ce", "dice"}: the two scalars whose sum the tokens [4, T, C] minimize. feature: the teacher's map [B, C, h, w]
    at ``tap``; target: integers [B, H, W]. ce: of the logits from the prompted map on. dice: mean over levels."""
    with full_precision(feature):
        prompted, masks = prompted_map(at_least_float32(feature.detach()), tokens)
        ce = SegCrossEntropyLoss(ignore_label, group_size)(rest_of_network(teacher, tap, prompted), target)
        return {"ce": ce, "dice": sum(dice_overlap(mask.flatten(2)) for mask in masks) / LEVELS}


@dataclass(frozen=True)
class FreeKDOptions(OptionGroup):
    freekd_tap: str = option("c4", "last backbone stage, or last feature", choices=("c4", "head"))
    freekd_masks: str | None = option(None, "prompt tokens to use, of the same teacher and tap (default: learn them "
                                            "first)", metavar="FILE")
    freekd_tokens: int = option(6, "number of masks of each level", at_least=1, metavar="T")
    freekd_steps: int = option(10000, "steps of the stage that learns the tokens", at_least=1, metavar="N")
    freekd_batch_size: int = option(16, "images per step of that stage, over all processes together", at_least=1,
                                    metavar="N")
    freekd_lr: float = option(0.01, "learning rate of the first step of that stage", above=0, metavar="LR")


@register("freekd")
class FreeKD(Distiller):
    """One feature map of each network, the student's through a trained 1x1 convolution. tokens: [4, T, C_t]; a frozen
    buffer, so the state of a run holds them. settings: of the stage that learns them, or None."""
    title = "semantic frequency prompts (unofficial for segmentation)"
    paper = "Zhang et al., FreeKD: Knowledge Distillation via Semantic Frequency Prompt"
    year = 2024
    Options = FreeKDOptions
    terms = (Term("freekd", 0.0, "weight of FreeKD's masked differences of frequency bands"),
             Term("freekd_mse", 0.0, "weight of the squared error between the same aligned maps"))
    needs = Needs.both("c4", same_stride=True)
    preset = {"*": {"lambda_freekd": 1.0, "lambda_freekd_mse": 5.0}}  # released for a detector, none for segmentation
    cost = "one 1x1 conv, Haar transforms; before training, a stage of teacher passes"
    trial = {"freekd_steps": 2, "freekd_batch_size": 2}
    stage_options = ("freekd_masks", "freekd_tokens", "freekd_steps", "freekd_batch_size", "freekd_lr")

    def __init__(self, options: FreeKDOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> None:
        """Raises UserError when the file of tokens does not fit, or the processes cannot share the stage's batches."""
        super().__init__()
        o, self.tap, self.settings, self.active = options, options.freekd_tap, None, frozenset(run.active)
        width = teacher.channels[self.tap]
        tokens = initial_tokens((LEVELS + 1, o.freekd_tokens, width), run.seed, self.method)
        if "freekd" not in self.active:
            tokens = torch.zeros(LEVELS + 1, 1, width)
        elif not o.freekd_masks:
            self.settings = check_shares(stage_settings(run, self.method, "masks", o.freekd_steps, o.freekd_batch_size,
                                                        o.freekd_lr, self.tap))
        elif not run.resumed:
            tokens = read_tokens(Path(o.freekd_masks), (LEVELS + 1, None, width), "freekd_masks")
        hold_tokens(self, tokens)
        self.ignore_label, self.group_size = run.ignore_label, run.group_size
        self.align = nn.Conv2d(student.channels[self.tap], width, kernel_size=1)

    @classmethod
    def requires(cls, options: FreeKDOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> Needs:
        return Needs.both(options.freekd_tap, same_stride=True, tap_settings=("freekd_tap",))

    def prepare(self, stage: Preparation) -> None:
        """Learn the tokens, or take them from the cache (:func:`losses.stages.tokens.learn_tokens`)."""
        def loss(output: SegOutput, tokens: Tensor, target: Tensor) -> dict[str, Tensor]:
            return prompt_learning_losses(stage.teacher, self.tap, getattr(output, self.tap), tokens, target,
                                          self.ignore_label, self.group_size)

        if self.settings is not None:
            check_has_head(stage.teacher)
            self.tokens.copy_(learn_tokens(stage, self.tokens, self.settings, loss))

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        student, teacher = self.align(getattr(batch.student, self.tap)), getattr(batch.teacher, self.tap).detach()
        terms = {"freekd": freekd_loss(student, teacher, self.tokens)} if "freekd" in self.active else {}
        if "freekd_mse" in self.active:
            terms["freekd_mse"] = feature_mse_loss(student, teacher, method="freekd")
        return terms
