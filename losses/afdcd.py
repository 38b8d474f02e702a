"""Af-DCD: masked feature mimicking and omni-contrasting, without augmentation (Fan et al., NeurIPS 2023).

The student's c4 map is aligned to the teacher's width by a 1x1 convolution, positions are zeroed by a mask, and a
projector restores the teacher's map from the rest. ``fd`` is the squared error of that map. ``ctr`` contrasts it with
the teacher's inside small patches: channels are cut into groups, and each (position, group) vector of the student has
to be nearer to the teacher's vector of the same position and group than to those of every other group in the patch.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from losses.core import Batch, Distiller, Needs, NetInfo, OptionGroup, RunFacts, Term, feature_losses, option, register
from losses.core.checks import at_least_float32
from losses.core.feature_losses import PlainProjector, conv3x3, masked_feature_loss, random_keep_mask
from losses.kernels.contrast import contrast, l1_distances, patches_at_once
from losses.kernels.masked_error import error_and_pool
from losses.kernels.projector import relu_conv
from utils.errors import UserError

Pair = tuple[int, int]


@dataclass(frozen=True)
class AfDCDOptions(OptionGroup):
    """Settings of Af-DCD; the defaults are those of the reference's parser, and what it had written into the code."""
    rand_mask: bool = option(True, "mask positions at random; off: the middle third of rows and columns")
    mask_ratio: float = option(0.75, "share of the positions that the random mask zeroes", at_least=0, at_most=1,
                               metavar="R")
    enhance_projector: bool = option(False, "two-branch projector, twice the parameters")
    tau_ocd: float = option(0.07, "temperature of the contrast", above=0, metavar="T")
    m_ocd: int = option(16, "channel groups; has to divide the teacher's channels", at_least=2, metavar="M")
    pool_size: int = option(4, "max pooling before the contrast, 0 = off; always off on camvid", at_least=0)
    patch_size: tuple[int, int] = option((4, 4), "patch of the contrast, in pooled positions", at_least=1,
                                         metavar=("H", "W"))
    contrast_chunk: int = option(0, "most patches contrasted at a time: less memory, same result; 0 = as suits the "
                                    "device, without fast forms all", at_least=0)
    clip_distiller: float = option(15.0, "largest gradient norm of aligner and projector; 0 = off", at_least=0,
                                   metavar="NORM")


def center_keep_mask(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """True [1, 1, H, W] outside the middle third of the rows and columns."""
    keep = torch.ones(1, 1, height, width, dtype=torch.bool, device=device)
    keep[..., height // 3:2 * height // 3, width // 3:2 * width // 3] = False
    return keep


def crop_to_patches(x: Tensor, patch: Pair) -> Tensor:
    """The top left part of [..., H, W] that whole patches cover; the rest of the rows and columns takes no part."""
    height, width = (side - side % p for side, p in zip(x.shape[-2:], patch, strict=True))
    return x[..., :height, :width]


def smallest_map(patch: Pair, pool: int) -> Pair:
    """(height, width) of the smallest map that holds a whole patch after max pooling by ``pool`` (0 = none)."""
    return patch[0] * max(pool, 1), patch[1] * max(pool, 1)


def patch_rows(x: Tensor, groups: int, patch: Pair) -> Tensor:
    """Cut [B, C, H, W] into [patches, ph * pw * groups, C / groups] vectors. H and W must be multiples of the
    patch, C of the groups. Patches go row by row within an image, images one after another; in a patch, row
    ``n * groups + m`` is group m of position n."""
    (batch, channels, height, width), (ph, pw) = x.shape, patch
    x = x.reshape(batch, groups, channels // groups, height // ph, ph, width // pw, pw)
    return x.permute(0, 3, 5, 4, 6, 1, 2).reshape(-1, ph * pw * groups, channels // groups)


def excluded_pairs(groups: int, patch: Pair, device: torch.device | None = None) -> Tensor:
    """Bool [Q, Q], Q = ph * pw * groups: pairs that are neither positive nor negative, the vectors of the same group at
    two different positions: similar by nature, so not pushed apart."""
    rows = torch.arange(patch[0] * patch[1] * groups, device=device)
    return (rows[:, None] % groups == rows % groups) & (rows[:, None] != rows)


def pairwise_similarity(student_rows: Tensor, teacher_rows: Tensor) -> Tensor:
    """Negative L1 distances [P, Q, Q] between the rows [P, Q, D] of each patch; a student row per matrix row."""
    return -torch.cdist(student_rows, teacher_rows, p=1.0)


def contrast_rows(student_rows: Tensor, teacher_rows: Tensor, excluded: Tensor, tau: float, chunk: int = 0) -> Tensor:
    """Sum over all rows of -log softmax of the positive among positive and negatives, at temperature ``tau``: the plain
    twin of ``losses/kernels/contrast.py``. chunk: patches at a time, each chunk once more in the backward pass."""
    if chunk:
        # the backward of cdist expands to [patches, Q, Q, D] on some devices: recomputing chunk by chunk avoids that
        pieces = zip(student_rows.split(chunk), teacher_rows.split(chunk), strict=True)
        return torch.stack([checkpoint(contrast_rows, s, t, excluded, tau, use_reentrant=False,
                                       preserve_rng_state=False) for s, t in pieces]).sum()
    logits = (pairwise_similarity(student_rows, teacher_rows) / tau).masked_fill(excluded, float("-inf"))
    return -logits.log_softmax(dim=-1).diagonal(dim1=-2, dim2=-1).sum()


def omni_contrastive_loss(student: Tensor, teacher: Tensor, tau: float, groups: int, patch: Pair, chunk: int = 0,
                          excluded: Tensor | None = None, implementation: str = "auto") -> Tensor:
    """Omni-contrastive loss of two maps [B, C, H, W]: summed over groups, averaged over positions and images. H and W
    are cut to multiples of ``patch``, and the average is over what remains. chunk: patches computed at a time, which
    bounds the memory; 0 = as many as suits the implementation, all for the plain one. excluded: :func:`excluded_pairs`,
    when at hand. implementation: "plain" (:func:`contrast_rows`), or one of ``losses.kernels.contrast.contrast``, equal
    up to rounding; "auto" = the device's fastest. Gradients reach the student only."""
    student, teacher = (crop_to_patches(at_least_float32(x), patch) for x in (student, teacher.detach()))
    excluded = excluded_pairs(groups, patch, student.device) if excluded is None else excluded
    rows = [patch_rows(x, groups, patch) for x in (student, teacher)]
    if implementation == "plain":
        total = contrast_rows(*rows, excluded, tau, chunk)
    else:
        total = contrast(*rows, excluded, tau, implementation, chunk)
    return total / student[:, 0].numel()


@torch.no_grad()
def positive_rank(student: Tensor, teacher: Tensor, groups: int, patch: Pair, chunk: int = 0,
                  implementation: str = "auto") -> Tensor:
    """Mean share of the negatives that beat the positive, for two maps [B, C, H, W]: 0 solved, 0.5 chance. Where it
    stays at 0 the contrastive term is close to 0 as well and teaches nothing more. chunk and implementation: as for
    :func:`omni_contrastive_loss`."""
    rows = [patch_rows(crop_to_patches(at_least_float32(x), patch), groups, patch) for x in (student, teacher)]
    excluded = excluded_pairs(groups, patch, student.device)
    count, size = rows[0].shape[:2]
    block = patches_at_once(rows[0], chunk) if implementation != "plain" else chunk or count
    beaten = torch.zeros((), dtype=torch.int64, device=student.device)
    for s, t in zip(*(r.split(block) for r in rows), strict=True):
        distances = -pairwise_similarity(s, t) if implementation == "plain" else l1_distances(s, t, implementation)
        beaten += ((distances < distances.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)) & ~excluded).sum()
    return beaten.to(rows[0].dtype) / (count * size * patch[0] * patch[1] * (groups - 1))


class EnhancedProjector(nn.Module):
    """Two 3x3 blocks in a row, read out by a 3x3 convolution each and averaged: [B, C, H, W] -> the same shape."""

    # "adpator" is the reference's spelling, kept because the recorded weights are drawn by parameter name
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = (nn.Sequential(conv3x3(channels), nn.ReLU(inplace=True)) for _ in range(2))
        self.adpator_1, self.adpator_2 = conv3x3(channels), conv3x3(channels)

    @property
    def first(self) -> nn.Conv2d:
        """The convolution that reads the map."""
        return self.block_1[0]

    def forward(self, x: Tensor) -> Tensor:
        first = self.block_1(x)
        return (self.adpator_1(first) + self.adpator_2(self.block_2(first))) / 2

    def rest(self, x: Tensor) -> Tensor:
        """What follows the first convolution, with less memory in the backward pass."""
        first = self.block_1[1](x)
        total = self.adpator_1(first)  # first of the two: its backward pass then comes last, when less is kept
        total.add_(relu_conv(self.block_2[0](first), self.adpator_2.weight, self.adpator_2.bias))
        return total.div_(2)


class OmniContrastiveFeatureLoss(nn.Module):
    """Masked feature mimicking and omni-contrasting of two feature maps of the same size.

    student_channels, teacher_channels: widths of the maps; equal widths need no alignment. dataset: "camvid" is never
    pooled, as in the reference. feature, contrast: whether fd and ctr are computed; what only the contrast needs is not
    checked without it. fast: the alignment folded into the projector where that pays, the fused contrast, less memory;
    off: the plain forms. The rest: see :class:`AfDCDOptions`."""

    def __init__(self, student_channels: int, teacher_channels: int, rand_mask: bool = True, mask_ratio: float = 0.75,
                 enhance_projector: bool = False, tau_ocd: float = 0.07, M_ocd: int = 16, pool_size: int = 4,
                 patch_size: Pair = (4, 4), dataset: str = "citys", contrast_chunk: int = 0,
                 feature: bool = True, contrast: bool = True, fast: bool = True) -> None:
        super().__init__()
        options = AfDCDOptions(rand_mask=rand_mask, mask_ratio=mask_ratio, enhance_projector=enhance_projector,
                               tau_ocd=tau_ocd, m_ocd=M_ocd, pool_size=pool_size, patch_size=tuple(patch_size),
                               contrast_chunk=contrast_chunk)  # refuses what is out of bounds
        if contrast and teacher_channels % M_ocd:
            raise UserError(f"afdcd: {M_ocd} channel groups: expected a number that divides the teacher's "
                            f"{teacher_channels} channels", settings=["m_ocd"])
        self.widths, self.rand_mask, self.mask_ratio = (student_channels, teacher_channels), rand_mask, mask_ratio
        self.tau, self.groups, self.patch = tau_ocd, M_ocd, options.patch_size
        self.pool = 0 if dataset == "camvid" else pool_size
        self.chunk, self.feature, self.contrast, self.fast = contrast_chunk, feature, contrast, fast
        self.implementation = "auto" if fast else "plain"
        # "projetor" is the reference's spelling, kept because the recorded weights are drawn by parameter name
        self.align = feature_losses.aligner(student_channels, teacher_channels)
        self.projetor = (EnhancedProjector if enhance_projector else PlainProjector)(teacher_channels)
        excluded = excluded_pairs(self.groups, self.patch) if contrast else None
        self.register_buffer("excluded", excluded, persistent=False)
        self._contrasted: tuple[Tensor, Tensor] | None = None

    def forward(self, student_c4: Tensor, teacher_c4: Tensor, *, keep: Tensor | None = None,
                generator: torch.Generator | None = None) -> tuple[Tensor | None, Tensor | None]:
        """(fd, ctr), unweighted scalars, of student [B, C_s, H, W] and teacher [B, C_t, H, W]; None = switched off.
        keep: [B or 1, 1, H, W], non-zero where a position is kept; drawn from ``generator`` (which must be on the
        features' device; None = the default one) when not given. Both losses are computed in float32 or better. Raises
        UserError when the maps do not fit each other or are too small for one patch of the contrast."""
        feature_losses.check_widths("afdcd", student_c4, teacher_c4, self.widths)
        (height, width), least = student_c4.shape[-2:], smallest_map(self.patch, self.pool)
        if self.contrast and (height < least[0] or width < least[1]):
            raise UserError(f"afdcd: a {height}x{width} map is too small to contrast: pooling by {self.pool} and "
                            f"patches of {self.patch[0]}x{self.patch[1]} need {least[0]}x{least[1]} or more",
                            settings=["crop_size", "pool_size", "patch_size"])
        teacher_c4, ctr = teacher_c4.detach(), None
        if keep is None:
            keep = self.keep_mask(student_c4, generator)
        projected = feature_losses.restore(student_c4, keep, self.align, self.projetor, self.fast)
        fd, contrasted = self.feature_loss_and_contrast_map(projected, teacher_c4)
        if self.contrast:
            maps = contrasted, self.contrast_map(teacher_c4)
            self._contrasted = tuple(x.detach() for x in maps)
            ctr = omni_contrastive_loss(*maps, self.tau, self.groups, self.patch, self.chunk, self.excluded,
                                        self.implementation)
        return fd, ctr

    def feature_loss_and_contrast_map(self, projected: Tensor, teacher: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(fd, :meth:`contrast_map` of ``projected``) of two maps [B, C_t, H, W]; None = switched off."""
        if self.fast and self.feature:
            fd, pooled = error_and_pool(projected, teacher, self.pool if self.contrast else 0)
            return fd, projected if pooled is None else pooled
        fd = masked_feature_loss(projected, teacher) if self.feature else None
        return fd, self.contrast_map(projected) if self.contrast else None

    def keep_mask(self, feature: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Bool mask [B or 1, 1, H, W] for a map [B, C, H, W], on the map's device."""
        batch, _, height, width = feature.shape
        if not self.rand_mask:
            return center_keep_mask(height, width, feature.device)
        draw = torch.rand((batch, 1, height, width), generator=generator, device=feature.device)
        return random_keep_mask(draw, self.mask_ratio)

    def contrast_map(self, feature: Tensor) -> Tensor:
        """What is contrasted: the map, max pooled (each channel on its own) unless pooling is off."""
        return F.max_pool2d(feature, self.pool) if self.pool else feature

    def positive_rank(self) -> Tensor | None:
        """:func:`positive_rank` of the last forward pass, None before the first and without contrast."""
        if self._contrasted is None:
            return None
        return positive_rank(*self._contrasted, self.groups, self.patch, self.chunk, self.implementation)


def _published(kd: float, fd: float, ctr: float) -> dict[str, float]:
    return {"lambda_kd": kd, "lambda_fd": fd, "lambda_ctr": ctr}


@register("afdcd")
class AfDCD(Distiller):
    """The c4 maps of both networks through :class:`OmniContrastiveFeatureLoss`."""

    title = "augmentation-free dense contrastive distillation"
    paper = "Fan et al., Augmentation-Free Dense Contrastive Knowledge Distillation for Efficient Semantic Segmentation"
    year = 2023
    terms = (Term("fd", 4e-5, "weight of Af-DCD's masked feature mimicking (a sum over the map, hence tiny)",
                  sum_over="c4"),
             Term("ctr", 1e-3, "weight of Af-DCD's omni-contrastive loss"))
    Options = AfDCDOptions
    needs = Needs.both("c4", same_stride=True)
    # the released scripts. That of Cityscapes and DeepLabV3-ResNet18 asks for center mask and enhanced projector in a
    # spelling that its program rejects; this is what it means. Af-DCD has no other row with ResNet-18 there
    preset = {"*": _published(1.0, 2e-6, 5e-3), "citys": _published(1.0, 2e-6, 5e-3),
              "citys/resnet18": {"rand_mask": False, "enhance_projector": True},
              "voc": _published(1.0, 1e-6, 5e-3), "camvid": _published(1.0, 8e-6, 1e-2),
              "ade20k": _published(0.5, 1e-6, 4e-2), "coco_stuff_164k": _published(0.5, 5e-6, 5e-3)}
    published_crop = {"*": (512, 1024), "voc": (512, 512), "camvid": (360, 360), "ade20k": (512, 512),
                      "coco_stuff_164k": (512, 512)}
    dataset_options = {"camvid": {"pool_size": 0}}
    cost = "two 3x3 convs at teacher width, L1 distances within patches"

    def __init__(self, criterion: OmniContrastiveFeatureLoss, clip_norm: float | None) -> None:
        super().__init__()
        self.criterion, self.clip_norm = criterion, clip_norm or None  # 0 = not clipped

    @classmethod
    def requires(cls, options: AfDCDOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> Needs:
        if "ctr" not in run.active:
            return cls.needs
        (height, width), pool = options.patch_size, options.pool_size
        return replace(cls.needs, smallest_map=smallest_map((height, width), pool),
                       why=f"patches of {height}x{width}, pooled by {pool}", settings=("pool_size", "patch_size"))

    @classmethod
    def build(cls, options: AfDCDOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> AfDCD:
        """Raises UserError when the channel groups do not divide the teacher's channels."""
        o = options
        return cls(OmniContrastiveFeatureLoss(
            student.channels["c4"], teacher.channels["c4"], o.rand_mask, o.mask_ratio, o.enhance_projector, o.tau_ocd,
            o.m_ocd, o.pool_size, o.patch_size, contrast_chunk=o.contrast_chunk, feature="fd" in run.active,
            contrast="ctr" in run.active, fast=run.fast), o.clip_distiller)

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        losses = self.criterion(batch.student.c4, batch.teacher.c4, generator=generator)
        return {name: loss for name, loss in zip(("fd", "ctr"), losses, strict=True) if loss is not None}

    def diagnostics(self) -> dict[str, Tensor]:
        """``positive_rank``: share of the negatives nearer than the positive in the last pass, 0 = term solved."""
        rank = self.criterion.positive_rank()
        return {} if rank is None else {"positive_rank": rank}
