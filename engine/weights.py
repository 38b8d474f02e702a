"""Weights of terms whose size depends on that of the map: from the published map to the run's."""
from __future__ import annotations

from math import prod

from engine.settings import Settings
from losses.core import NetInfo, Term
from losses.core.distiller import Distiller

#: output stride of the published networks, and channels of each tap of their teachers, ResNet-101
STRIDE, CHANNELS = 8, {"c4": 2048}


def map_side(side: int, stride: int) -> int:
    """Positions along a side of a crop at an output stride; a part of one counts."""
    return -(-side // stride)


def weight_factors(settings: Settings, teacher: NetInfo | None) -> dict[str, tuple[float, str]]:
    """{term: (factor on its weight, why in words)} for the active terms that ``scale_weights`` names. At the published
    sizes the factor is exactly 1."""
    wanted = settings.recipe.scale_weights or ()
    return {term.name: _factor(cls, term, settings, teacher) for cls in settings.methods.values() for term in cls.terms
            if term.name in wanted and term.name in settings.active and teacher is not None}


def _factor(cls: type[Distiller], term: Term, settings: Settings, teacher: NetInfo) -> tuple[float, str]:
    crop = cls.published_crop.get(settings.data.dataset, cls.published_crop["*"])
    published, own = ([map_side(side, stride) for side in sides]
                      for sides, stride in ((crop, STRIDE), (settings.data.crop_size, teacher.stride)))
    if term.sum_over:
        published.append(CHANNELS[term.sum_over])
        own.append(teacher.channels[term.sum_over])
        factor, what = prod(published) / prod(own), f"a sum over the teacher's {term.sum_over}"
    else:
        factor, what = prod(own) / prod(published), "it shrinks with the number of positions"
    sizes = (" x ".join(map(str, size)) for size in (own, published))
    return factor, "{}, {} in place of the published {}".format(what, *sizes)
