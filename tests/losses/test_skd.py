"""SKD's pair-wise term: recorded values, the two exact forms, the similarity maps written out as loops."""
from __future__ import annotations

import pytest
import torch
from method_cases import batch, make, options_of_method
from reference import fill, golden

from engine.presets import preset
from losses.core import NetInfo, methods
from losses.skd import SKD, gram_distance, map_distance, pairwise_loss, pool_nodes, unit_nodes
from models.output import SegOutput
from utils.errors import UserError

DTYPES = (torch.float32, torch.float64)


def maps(student_shape=(2, 16, 9, 7), teacher_shape=(2, 24, 9, 7), dtype=torch.float64) -> tuple:
    student = fill.tensor("student", student_shape, 3, dtype=dtype).relu().requires_grad_()
    return student, fill.tensor("teacher", teacher_shape, 4, 1.3, dtype).relu()


def form_of(name: str) -> str:
    return "original" if "original" in name else "cirkd"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", golden.case_ids("skd/pairwise"))
def test_recorded(name, dtype):
    case = golden.load_case(name)
    inputs = golden.make_inputs(case, dtype)
    golden.check_losses(case, {"pairwise": pairwise_loss(*inputs.values(), form_of(name))}, inputs)


@pytest.mark.parametrize("distance", [gram_distance, map_distance])
@pytest.mark.parametrize("name", golden.case_ids("skd/pairwise"))
def test_recorded_in_either_exact_form(name, distance):
    case, form = golden.load_case(name), form_of(name)
    inputs = golden.make_inputs(case)
    nodes = [unit_nodes(pool_nodes(x, form), form) for x in inputs.values()]
    batch, _, count = nodes[0].shape
    golden.check_losses(case, {"pairwise": distance(*nodes) / (batch * count ** 2)}, inputs)


def slow_loss(student: torch.Tensor, teacher: torch.Tensor) -> float:
    """The formula over pairs of nodes, 2x2 windows cut by hand."""
    total, batch = 0.0, len(student)
    height, width = student.shape[-2:]
    corners = [(i, j) for i in range(0, height, 2) for j in range(0, width, 2)]
    for n in range(batch):
        nodes = [[x[n, :, i:i + 2, j:j + 2].amax(dim=(1, 2)) for i, j in corners] for x in (student, teacher)]
        for p in range(len(corners)):
            for q in range(len(corners)):
                ours, theirs = (v[p] @ v[q] / (v[p].norm() * v[q].norm()) for v in nodes)
                total += (ours - theirs).item() ** 2
    return total / (batch * len(corners) ** 2)


@pytest.mark.parametrize("size", [(6, 8), (9, 7)])
def test_equals_the_formula(size):
    student, teacher = maps((2, 5, *size), (2, 7, *size))
    assert pairwise_loss(student, teacher).item() == pytest.approx(slow_loss(student, teacher), rel=1e-10)


@pytest.mark.parametrize("channels", [(4, 6), (60, 80)])
def test_both_exact_forms_give_the_same_value_and_gradient(channels):
    """20 nodes: more than 4 channels, fewer than 60, so each form is once the one in use."""
    student, teacher = maps((2, channels[0], 9, 7), (2, channels[1], 9, 7))
    found = [torch.autograd.grad(loss, student) + (loss.detach(),) for loss in (
        pairwise_loss(student, teacher),
        *(d(*(unit_nodes(pool_nodes(x, "cirkd"), "cirkd") for x in (student, teacher))) / (2 * 20 ** 2)
          for d in (gram_distance, map_distance)))]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-14)


def test_cancellation_in_float32_is_harmless():
    """Similar maps make the difference of the Gram form a thousandth of its parts."""
    teacher = fill.tensor("teacher", (2, 32, 64, 64), 1, dtype=torch.float64).relu() + 1
    student = teacher + fill.tensor("noise", teacher.shape, 2, 0.2, torch.float64)
    nodes = [unit_nodes(pool_nodes(x, "cirkd"), "cirkd") for x in (student, teacher)]
    exact = map_distance(*nodes) / (2 * 1024 ** 2)
    parts = torch.bmm(nodes[0], nodes[0].transpose(1, 2)).square().sum() / (2 * 1024 ** 2)
    assert exact < 1e-3 * parts
    found = pairwise_loss(student.float(), teacher.float())
    assert found.dtype == torch.float32 and found.item() == pytest.approx(exact.item(), rel=1e-3)


def test_original_form_stops_the_gradient_through_the_norm():
    """The gradient is that of the loss with the norms as constants."""
    student, teacher = maps()
    (gradient,) = torch.autograd.grad(pairwise_loss(student, teacher, "original"), student)
    nodes = pool_nodes(student, "original").flatten(2)
    lengths = nodes.detach().norm(dim=1, keepdim=True) + 1e-8
    target = unit_nodes(pool_nodes(teacher, "original"), "original")
    loss = map_distance(nodes / lengths, target) / (2 * nodes.shape[2] ** 2)
    torch.testing.assert_close(torch.autograd.grad(loss, student, retain_graph=True)[0], gradient)
    free = map_distance(nodes / nodes.norm(dim=1, keepdim=True), target) / (2 * nodes.shape[2] ** 2)
    assert not torch.allclose(torch.autograd.grad(free, student)[0], gradient, rtol=1e-3)


@pytest.mark.parametrize(("form", "size", "count"), [
    ("cirkd", (8, 12), 24), ("cirkd", (9, 7), 20), ("cirkd", (1, 1), 1),
    ("original", (64, 128), 4), ("original", (9, 7), 9), ("original", (1, 3), 3)])
def test_nodes(form, size, count):
    assert pool_nodes(torch.rand(1, 2, *size), form).flatten(2).shape[2] == count


@pytest.mark.parametrize("form", ["cirkd", "original"])
def test_zero_vectors_have_a_finite_small_gradient(form):
    student, teacher = maps()
    student = (student.detach() * (torch.arange(9)[:, None] > 3)).requires_grad_()
    loss = pairwise_loss(student, teacher, form)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isfinite() and gradient.isfinite().all()
    assert form == "original" or gradient.abs().max() < 1


def test_autocast_and_half_precision_are_computed_in_float32():
    student, teacher = (x.detach().bfloat16() for x in maps((2, 6, 32, 32), (2, 8, 32, 32)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pairwise_loss(student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, pairwise_loss(student.float(), teacher.float()), rtol=0, atol=0)


def test_equal_maps_give_zero_and_the_teacher_no_gradient():
    student, teacher = maps()
    assert pairwise_loss(student, student.detach()).item() == pytest.approx(0, abs=1e-15)
    teacher.requires_grad_()
    pairwise_loss(student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def output(head) -> SegOutput:
    return SegOutput(logits=None, aux=None, c1=None, c2=None, c3=None, c4=None, head=head)


def test_method():
    assert methods()["skd"] is SKD
    student, teacher = maps()
    nets = NetInfo("small", {"logits": 5, "head": 16}, 5), NetInfo("large", {"logits": 5, "head": 24}, 5)
    for options, form in (({}, "cirkd"), ({"skd_form": "original"}, "original")):
        method = make("skd", *nets, **options)
        terms = method(batch(output(student), output(teacher)))
        assert {k: v.item() for k, v in terms.items()} == {"skd": pairwise_loss(student, teacher, form).item()}
        assert not method.state_dict()


def test_preset_is_the_published_row():
    weights = {"lambda_kd": 1.0, "lambda_skd": 10.0, "lambda_adv": 0.001}
    for dataset, adversarial in (("citys", 0.001), ("voc", 0.001), ("camvid", 0.0)):
        found = {k: v for k, v in preset("skd", dataset, "resnet18").items() if k in weights or v}
        assert found == {**weights, "lambda_adv": adversarial}


def test_errors_name_what_is_wrong():
    student, teacher = maps()
    with pytest.raises(UserError, match=r"skd.*\(2, 16, 9, 7\).*\(2, 24, 9, 6\)"):
        pairwise_loss(student, teacher[..., :6])
    with pytest.raises(UserError, match="skd form 'neither': expected one of cirkd, original"):
        options_of_method("skd", skd_form="neither")
