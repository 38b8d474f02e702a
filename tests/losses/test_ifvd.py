"""IFVD: recorded values, the loop over classes as a twin, labels at the edges."""
from __future__ import annotations

import pytest
import torch
from method_cases import batch, make
from reference import fill, golden

from engine.presets import preset
from losses.core import NetInfo, class_members, methods, position_labels
from losses.ifvd import IFVD, ifvd_loss
from models.output import SegOutput
from utils.errors import UserError

DTYPES = (torch.float32, torch.float64)
CLASSES = 6


def maps(batch=2, size=(9, 7), dtype=torch.float64) -> tuple:
    student = fill.tensor("student", (batch, 5, *size), 3, dtype=dtype).relu().requires_grad_()
    return student, fill.tensor("teacher", (batch, 8, *size), 4, 1.3, dtype).relu()


def labels(batch=2, size=(70, 53), ignore=-1) -> torch.Tensor:
    return fill.labels("labels", (batch, *size), CLASSES, ignore=ignore)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", golden.case_ids("ifvd/"))
def test_recorded(name, dtype):
    case = golden.load_case(name)
    inputs = golden.make_inputs(case, dtype)
    loss = ifvd_loss(*inputs.values(), golden.make_labels(case), case["config"]["classes"], case["labels"]["ignore"])
    golden.check_losses(case, {"ifv": loss}, inputs)


def slow_loss(student, teacher, target, ignore) -> torch.Tensor:
    """Image by image and class by class, positions picked one by one."""
    height, width = student.shape[-2:]
    rows = [i * target.shape[1] // height for i in range(height)]
    columns = [j * target.shape[2] // width for j in range(width)]
    small = target[:, rows][:, :, columns]
    similarity = []
    for feature in (student, teacher):
        found = torch.ones_like(feature[:, 0])
        for n in range(len(feature)):
            for k in range(CLASSES):
                inside = (small[n] == k) & (small[n] != ignore)
                vectors = feature[n][:, inside]
                mean = vectors.sum(dim=1, keepdim=True) / (inside.sum() + 1e-6)
                lengths = vectors.norm(dim=0) * mean.norm(dim=0)
                found[n] = found[n].masked_scatter(inside, (vectors * mean).sum(dim=0) / lengths)
        similarity.append(found)
    return (similarity[0] - similarity[1]).square().mean()


@pytest.mark.parametrize("ignore", [-1, 255])
@pytest.mark.parametrize(("batch", "size", "label_size"), [(2, (9, 7), (70, 53)), (1, (8, 8), (64, 64)),
                                                           (3, (5, 12), (5, 12))])
def test_equals_the_loop_over_classes(batch, size, label_size, ignore):
    student, teacher = ((x.detach() + 0.1).requires_grad_(x.requires_grad) for x in maps(batch, size))
    target = labels(batch, label_size, ignore)
    assert (target == ignore).any()
    fast = ifvd_loss(student, teacher, target, CLASSES, ignore)
    slow = slow_loss(student, teacher, target, ignore)
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=0)
    gradients = [torch.autograd.grad(x, student)[0] for x in (fast, slow)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-12)


def test_means_are_per_image():
    """A batch of two equals the mean over its images: classes do not mix between them."""
    (student, teacher), target = maps(), labels()
    alone = [ifvd_loss(student[n:n + 1], teacher[n:n + 1], target[n:n + 1], CLASSES) for n in range(2)]
    torch.testing.assert_close(ifvd_loss(student, teacher, target, CLASSES), torch.stack(alone).mean())


def test_the_gradient_flows_through_the_means():
    """Fixed means would leave a position without neighbours of its class as its own constant target."""
    student, teacher = maps(1, (1, 2))
    target = torch.tensor([[[3, 3]]])
    (gradient,) = torch.autograd.grad(ifvd_loss(student, teacher, target, CLASSES), student)
    epsilon, numeric = 1e-6, torch.zeros_like(student)
    for index in range(student.numel()):
        moved = student.detach().repeat(2, 1, 1, 1)
        moved.view(2, -1)[0, index] += epsilon
        moved.view(2, -1)[1, index] -= epsilon
        up, down = (ifvd_loss(m[None], teacher, target, CLASSES) for m in moved)
        numeric.view(-1).data[index] = (up - down) / (2 * epsilon)
    positive = student > 0
    torch.testing.assert_close(gradient[positive], numeric[positive], rtol=1e-4, atol=1e-8)
    assert gradient.abs().max() > 1e-4


@pytest.mark.parametrize("ignore", [-1, 255])
def test_nothing_labelled_gives_zero(ignore):
    student, teacher = (x.detach() + 0.1 for x in maps())
    student.requires_grad_()
    loss = ifvd_loss(student, teacher, torch.full((2, 70, 53), ignore), CLASSES, ignore)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-20) and student.grad.abs().max() < 1e-10


def test_ignored_positions_count_in_the_mean():
    student, teacher = (x.detach() + 0.1 for x in maps(1, (4, 4)))
    target = torch.full((1, 4, 4), -1)
    target[:, :2] = 2
    half = ifvd_loss(student, teacher, target, CLASSES)
    whole = ifvd_loss(student[:, :, :2], teacher[:, :, :2], target[:, :2], CLASSES)
    torch.testing.assert_close(half, whole / 2)


def test_an_ignore_label_inside_the_classes_is_ignored():
    (student, teacher), target = maps(), labels()
    moved = torch.where(target == 3, -1, target)
    torch.testing.assert_close(ifvd_loss(student, teacher, target, CLASSES, 3),
                               ifvd_loss(student, teacher, moved, CLASSES, -1))


def test_members():
    target = torch.tensor([[[0, 0, 2, 2], [0, 0, 2, 2], [255, 255, -1, -1], [255, 255, -1, -1]]])
    members = class_members(position_labels(target.short(), (2, 2), 3), 3)
    assert members.mT.int().tolist() == [[[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]]]


def test_autocast_and_half_precision_are_computed_in_float32():
    student, teacher = (x.detach().bfloat16() for x in maps())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ifvd_loss(student, teacher, labels(), CLASSES)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, ifvd_loss(student.float(), teacher.float(), labels(), CLASSES), rtol=0, atol=0)


def test_equal_maps_give_zero_and_the_teacher_no_gradient():
    student, teacher = maps()
    assert ifvd_loss(student, student.detach(), labels(), CLASSES).item() == 0
    teacher.requires_grad_()
    ifvd_loss(student, teacher, labels(), CLASSES).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_method():
    assert methods()["ifvd"] is IFVD
    (student, teacher), target = maps(), labels(ignore=255)
    net = NetInfo("net", {"logits": CLASSES, "head": 5}, CLASSES)
    method = make("ifvd", net, net, ignore_label=255)
    empty = dict.fromkeys(SegOutput._fields)
    terms = method(batch(SegOutput(**{**empty, "head": student}), SegOutput(**{**empty, "head": teacher}), target))
    assert list(terms) == ["ifvd"] and not method.state_dict()
    assert terms["ifvd"].item() == ifvd_loss(student, teacher, target, CLASSES, 255).item()


def test_preset_is_the_published_row():
    weights = {"lambda_kd": 1.0, "lambda_ifvd": 20.0, "lambda_adv": 0.001}
    for dataset, adversarial in (("citys", 0.001), ("ade20k", 0.001), ("camvid", 0.0)):
        found = {k: v for k, v in preset("ifvd", dataset, "resnet18").items() if k in weights or v}
        assert found == {**weights, "lambda_adv": adversarial}


def test_errors_name_what_is_wrong():
    student, teacher = maps()
    with pytest.raises(UserError, match=r"ifvd.*\(2, 5, 9, 7\).*\(2, 8, 9, 6\)"):
        ifvd_loss(student, teacher[..., :6], labels(), CLASSES)
