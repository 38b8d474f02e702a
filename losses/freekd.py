"""FreeKD: distillation of the frequencies that a prompt finds important (Zhang et al., "FreeKD: Knowledge Distillation
via Semantic Frequency Prompt", CVPR 2024).

Three levels of a Haar transform split a map into high bands H_l [C, 3, h_l, w_l] (three orientations) and a low one,
which is not distilled. Tokens E_l [T, C] give masks of the teacher's bands, m = sigmoid(E_l * sum of orientations), and

    L = sum over the levels of the mean over images, tokens, channels, orientations, positions of  |m H_S - m H_T|

The public code is for detectors, has this loss and a squared error of the maps beside it, and starts from tokens that
were learned elsewhere. Unofficial here: the segmentation taps and the stage that learns the tokens. It follows the
paper's words: inside the frozen teacher, the prompted map (its high bands times the mean of their masks) has to
classify well, and the masks have to differ (a Dice coefficient).
"""
from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses.distiller import BuildContext, Distiller, Preparation, Term, check_taps, register
from losses.feature_mse import check_maps
from losses.maskd import dice_overlap
from losses.maskd_stage import INITIAL_STD, find_tokens, learn_tokens
from losses.stage import StageSettings, check_shares, common_words
from losses.task import SegCrossEntropyLoss, at_least_float32
from models.output import SegOutput
from utils.cli import number
from utils.errors import UserError
from utils.randomness import step_generator

LEVELS = 3
TAPS = ("c4", "head")


def haar_split(x: Tensor) -> tuple[Tensor, Tensor]:
    """One level of the orthonormal Haar transform of [B, C, h, w]: low [B, C, h', w'], high [B, C, 3, h', w'].

    h', w' are half the sides, rounded up: an odd side gets a row or column of zeros at its end.
    """
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
    """Masks [B, T, h_l, w_l] in (0, 1) of each level's bands [B, C, 3, h_l, w_l]. Call it outside of autocast.

    tokens: [4, T, C]; the first is for the low band and has no part in anything.
    """
    return [torch.einsum("tc,bchw->bthw", e.to(high.dtype), high.sum(dim=2)).sigmoid()
            for e, high in zip(tokens[1:], bands, strict=True)]


def freekd_loss(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    """FreeKD of two maps [B, C, h, w] of one shape under tokens [4, T, C].

    The masks are not negative, so that their mean over the tokens is all that the difference needs: nothing of size
    B x T x C x 3 x h x w exists. Gradients reach the student (and tokens that ask for them). Raises UserError when the
    shapes do not fit.
    """
    check_maps("freekd", student, teacher, channels=True)
    if tokens.ndim != 3 or len(tokens) != LEVELS + 1 or tokens.shape[2] != teacher.shape[1]:
        raise UserError(f"freekd: tokens {tuple(tokens.shape)}: expected [{LEVELS + 1}, T, {teacher.shape[1]}]")
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = (haar_bands(at_least_float32(x))[1] for x in (student, teacher.detach()))
        masks = prompt_masks(theirs, tokens)
        return sum((mask.mean(dim=1)[:, None, None] * (s - t).abs()).mean()
                   for mask, s, t in zip(masks, ours, theirs, strict=True))


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
    if tap == "c4":
        return teacher.head(feature)[0]
    return [m for m in teacher.head.modules() if isinstance(m, nn.Conv2d)][-1](feature)


def prompt_learning_losses(teacher: nn.Module, tap: str, feature: Tensor, tokens: Tensor, target: Tensor,
                           ignore_label: int = -1, group_size: int = 0) -> dict[str, Tensor]:
    """{"ce", "dice"}: the two scalars whose sum the tokens [4, T, C] minimise.

    feature: the teacher's map [B, C, h, w] at ``tap``; target: integers [B, H, W]. ce: cross entropy of the teacher's
    logits from the prompted map on. dice: overlap of the masks, mean over the levels.
    """
    with torch.autocast(feature.device.type, enabled=False):
        prompted, masks = prompted_map(at_least_float32(feature.detach()), tokens)
        logits = rest_of_network(teacher, tap, prompted)
        dice = sum(dice_overlap(mask.flatten(2)) for mask in masks) / LEVELS
        return {"ce": SegCrossEntropyLoss(ignore_label, group_size)(logits, target), "dice": dice}


def initial_prompts(count: int, channels: int, seed: int) -> Tensor:
    """Small normal numbers [4, count, channels], a function of the seed alone."""
    generator = step_generator(torch.device("cpu"), seed, "freekd tokens")
    return INITIAL_STD * torch.randn(LEVELS + 1, count, channels, generator=generator)


@register("freekd")
class FreeKD(Distiller):
    """One feature map of each network, the student's through a trained 1x1 convolution.

    tokens: [4, T, C_t]; a frozen buffer, so the state of a run holds them. settings: of the stage that learns them,
    None when they are given. active: the terms to compute.
    """

    title = "semantic frequency prompts (unofficial for segmentation)"
    paper = "Zhang et al., FreeKD: Knowledge Distillation via Semantic Frequency Prompt"
    year = 2024
    terms = (Term("freekd", 0.0, "weight of FreeKD's masked differences of frequency bands"),
             Term("freekd_mse", 0.0, "weight of the squared error between the same aligned maps"))
    student_taps = ("c4",)
    teacher_taps = ("c4",)
    # the released configuration, of a detector; nobody released one for segmentation
    preset = {"*": {"lambda_freekd": 1.0, "lambda_freekd_mse": 5.0}}
    cost = "one 1x1 conv, Haar transforms; before training, a stage of teacher passes"
    quick = {"freekd_steps": 2, "freekd_batch_size": 2}
    stage_options = ("freekd_masks", "freekd_steps", "freekd_batch_size", "freekd_lr")

    def __init__(self, student_channels: int, tokens: Tensor, settings: StageSettings | None = None, tap: str = "c4",
                 ignore_label: int = -1, active: frozenset[str] = frozenset({"freekd", "freekd_mse"}),
                 group_size: int = 0) -> None:
        super().__init__()
        self.register_buffer("tokens", tokens)
        self.settings, self.tap, self.active = settings, tap, active
        self.ignore_label, self.group_size = ignore_label, group_size
        self.student_taps = self.teacher_taps = (tap,)
        self.align = nn.Conv2d(student_channels, tokens.shape[2], kernel_size=1)

    @classmethod
    def add_arguments(cls, group: argparse._ArgumentGroup) -> None:
        group.add_argument("--freekd-tap", choices=TAPS, default="c4", help="last backbone stage, or last feature")
        group.add_argument("--freekd-masks", metavar="FILE", default=None,
                           help="prompt tokens to use, of the same teacher and tap (default: learn them first)")
        group.add_argument("--freekd-tokens", type=number(int, 1), default=6, metavar="T",
                           help="number of masks of each level")
        group.add_argument("--freekd-steps", type=number(int, 1), default=10000, metavar="N",
                           help="steps of the stage that learns the tokens")
        group.add_argument("--freekd-batch-size", type=number(int, 1), default=16, metavar="N",
                           help="images per step of that stage, over all processes together")
        group.add_argument("--freekd-lr", type=number(float, 0, open_low=True), default=0.01, metavar="LR",
                           help="learning rate of the first step of that stage")

    @classmethod
    def build(cls, context: BuildContext) -> FreeKD:
        """Raises UserError when a network lacks the tap, the strides differ, or ``--freekd-masks`` does not fit."""
        o, student, teacher = context.options, context.student, context.teacher
        tap, seed = getattr(o, "freekd_tap", "c4"), getattr(o, "seed", 0)
        described = cls(1, torch.empty(LEVELS + 1, 1, 1), tap=tap)
        check_taps(described, student, teacher)
        if student.stride != teacher.stride:
            raise UserError(f"method 'freekd': output stride {student.stride} of {student.name} and {teacher.stride} "
                            f"of {teacher.name}: expected equal numbers")
        width, given, settings = teacher.channels[tap], getattr(o, "freekd_masks", None), None
        if "freekd" not in context.active:
            tokens = torch.zeros(LEVELS + 1, 1, width)
        elif given:
            tokens = _given_prompts(Path(given).expanduser(), width)
        else:
            tokens = initial_prompts(getattr(o, "freekd_tokens", 6), width, seed)
            settings = StageSettings(getattr(o, "freekd_steps", 10000), getattr(o, "freekd_batch_size", 16),
                                     getattr(o, "freekd_lr", 0.01), False, seed, (tap, *common_words(context)),
                                     getattr(o, "save_per_iters", 800), "freekd")
            check_shares(settings)
        return cls(student.channels[tap], tokens, settings, tap, context.ignore_label, context.active,
                   getattr(o, "group_size", 2))

    def prepare(self, stage: Preparation) -> None:
        """Learn the tokens, or take them from the cache (:func:`losses.maskd_stage.learn_tokens`)."""
        if self.settings is not None:
            loss = partial(self._stage_loss, stage.teacher)
            self.tokens.copy_(learn_tokens(stage, self.tokens, self.settings, loss))

    def _stage_loss(self, teacher: nn.Module, output: SegOutput, tokens: Tensor, target: Tensor) -> dict[str, Tensor]:
        return prompt_learning_losses(teacher, self.tap, getattr(output, self.tap), tokens, target, self.ignore_label,
                                      self.group_size)

    def forward(self, student: SegOutput, teacher: SegOutput, target: Tensor, step: int,
                generator: torch.Generator | None = None) -> dict[str, Tensor]:
        ours, theirs = self.align(getattr(student, self.tap)), getattr(teacher, self.tap).detach()
        terms = {}
        if "freekd" in self.active:
            terms["freekd"] = freekd_loss(ours, theirs, self.tokens)
        if "freekd_mse" in self.active:
            check_maps("freekd", ours, theirs, channels=True)
            terms["freekd_mse"] = F.mse_loss(at_least_float32(ours), at_least_float32(theirs))
        return terms


def _given_prompts(path: Path, width: int) -> Tensor:
    tokens = find_tokens(path, "--freekd-masks", 3)
    if len(tokens) != LEVELS + 1 or tokens.shape[2] != width:
        raise UserError(f"--freekd-masks {path}: tokens {tuple(tokens.shape)}: expected [{LEVELS + 1}, T, {width}] for "
                        "this teacher")
    return tokens
