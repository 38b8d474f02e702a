"""Af-DCD: masked feature mimicking and omni-contrasting, without augmentation (Fan et al., NeurIPS 2023).

The student's c4 map is aligned to the teacher's width by a 1x1 convolution, positions are zeroed by a mask, and a
projector restores the teacher's map from the rest. ``fd`` is the squared error of that map. ``ctr`` contrasts it with
the teacher's inside small patches: channels are cut into groups, and each (position, group) vector of the student has
to be nearer to the teacher's vector of the same position and group than to those of every other group in the patch.
"""
from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from losses.distiller import BuildContext, Distiller, Term, check_taps, register
from losses.task import at_least_float32
from models.output import SegOutput
from utils.cli import BooleanAction, number
from utils.errors import UserError

Pair = tuple[int, int]


def random_keep_mask(draw: Tensor, ratio: float) -> Tensor:
    """True where a position is kept: about 1 - ``ratio`` of them. draw: uniform numbers [B, 1, H, W]."""
    return draw <= 1.0 - ratio


def center_keep_mask(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """True [1, 1, H, W] outside the middle third of the rows and columns."""
    keep = torch.ones(1, 1, height, width, dtype=torch.bool, device=device)
    keep[..., height // 3:2 * height // 3, width // 3:2 * width // 3] = False
    return keep


def masked_feature_loss(projected: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of two maps [B, C, H, W], summed over C, H, W and averaged over the batch."""
    difference = at_least_float32(projected) - at_least_float32(teacher)
    return difference.square().sum() / len(projected)


def crop_to_patches(x: Tensor, patch: Pair) -> Tensor:
    """The top left part of [..., H, W] that whole patches cover; the rest of the rows and columns takes no part."""
    height, width = (side - side % p for side, p in zip(x.shape[-2:], patch, strict=True))
    return x[..., :height, :width]


def patch_rows(x: Tensor, groups: int, patch: Pair) -> Tensor:
    """Cut [B, C, H, W] into [patches, ph * pw * groups, C / groups] vectors.

    Patches go row by row within an image, images one after another; in a patch, row ``n * groups + m`` is group m of
    position n. H and W must be multiples of the patch, C of the groups.
    """
    batch, channels, height, width = x.shape
    ph, pw = patch
    x = x.reshape(batch, groups, channels // groups, height // ph, ph, width // pw, pw)
    return x.permute(0, 3, 5, 4, 6, 1, 2).reshape(-1, ph * pw * groups, channels // groups)


def excluded_pairs(groups: int, patch: Pair, device: torch.device | None = None) -> Tensor:
    """Bool [Q, Q], Q = ph * pw * groups: pairs that are neither positive nor negative.

    Those are vectors of the same group at two different positions: similar by nature, so not pushed apart.
    """
    rows = torch.arange(patch[0] * patch[1] * groups, device=device)
    group = rows % groups
    return (group[:, None] == group[None, :]) & (rows[:, None] != rows[None, :])


def pairwise_similarity(student_rows: Tensor, teacher_rows: Tensor) -> Tensor:
    """Negative L1 distances [P, Q, Q] between the rows [P, Q, D] of each patch; a student row per matrix row."""
    return -torch.cdist(student_rows, teacher_rows, p=1.0)


def contrast_rows(student_rows: Tensor, teacher_rows: Tensor, excluded: Tensor, tau: float) -> Tensor:
    """Sum over all rows of -log softmax of the positive among positive and negatives, at temperature ``tau``."""
    logits = pairwise_similarity(student_rows, teacher_rows) / tau
    log_probability = logits.masked_fill(excluded, float("-inf")).log_softmax(dim=-1)
    return -log_probability.diagonal(dim1=-2, dim2=-1).sum()


def omni_contrastive_loss(student: Tensor, teacher: Tensor, tau: float, groups: int, patch: Pair,
                          excluded: Tensor | None = None, chunk: int = 0) -> Tensor:
    """Omni-contrastive loss of two maps [B, C, H, W]: summed over groups, averaged over positions and images.

    H and W are cut to multiples of ``patch``, and the average is over what remains. excluded: ``excluded_pairs`` when
    the caller has it at hand. chunk: patches computed at a time, each chunk once more in the backward pass; it bounds
    the memory at chunk * Q * Q * C / groups numbers. 0 = all at once. Gradients reach the student only.
    """
    student, teacher = (crop_to_patches(at_least_float32(x), patch) for x in (student, teacher.detach()))
    if excluded is None:
        excluded = excluded_pairs(groups, patch, student.device)
    student_rows, teacher_rows = patch_rows(student, groups, patch), patch_rows(teacher, groups, patch)
    if chunk > 0:
        # the backward of cdist expands to [patches, Q, Q, D] on some devices: recomputing chunk by chunk avoids that
        pieces = zip(student_rows.split(chunk), teacher_rows.split(chunk), strict=True)
        total = torch.stack([checkpoint(contrast_rows, s, t, excluded, tau, use_reentrant=False,
                                        preserve_rng_state=False) for s, t in pieces]).sum()
    else:
        total = contrast_rows(student_rows, teacher_rows, excluded, tau)
    batch, _, height, width = student.shape
    return total / (batch * height * width)


@torch.no_grad()
def positive_rank(student: Tensor, teacher: Tensor, groups: int, patch: Pair, excluded: Tensor | None = None,
                  chunk: int = 0) -> Tensor:
    """Mean share of the negatives that beat the positive, for two maps [B, C, H, W]: 0 solved, 0.5 chance.

    Where it stays at 0 the contrastive term is close to 0 as well and teaches nothing more.
    """
    student, teacher = (crop_to_patches(at_least_float32(x), patch) for x in (student, teacher))
    if excluded is None:
        excluded = excluded_pairs(groups, patch, student.device)
    rows = [patch_rows(x, groups, patch) for x in (student, teacher)]
    count, size = len(rows[0]), rows[0].shape[1]
    beaten = student.new_zeros(())
    for s, t in zip(*(r.split(chunk or count) for r in rows), strict=True):
        similarity = pairwise_similarity(s, t)
        positive = similarity.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        beaten += ((similarity > positive) & ~excluded).sum()
    return beaten / (count * size * patch[0] * patch[1] * (groups - 1))


def _conv3x3(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel_size=3, padding=1)


class EnhancedProjector(nn.Module):
    """Two 3x3 blocks in a row, read out by a 3x3 convolution each and averaged: [B, C, H, W] -> the same shape."""

    # "adpator" is the reference's spelling, kept because the recorded weights are drawn by parameter name
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = nn.Sequential(_conv3x3(channels), nn.ReLU(inplace=True))
        self.block_2 = nn.Sequential(_conv3x3(channels), nn.ReLU(inplace=True))
        self.adpator_1 = _conv3x3(channels)
        self.adpator_2 = _conv3x3(channels)

    def forward(self, x: Tensor) -> Tensor:
        first = self.block_1(x)
        return (self.adpator_1(first) + self.adpator_2(self.block_2(first))) / 2


def plain_projector(channels: int) -> nn.Sequential:
    """3x3 convolution, ReLU, 3x3 convolution: [B, C, H, W] -> the same shape."""
    return nn.Sequential(_conv3x3(channels), nn.ReLU(inplace=True), _conv3x3(channels))


class OmniContrastiveFeatureLoss(nn.Module):
    """Masked feature mimicking and omni-contrasting of two feature maps of the same size.

    student_channels, teacher_channels   widths of the maps; equal widths need no alignment
    rand_mask, mask_ratio   zero this share of the positions at random, or else (False) the middle third
    enhance_projector   :class:`EnhancedProjector` instead of :func:`plain_projector`
    tau_ocd, M_ocd   temperature; number of channel groups
    pool_size   max pooling before the contrast, 0 = none
    patch_size   (height, width) of a patch, in pooled positions
    dataset   "camvid" is never pooled, as in the reference
    contrast_chunk   patches contrasted at a time, 0 = all (see :func:`omni_contrastive_loss`)
    feature, contrast   whether fd and ctr are computed; what only the contrast needs is not checked without it
    """

    def __init__(self, student_channels: int, teacher_channels: int, rand_mask: bool = True, mask_ratio: float = 0.75,
                 enhance_projector: bool = False, tau_ocd: float = 0.07, M_ocd: int = 16, pool_size: int = 4,
                 patch_size: Pair = (4, 4), dataset: str = "citys", contrast_chunk: int = 0,
                 feature: bool = True, contrast: bool = True) -> None:
        super().__init__()
        if contrast and (M_ocd < 2 or teacher_channels % M_ocd):
            raise UserError(f"--m-ocd {M_ocd}: expected at least 2 groups that divide the teacher's "
                            f"{teacher_channels} channels")
        if tau_ocd <= 0 or not 0 <= mask_ratio <= 1:
            raise UserError(f"--tau-ocd {tau_ocd:g}, --mask-ratio {mask_ratio:g}: expected above 0, and from 0 to 1")
        if min(patch_size) < 1 or pool_size < 0:
            raise UserError(f"--patch-size {tuple(patch_size)}, --pool-size {pool_size}: expected 1 or more, 0 or more")
        self.student_channels, self.teacher_channels = student_channels, teacher_channels
        self.rand_mask, self.mask_ratio = rand_mask, mask_ratio
        self.tau, self.groups, self.patch = tau_ocd, M_ocd, tuple(patch_size)
        self.pool = 0 if dataset == "camvid" else pool_size
        self.chunk, self.feature, self.contrast = contrast_chunk, feature, contrast
        same = student_channels == teacher_channels
        # "projetor" is the reference's spelling, kept because the recorded weights are drawn by parameter name
        self.align = nn.Identity() if same else nn.Conv2d(student_channels, teacher_channels, kernel_size=1)
        self.projetor = (EnhancedProjector if enhance_projector else plain_projector)(teacher_channels)
        excluded = excluded_pairs(self.groups, self.patch) if contrast else None
        self.register_buffer("excluded", excluded, persistent=False)
        self._contrasted: tuple[Tensor, Tensor] | None = None

    def forward(self, student_c4: Tensor, teacher_c4: Tensor, *, keep: Tensor | None = None,
                generator: torch.Generator | None = None) -> tuple[Tensor | None, Tensor | None]:
        """(fd, ctr), unweighted scalars, of student [B, C_s, H, W] and teacher [B, C_t, H, W]; None = switched off.

        keep: [B or 1, 1, H, W], non-zero where a position is kept; drawn from ``generator`` (which must be on the
        features' device; None = the default one) when not given. Both losses are computed in float32 or better.
        Raises UserError when the maps do not fit each other or are too small for one patch of the contrast.
        """
        self._check_maps(student_c4, teacher_c4)
        teacher_c4 = teacher_c4.detach()
        if keep is None:
            keep = self.keep_mask(student_c4, generator)
        aligned = self.align(student_c4)
        projected = self.projetor(aligned * keep.to(aligned.dtype))
        ctr = self._contrast(projected, teacher_c4) if self.contrast else None
        return masked_feature_loss(projected, teacher_c4) if self.feature else None, ctr

    def _contrast(self, projected: Tensor, teacher_c4: Tensor) -> Tensor:
        student_map, teacher_map = self.contrast_map(projected), self.contrast_map(teacher_c4)
        self._contrasted = (student_map.detach(), teacher_map)
        return omni_contrastive_loss(student_map, teacher_map, self.tau, self.groups, self.patch, self.excluded,
                                     self.chunk)

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
        return positive_rank(*self._contrasted, self.groups, self.patch, self.excluded, self.chunk)

    def check_size(self, height: int, width: int, stride: int = 8) -> None:
        """Raise UserError when a map of this size holds no whole patch after pooling and there is a contrast."""
        need = [p * max(self.pool, 1) for p in self.patch]
        if self.contrast and (height < need[0] or width < need[1]):
            raise UserError(f"a {height}x{width} feature map is too small to contrast: --pool-size {self.pool} and "
                            f"--patch-size {self.patch[0]} {self.patch[1]} need {need[0]}x{need[1]} or more, "
                            f"for example --crop-size {need[0] * stride} {need[1] * stride}")

    def _check_maps(self, student: Tensor, teacher: Tensor) -> None:
        widths = student.shape[1] == self.student_channels and teacher.shape[1] == self.teacher_channels
        if not widths or len(student) != len(teacher) or student.shape[-2:] != teacher.shape[-2:]:
            raise UserError(f"Af-DCD: student map {tuple(student.shape)} and teacher map {tuple(teacher.shape)}: "
                            f"expected {self.student_channels} and {self.teacher_channels} channels and equal sizes")
        self.check_size(*student.shape[-2:])


#: Option name -> default; those of the reference's parser, and what it had written into the code.
DEFAULTS = {"rand_mask": True, "mask_ratio": 0.75, "enhance_projector": False, "tau_ocd": 0.07, "m_ocd": 16,
            "pool_size": 4, "patch_size": (4, 4), "contrast_chunk": 0, "clip_distiller": 15.0}


def _published(kd: float, fd: float, ctr: float) -> dict[str, float]:
    return {"lambda_kd": kd, "lambda_fd": fd, "lambda_ctr": ctr}


@register("afdcd")
class AfDCD(Distiller):
    """The c4 maps of both networks through :class:`OmniContrastiveFeatureLoss`."""

    title = "augmentation-free dense contrastive distillation"
    paper = "Fan et al., Augmentation-Free Dense Contrastive Knowledge Distillation for Efficient Semantic Segmentation"
    year = 2023
    terms = (Term("fd", 4e-5, "weight of Af-DCD's masked feature mimicking (a sum over the map, hence tiny)"),
             Term("ctr", 1e-3, "weight of Af-DCD's omni-contrastive loss"))
    student_taps = ("c4",)
    teacher_taps = ("c4",)
    # the released scripts. That of Cityscapes and DeepLabV3-ResNet18 asks for centre mask and enhanced projector in a
    # spelling that its program rejects; this is what it means. The backbone is enough to name it: Af-DCD has no other
    # row with ResNet-18 there.
    preset = {"*": _published(1.0, 2e-6, 5e-3), "citys": _published(1.0, 2e-6, 5e-3),
              "citys/resnet18": {"rand_mask": False, "enhance_projector": True},
              "voc": _published(1.0, 1e-6, 5e-3), "camvid": _published(1.0, 8e-6, 1e-2),
              "ade20k": _published(0.5, 1e-6, 4e-2), "coco_stuff_164k": _published(0.5, 5e-6, 5e-3)}
    clip_norm = 15.0
    cost = "two 3x3 convs at teacher width, L1 distances within patches"

    def __init__(self, criterion: OmniContrastiveFeatureLoss, clip_norm: float | None = 15.0) -> None:
        super().__init__()
        self.criterion = criterion
        self.clip_norm = clip_norm or None

    @classmethod
    def add_arguments(cls, group: argparse._ArgumentGroup) -> None:
        def add(flag: str, kind, metavar, help: str, **more) -> None:
            name = flag[2:].replace("-", "_")
            group.add_argument(flag, type=kind, metavar=metavar, default=DEFAULTS[name], help=help, **more)

        def switch(name: str, help: str) -> None:
            group.add_argument(f"--{name}", f"--no-{name}", action=BooleanAction,
                               default=DEFAULTS[name.replace("-", "_")], help=help)

        switch("rand-mask", "mask positions at random; off: the middle third of rows and columns")
        add("--mask-ratio", number(float, 0, 1), "R", "share of the positions that the random mask zeroes")
        switch("enhance-projector", "two-branch projector, twice the parameters")
        add("--tau-ocd", number(float, 0, open_low=True), "T", "temperature of the contrast")
        add("--m-ocd", number(int, 2), "M", "channel groups; has to divide the teacher's channels")
        add("--pool-size", number(int, 0), "N", "max pooling before the contrast, 0 = off; always off on camvid")
        add("--patch-size", number(int, 1), ("H", "W"), "patch of the contrast, in pooled positions", nargs=2)
        add("--contrast-chunk", number(int, 0), "N", "patches contrasted at a time: less memory, same result; 0 = all")
        add("--clip-distiller", number(float, 0), "NORM", "largest gradient norm of aligner and projector; 0 = off")

    @classmethod
    def build(cls, context: BuildContext) -> AfDCD:
        """Raises UserError when a network has no c4, or the crop is too small for pooling and patches."""
        check_taps(cls, context.student, context.teacher)
        options = {name: getattr(context.options, name, default) for name, default in DEFAULTS.items()}
        clip = options.pop("clip_distiller")
        criterion = OmniContrastiveFeatureLoss(context.student.channels["c4"], context.teacher.channels["c4"],
                                               M_ocd=options.pop("m_ocd"), dataset=context.dataset,
                                               feature="fd" in context.active, contrast="ctr" in context.active,
                                               **options)
        stride = context.student.stride
        criterion.check_size(*(-(-side // stride) for side in context.crop_size), stride)
        return cls(criterion, clip)

    def forward(self, student: SegOutput, teacher: SegOutput, target: Tensor, step: int,
                generator: torch.Generator | None = None) -> dict[str, Tensor]:
        losses = self.criterion(student.c4, teacher.c4, generator=generator)
        return {name: loss for name, loss in zip(("fd", "ctr"), losses, strict=True) if loss is not None}

    def diagnostics(self) -> dict[str, Tensor]:
        """``positive_rank``: share of the negatives nearer than the positive in the last pass, 0 = term solved."""
        rank = self.criterion.positive_rank()
        return {} if rank is None else {"positive_rank": rank}
