"""Weights of terms whose size depends on that of the map: from the published map to the run's."""
from __future__ import annotations

from math import prod

from engine.settings import Settings
from losses.core import NetInfo, Term
from losses.core.distiller import PUBLISHED_MAPS, Distiller

#: stride of the published networks' logits and head
STRIDE = 8


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
    tap = term.sum_over or term.of_unit_maps
    channels, published_stride = PUBLISHED_MAPS.get(tap, (1, STRIDE))
    published = [map_side(side, published_stride) for side in crop]
    own = [map_side(side, teacher.stride_of(tap)) for side in settings.data.crop_size]
    if term.sum_over:
        published.append(channels)
        own.append(teacher.channels[tap])
        factor, what = prod(published) / prod(own), f"a sum over the teacher's {tap}"
    else:
        factor, what = prod(own) / prod(published), "it shrinks with the number of positions"
    sizes = (" x ".join(map(str, size)) for size in (own, published))
    return factor, "{}, {} in place of the published {}".format(what, *sizes)
