"""Stored scores of the teacher in place of its passes: where they can be equal, and whose they are."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

import dataset as data
from dataset.scores import open_scores
from engine.log import LOG
from engine.settings import Settings
from losses.core.facts import NetInfo, RunFacts
from losses.core.objective import active_methods
from models.output import CLASS_TAPS
from utils.errors import UserError
from utils.module_state import weights_digest


def scores_read(settings: Settings, facts: RunFacts, student: nn.Module, teacher: nn.Module | None) -> dict[str, int]:
    """{tap: channels} of the teacher's scores that the methods of a run read. UserError where stored scores cannot
    replace the teacher: no method reads one, one reads features, or images are scaled at random."""
    if teacher is None:
        raise UserError("stored scores of a teacher: no method of this run reads a teacher",
                        settings=["teacher_scores"])
    infos, read = (NetInfo.of(student), NetInfo.of(teacher)), set()
    for name, cls in active_methods(facts.active).items():
        taps = cls.requires(settings.method_options[name], facts, *infos).teacher
        if features := [tap for tap in taps if tap not in CLASS_TAPS]:
            raise UserError(f"method '{name}' reads {', '.join(features)} of the teacher, and only its scores (logits, "
                            "aux) are stored: expected methods that read no features", settings=["teacher_scores"])
        read |= set(taps)
    if settings.data.random_scale:
        raise UserError("stored scores of a teacher: random scaling shows it other images in every step, whose scores "
                        "are not the scaled ones: expected --no-random-scale, and --crop-size of the largest image, so "
                        "that the crop is the whole image", settings=["teacher_scores"])
    return {tap: infos[1].channels[tap] for tap in CLASS_TAPS if tap in read}


def of_teacher_and_data(settings: Settings, teacher: nn.Module, images: data.SegmentationDataset) -> dict[str, Any]:
    """What stored scores depend on, as JSON values. teacher: as it was loaded."""
    precision = settings.speed.teacher_precision or settings.speed.amp
    taps = {"taps": settings.networks.teacher_taps} if settings.networks.teacher_taps else {}
    weights = weights_digest(teacher.state_dict(), teacher.preprocess)
    return {"teacher": {"name": teacher.name, "weights": weights, **taps},
            "data": data.fingerprint([images]), "crop": list(images.crop_size), "images": len(images),
            "precision": "float32" if precision == "off" else precision}


def use_scores(settings: Settings, facts: RunFacts, student: nn.Module, teacher: nn.Module | None,
               *sets: data.SegmentationDataset | None) -> str:
    """Let training sets (None: there is none) deliver the scores of ``--teacher-scores`` with their images. Returns how
    these are stored: the setting ``stored_scores``. UserError where these cannot replace the teacher, or are of another
    teacher or other images."""
    taps, folder = scores_read(settings, facts, student, teacher), Path(settings.networks.teacher_scores).expanduser()
    opened = []
    for images in filter(None, sets):
        images.scores = open_scores(folder, images.split, of_teacher_and_data(settings, teacher, images))
        opened.append([images.scores.about[key] for key in ("taps", "size", "dtype", "top_k")])
        if missing := taps.keys() - images.scores.taps.keys():
            raise UserError(f"{folder}: no {', '.join(sorted(missing))} of the teacher are stored; expected the folder "
                            "that tools/cache_teacher.py has filled for this run", settings=["teacher_scores"])
    if any(one != opened[0] for one in opened):
        raise UserError(f"{folder}: the scores of the images with and without labels are stored in different ways; "
                        "expected those of one command", settings=["teacher_scores"])
    *_, dtype, top_k = opened[0]
    kind = f"{dtype}, top {top_k}" if top_k else dtype
    LOG.info("scores of the teacher from %s: %s", folder, kind)
    if top_k:
        LOG.warning("--top-k %d of stored scores: these classes have the teacher's probabilities at temperature 1, and "
                    "nothing else is the teacher's (docs/unlabelled.md)", top_k)
    return kind
