"""Five losses written straight from their formulas, in the shape that published implementations give them.

Each makes every intermediate that the formula names: P x P maps, one full-size tensor per class, a loop over pairs of
images or layers, a 5-D product. ``test_slow_forms.py`` shows that the ones in ``losses/`` equal them, and
``tools/benchmark.py slow-forms`` what that saves.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from losses.core.relations import minibatch_pixel_loss
from losses.dsd import csd_loss, psd_loss
from losses.ifvd import ifvd_loss
from losses.maskd import maskd_loss
from losses.skd import pairwise_loss

TAU, TEMPERATURE = 0.1, 4.0


class Maps(NamedTuple):
    """What the five losses read. heads [B, C_s | C_t, h, w], logits and aux [B, K, h, w], labels int64 [B, h, w],
    tokens [T, K]; the teacher's without a gradient."""

    student_head: Tensor
    teacher_head: Tensor
    student_logits: Tensor
    teacher_logits: Tensor
    student_aux: Tensor
    teacher_aux: Tensor
    labels: Tensor
    tokens: Tensor


def make_maps(batch: int, size: tuple[int, int], classes: int, widths: tuple[int, int], *, tokens: int = 8,
              dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0) -> Maps:
    """Random maps; a tenth of the labels is ignored (-1). The student's maps are leaves that require a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    heads = [draw(batch, width, *size).relu() for width in widths]
    logits = [2 * draw(batch, classes, *size) for _ in range(4)]
    labels = torch.randint(0, classes, (batch, *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = -1
    maps = Maps(*heads, *logits, labels.to(device), draw(tokens, classes))
    for name in ("student_head", "student_logits", "student_aux"):
        getattr(maps, name).requires_grad_()
    return maps


def skd_slow(maps: Maps) -> Tensor:
    """(1 / B P^2) sum (A_s - A_t)^2 over the P x P maps A of cosines between the 2x2-pooled positions."""
    similarity = []
    for head in (maps.student_head, maps.teacher_head):
        nodes = F.normalize(F.max_pool2d(head, 2, ceil_mode=True).flatten(2), dim=1)
        similarity.append(torch.einsum("bcp,bcq->bpq", nodes, nodes))
    difference = (similarity[0] - similarity[1]) ** 2
    return difference.sum() / (len(difference) * difference.shape[1] ** 2)


def ifvd_slow(maps: Maps) -> Tensor:
    """Mean over positions of the squared difference of the cosines between a feature and its class's mean, with a
    loop over the classes that rewrites the whole map of means."""
    cosines = []
    for head in (maps.student_head, maps.teacher_head):
        centers = head.clone()
        for k in range(maps.student_logits.shape[1]):
            mask = (maps.labels == k).to(head.dtype).unsqueeze(1).expand_as(head)
            mean = (mask * head).sum((2, 3)) / (mask.sum((2, 3)) + 1e-6)
            centers = (1 - mask) * centers + mask * mean[:, :, None, None]
        cosines.append(F.cosine_similarity(head, centers, dim=1))
    return ((cosines[0] - cosines[1]) ** 2).mean()


def cirkd_slow(maps: Maps) -> Tensor:
    """Mean over ordered pairs of images of the KL divergence between the softmaxes of their P x P cosines."""
    student, teacher = (F.normalize(h, dim=1).flatten(2) for h in (maps.student_head, maps.teacher_head))
    total = student.new_zeros(())
    for i in range(len(student)):
        for j in range(len(student)):
            own, taught = (x[i].transpose(0, 1) @ x[j] / TAU for x in (student, teacher))
            q, p = F.log_softmax(own, dim=1), F.softmax(taught, dim=1)
            total = total + F.kl_div(q, p, reduction="batchmean")
    return total / len(student) ** 2


def dsd_slow(maps: Maps) -> Tensor:
    """Pixel similarity with a loop over pairs of layers, each attention map made again for each pair; plus category
    similarity."""

    def attention(x: Tensor) -> Tensor:
        return F.normalize((x ** 2).mean(1).flatten(1), dim=1)

    layers = [(maps.student_aux, maps.student_head, maps.student_logits),
              (maps.teacher_aux, maps.teacher_head, maps.teacher_logits)]
    pairs = [(0, 1), (0, 2), (1, 2)]
    pixel = maps.student_head.new_zeros(())
    for i, j in pairs:
        own, taught = (F.normalize(attention(taps[j]) - attention(taps[i]), dim=1) for taps in layers)
        pixel = pixel + ((own - taught) ** 2).mean() / len(pairs)
    pooled = [F.avg_pool2d(taps[2], 2, ceil_mode=True).flatten(2) for taps in layers]
    own, taught = (torch.einsum("bkp,bmp->bkm", phi, phi) for phi in (F.softmax(x / TEMPERATURE, 2) for x in pooled))
    return pixel + ((own - taught) ** 2).mean()


def maskd_slow(maps: Maps) -> Tensor:
    """Half the mean over images, tokens and classes of the masked squared differences, as a [B, T, K, h, w] tensor."""
    masks = torch.einsum("tk,bkhw->bthw", maps.tokens, maps.teacher_logits).sigmoid()
    own, taught = (masks[:, :, None] * z[:, None] for z in (maps.student_logits, maps.teacher_logits))
    sums = ((own - taught) ** 2).sum((3, 4))
    return (sums / (masks.sum((2, 3))[:, :, None] + 1e-5)).mean() / 2


def _skd(maps: Maps) -> Tensor:
    return pairwise_loss(maps.student_head, maps.teacher_head)


def _ifvd(maps: Maps) -> Tensor:
    return ifvd_loss(maps.student_head, maps.teacher_head, maps.labels, maps.student_logits.shape[1])


def _cirkd(maps: Maps) -> Tensor:
    return minibatch_pixel_loss(maps.student_head, maps.teacher_head, group_size=0, tau=TAU)


def _dsd(maps: Maps) -> Tensor:
    pixel = psd_loss((maps.student_aux, maps.student_head, maps.student_logits),
                     (maps.teacher_aux, maps.teacher_head, maps.teacher_logits))
    return pixel + csd_loss(maps.student_logits, maps.teacher_logits, TEMPERATURE)


def _maskd(maps: Maps) -> Tensor:
    return maskd_loss(maps.student_logits, maps.teacher_logits, maps.tokens)


#: name -> (slow form, the one in ``losses/``)
FORMS: dict[str, tuple[Callable[[Maps], Tensor], Callable[[Maps], Tensor]]] = {
    "skd": (skd_slow, _skd), "ifvd": (ifvd_slow, _ifvd), "cirkd": (cirkd_slow, _cirkd), "dsd": (dsd_slow, _dsd),
    "maskd": (maskd_slow, _maskd)}
