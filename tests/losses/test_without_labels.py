"""Images without labels in a batch: which terms of every method leave them out, and that nothing else changes."""
from __future__ import annotations

import re
from collections.abc import Iterable

import pytest
import torch
from helpers import ROOT
from method_cases import STUDENT, TEACHER, Case, build, labels, outputs, run, smallest_crop, values
from torch import Tensor, nn

from losses.core import methods
from losses.core.objective import Objective
from losses.core.task import SegCrossEntropyLoss, WeightedCrossEntropyLoss
from models.output import SegOutput

#: every term that is a loss, with its method
TERMS = [(name, term) for name, cls in methods().items() for term in cls.terms if not term.scales_task]
CRITERIA = {"plain": lambda: SegCrossEntropyLoss(group_size=2), "hard": lambda: WeightedCrossEntropyLoss(
    group_size=2, class_weights=[1.0, 2.0, 3.0, 0.5, 0.0], hard=(0.7, 0.2))}


class Fixed(nn.Module):
    """A network that returns what it is given, row by row, so that no batch norm mixes the images."""

    def __init__(self, output: SegOutput) -> None:
        super().__init__()
        self.output, self.weight = output, nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor) -> SegOutput:
        return self.output


def rows(maps: SegOutput, count: int) -> SegOutput:
    return SegOutput(*(None if x is None else x.detach()[:count].clone().requires_grad_() for x in maps))


def losses(distillers: dict, student: SegOutput, teacher: SegOutput, target: Tensor, unlabeled: int = 0,
           criterion: nn.Module | None = None, terms: Iterable[str] = ()) -> dict[str, Tensor]:
    objective = Objective(Fixed(student), distillers, dict.fromkeys(terms, 1.0), group_size=2, criterion=criterion,
                          images_without_labels=unlabeled)
    images = torch.arange(len(target) * 3 * target[0].numel(), dtype=torch.float32).view(-1, 3, *target.shape[1:]) % 255
    return objective(images, teacher, target, 0, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", CRITERIA)
def test_the_supervised_loss_is_that_of_the_labeled_images(kind) -> None:
    """Exactly, also where an image has no labeled pixel, and with one group that would hold images of either kind."""
    for labeled in (2, 3):
        student, target = outputs(STUDENT, (64, 64), 5), labels((64, 64), 5)
        target[1] = target[labeled:] = -1
        found = losses({}, rows(student, 5), student, target, 5 - labeled, CRITERIA[kind]())
        alone = losses({}, rows(student, labeled), student, target[:labeled], 0, CRITERIA[kind]())
        assert values(found) == values(alone) and found.keys() == {"task", "aux"}
        diluted = losses({}, rows(student, 5), student, target, 0, CRITERIA[kind]())
        assert diluted["task"] < 0.8 * found["task"]


@pytest.mark.parametrize(("name", "term"), TERMS, ids=[term.name for _, term in TERMS])
class TestEveryTerm:
    def test_it_says_whether_it_needs_labels(self, name, term) -> None:
        """Other labels change a term that says so, and no other."""
        alone = frozenset([term.name])
        crop, found = smallest_crop(name, alone), []
        maps = outputs(STUDENT, crop), outputs(TEACHER, crop, seed=1)
        for seed in (0, 1):
            method = build(name, crop, terms=alone)
            found.append(run(method, *maps, labels(crop, seed=seed))[term.name].item())
        assert (found[0] != found[1]) == term.needs_labels

    def test_images_without_labels_change_it_only_if_it_does_without(self, name, term) -> None:
        alone = frozenset([term.name])
        crop, results = smallest_crop(name, alone), []
        student, teacher, target = outputs(STUDENT, crop, 3), outputs(TEACHER, crop, 3, seed=1), labels(crop, 3)
        target[2] = -1
        for count, unlabeled in ((3, 1), (2, 0)):
            method = build(name, crop, terms=alone)
            own = rows(student, count)
            result = losses({name: method}, own, SegOutput(*(x.detach()[:count] for x in teacher)), target[:count],
                            unlabeled, terms=alone)
            results.append(result[term.name].item())
            if unlabeled:
                result[term.name].backward()
                used = [x.grad[2].abs().sum() for x in own if x.grad is not None]
        assert bool(sum(used)) != term.needs_labels
        if term.needs_labels:
            assert results[0] == results[1]


@pytest.mark.parametrize("name", [name for name, cls in methods().items() if len({
    term.needs_labels for term in cls.terms}) == 2])
def test_terms_of_one_method_part_where_they_have_to(name) -> None:
    """CIRKD, CIRKDv2 and KT have terms of either kind: each counts as it would alone."""
    terms = {term.name: term for term in methods()[name].terms if term.name != "cirkdv2_fitnet"}
    crop = smallest_crop(name, frozenset(terms))
    student, teacher, target = outputs(STUDENT, crop, 4), outputs(TEACHER, crop, 4, seed=1), labels(crop, 4)
    target[2:] = -1
    whole, part = (losses({name: build(name, crop, terms=frozenset(terms))}, rows(student, count),
                          SegOutput(*(x.detach()[:count] for x in teacher)), target[:count], unlabeled, terms=terms)
                   for count, unlabeled in ((4, 2), (2, 0)))
    assert whole.keys() - {"task", "aux"} == terms.keys() == Case(name, crop, terms=frozenset(terms)).active
    same = {one for one in terms if whole[one].item() == part[one].item()}
    assert same == {one for one, term in terms.items() if term.needs_labels}


def test_the_page_says_what_holds() -> None:
    """Every method stands in the table of docs/unlabelled.md, with its terms where they belong."""
    page, found = (ROOT / "docs/unlabelled.md").read_text(encoding="utf-8"), {}
    for cells in re.findall(r"^\| (`.*?) \| (.*?) \| (.*?) \|$", page, re.MULTILINE):
        names, *kinds = ([*re.findall(r"`(\w+)`", re.split(":", cell)[0])] for cell in cells)
        for name in names:
            every = {term.name for term in methods()[name].terms if not term.scales_task}
            found[name] = [every if cell.startswith("all") else set(kind) for cell, kind in
                           zip(cells[1:], kinds, strict=True)]
    assert found == {name: [{term.name for of, term in TERMS if of == name and term.needs_labels is needs}
                            for needs in (False, True)] for name in methods()}
