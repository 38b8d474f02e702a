"""Every method with a teacher that does not know every class: as if there were only the classes in common."""
from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from method_cases import CLASSES, STUDENT, TEACHER, Case, labels, outputs, own_terms, smallest_crop, values
from torch import Tensor, nn

from losses.core import NetInfo, RunFacts, methods
from losses.core.common import CommonClasses
from losses.core.objective import Objective, build_distillers, views
from models.class_map import ClassMap, MappedTeacher
from models.output import SegOutput
from utils.errors import UserError

NAMES = list(methods())
COMMON, IGNORED = (0, 2, 3), 255
#: methods that read scores of the teacher, by their presets; the others are given everything
ON_SCORES = {"adv", "aicsd", "bpkd", "cwd", "dist", "dkd", "dsd", "kd", "kt", "lskd", "maskd"}


class Student(nn.Module):
    """Gives the maps that it is made of."""

    def __init__(self, maps: SegOutput) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, images: Tensor) -> SegOutput:
        return self.maps


def objective_of(case: Case, run: RunFacts, student: NetInfo, teacher: NetInfo, maps: SegOutput) -> Objective:
    """As ``engine.build`` makes it, with weights that depend on the seed alone."""
    torch.manual_seed(0)
    known = (case.options, run, student, teacher)
    common = run.common and CommonClasses(run.common, run.num_class, run.ignore_label)
    return Objective(Student(maps), build_distillers(*known), run.active, ignore_label=run.ignore_label, common=common,
                     narrowed=[name for name, view in views(*known).items() if view.narrowed])


def step(objective: Objective, teacher: SegOutput, target: Tensor) -> dict[str, Tensor]:
    """The terms of one step, without those that do not come from methods."""
    images = torch.randn((len(target), 3, *target.shape[1:]), generator=torch.Generator().manual_seed(5))
    terms = objective(images, teacher, target, 0, torch.Generator().manual_seed(3))
    return {name: value for name, value in terms.items() if name not in ("task", "aux")}


def narrow(maps: SegOutput) -> SegOutput:
    return maps._replace(logits=maps.logits[:, list(COMMON)], aux=maps.aux[:, list(COMMON)])


@pytest.mark.parametrize("name", NAMES)
def test_a_method_trains_on_the_common_classes(name) -> None:
    """To the last bit what it gives where there are no other classes; one that reads no scores, where all are known."""
    crop = smallest_crop(name)
    case = Case(name, crop, ignore_label=IGNORED)
    few, run = TEACHER.of_classes(len(COMMON)), replace(case.run, common=COMMON)
    student, known = outputs(STUDENT, crop), SegOutput(*(x.detach() for x in outputs(TEACHER, crop, seed=1)))
    teacher, target = narrow(known), labels(crop, ignore_label=IGNORED)
    objective = objective_of(case, run, STUDENT, few, student)
    terms = step(objective, teacher, target)
    assert own_terms(name, case.active) <= set(terms) and (name in objective.narrowed) == (name in ON_SCORES)

    numbered = torch.full_like(target, IGNORED)
    for place, k in enumerate(COMMON):
        numbered[target == k] = place
    only = objective_of(case, replace(case.run, num_class=len(COMMON)), STUDENT.of_classes(len(COMMON)), few,
                        narrow(student))
    all_known = objective_of(case, case.run, STUDENT, TEACHER, student)
    of_few, of_all = values(step(only, teacher, numbered)), values(step(all_known, known, target))
    owner = {term.name: method for method, cls in methods().items() for term in cls.terms}
    assert values(terms) == {term: (of_few if owner[term] in objective.narrowed else of_all)[term] for term in terms}

    sum(objective.weighted(terms, 0).values()).backward()
    objective.after_step(0)
    reached = [x.grad for x in student if x is not None and x.grad is not None]
    assert reached and all(grad.isfinite().all() for grad in reached)
    if set(objective.distillers) <= ON_SCORES and student.logits.grad is not None:
        assert not student.logits.grad[:, [1, 4]].any()  # nothing is said of what the teacher does not know


@pytest.mark.parametrize("name", sorted(ON_SCORES))
def test_a_teacher_whose_classes_are_in_another_order_teaches_the_same(name) -> None:
    """To the last bit, and as well when one of its classes has been split in two."""
    crop, order = smallest_crop(name), [3, 0, 4, 1, 2]
    case, known = Case(name, crop), SegOutput(*(x.detach() for x in outputs(TEACHER, crop, seed=1)))
    student, target = outputs(STUDENT, crop), labels(crop)
    groups = tuple((order.index(k),) for k in range(CLASSES))
    found = [values(step(objective_of(case, case.run, STUDENT, TEACHER, student), teacher, target)) for teacher in (
        known, through_map(known, order, groups))]
    assert found[0] == found[1]

    parts = math.log(0.3), math.log(0.7)
    halves = (torch.cat([x[:, :4], *(x[:, 4:] + part for part in parts)], dim=1) for x in (known.logits, known.aux))
    split = through_map(SegOutput(*halves, *known[2:]), range(6), ((0,), (1,), (2,), (3,), (4, 5)))
    torch.testing.assert_close(split.logits, known.logits)
    of_split = values(step(objective_of(case, case.run, STUDENT, TEACHER, student), split, target))
    assert of_split == pytest.approx(found[0], rel=1e-4, abs=1e-9)


def through_map(maps: SegOutput, order: Iterable[int], groups: tuple[tuple[int, ...], ...]) -> SegOutput:
    """The maps of a teacher whose classes stand in an order, behind a map."""
    shuffled = maps._replace(logits=maps.logits[:, list(order)], aux=maps.aux[:, list(order)])
    net = Student(shuffled)
    net.name = net.preprocess = net.output_stride = net.strides = net.channels = None
    class_map = ClassMap(tuple(range(len(groups))), groups, len(groups), shuffled.logits.shape[1])
    return MappedTeacher(net, class_map)(None)


def test_one_class_in_common_is_enough_for_features_alone() -> None:
    for name, refused in (("kd", True), ("mse", False)):
        case = Case(name, (64, 64))
        arguments = (case, replace(case.run, common=(3,)), STUDENT, TEACHER.of_classes(1), outputs(STUDENT, (64, 64)))
        if refused:
            with pytest.raises(UserError, match="'kd' compares scores of classes, but teacher and data set have only") \
                    as error:
                objective_of(*arguments)
            assert error.value.settings == ("teacher_classes",)
        else:
            assert set(objective_of(*arguments).distillers) == {"mse"}


@pytest.mark.parametrize(("name", "reads"), [("kd", True), ("dkd", False)])
def test_images_without_labels_beside_a_map(name, reads) -> None:
    """A method on the common classes that needs labels leaves them out, another one learns from them."""
    case, crop, target = Case(name, (64, 64)), (64, 64), labels((64, 64), 3)
    maps, known = outputs(STUDENT, crop, 3), outputs(TEACHER, crop, 3, seed=1)
    few, run, found = TEACHER.of_classes(len(COMMON)), replace(case.run, common=COMMON), []
    for count, unlabeled in ((3, 1), (2, 0)):
        student, teacher = (SegOutput(*(x.detach()[:count] for x in one)) for one in (maps, known))
        objective = objective_of(case, run, STUDENT, few, student)
        objective.images_without_labels = unlabeled
        found.append(values(step(objective, narrow(teacher), target[:count])))
    assert (found[0] == found[1]) is not reads and found[0]


def test_labels_of_other_classes_are_ignored() -> None:
    common = CommonClasses((1, 4), CLASSES, 255)
    assert common.labels(torch.tensor([[[0, 1, 2, 3, 4, 255, -1]]])).tolist() == [[[255, 0, 255, 255, 1, 255, 255]]]
