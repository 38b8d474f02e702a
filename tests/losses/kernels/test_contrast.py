"""The fused contrast against its plain twin: losses, gradients, memory, devices, and who computes it."""
from __future__ import annotations

import logging
import math

import pytest
import torch
from method_cases import make
from reference import fill
from torch import Tensor

from losses.afdcd import contrast_rows, excluded_pairs, omni_contrastive_loss, positive_rank
from losses.core import NetInfo
from losses.kernels import contrast as kernel
from losses.kernels import contrast_cpu
from losses.kernels.contrast import contrast, l1_distances
from utils.errors import UserError

needs_compiler = pytest.mark.skipif(not contrast_cpu.is_available(), reason="there is no C++ compiler")
ON_CPU = [pytest.param("vectorized"), pytest.param("compiled", marks=needs_compiler)]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
ON_GPU = [pytest.param(name, "cuda", marks=needs_cuda) for name in ("vectorized", "triton")]
ANYWHERE = [pytest.param(name.values[0], "cpu", marks=name.marks) for name in ON_CPU] + ON_GPU
#: patches, rows, depth, groups: a usual one, one patch of odd sizes, and one with more rows and depth than any tile
SHAPES = [(5, 16, 8, 4), (1, 15, 7, 3), (3, 70, 67, 2)]
TAU = 0.7


def rows(patches: int, size: int, depth: int, dtype: torch.dtype = torch.float64, device: str = "cpu"):
    """Student and teacher rows with ties: every third number of the student is the teacher's own, and one row is."""
    student, teacher = (fill.tensor(name, (patches, size, depth), 1, dtype=dtype) for name in ("student", "teacher"))
    student.view(-1)[::3] = teacher.view(-1)[::3]
    student[:, 1] = teacher[:, 1]
    student[:, 2] = teacher[:, 0]
    return student.to(device).requires_grad_(), teacher.to(device)


def both(loss: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """A loss and its gradient, under an incoming one that is not 1."""
    return loss.detach(), torch.autograd.grad(3 * loss, student)[0]


@pytest.mark.parametrize(("form", "device"), ANYWHERE)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize(("patches", "size", "depth", "groups"), SHAPES)
def test_equals_the_plain_twin(form, device, patches, size, depth, groups, dtype, tolerance):
    # float32: similarities of a thousand, as depth / TAU makes them, are exact to 6e-5, and so are their softmaxes
    student, teacher = rows(patches, size, depth, dtype, device)
    excluded = excluded_pairs(groups, (1, size // groups), torch.device(device))
    want = both(contrast_rows(student, teacher, excluded, TAU), student)
    got = both(contrast(student, teacher, excluded, TAU, form), student)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert got[0] > 0 and got[1].abs().max() > 0.1
    distances = l1_distances(student, teacher, form)
    torch.testing.assert_close(distances, torch.cdist(student.detach(), teacher, p=1.0), rtol=tolerance, atol=tolerance)
    assert not distances.requires_grad and (distances[:, 1, 1] == 0).all()


@pytest.mark.parametrize("form", ON_CPU)
def test_by_hand_with_a_tie(form):
    """Two vectors of two numbers; the first number of the first student vector lies on the teacher's."""
    student = torch.tensor([[[1.0, 2.0], [5.0, 7.0]]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[[1.0, 0.0], [1.0, 4.0]]], dtype=torch.float64)
    loss, gradient = both(contrast(student, teacher, torch.zeros(2, 2, dtype=torch.bool), 1.0, form), student)
    # distances (2, 2) and (11, 7): the first vector is pushed from the second teacher's to the first one, with half the
    # incoming gradient each; the second lies on the same side of both, where the two cancel
    assert loss.item() == pytest.approx(math.log(2) + math.log1p(math.exp(-4)))
    torch.testing.assert_close(gradient, 3 * torch.tensor([[[0.0, 1.0], [0.0, 0.0]]], dtype=torch.float64))


@pytest.mark.parametrize("form", ON_CPU)
def test_gradient_by_differences(form):
    student = fill.tensor("s", (2, 6, 5), 3, dtype=torch.float64).requires_grad_()
    teacher = fill.tensor("t", (2, 6, 5), 3, dtype=torch.float64)
    excluded = excluded_pairs(3, (1, 2))
    assert torch.autograd.gradcheck(lambda s: contrast(s, teacher, excluded, TAU, form), student, eps=1e-7)


@pytest.mark.parametrize("form", ON_CPU)
def test_chunks_and_threads_change_no_bit(form):
    student, teacher = rows(5, 40, 9, torch.float32)
    excluded, threads = excluded_pairs(4, (2, 5)), torch.get_num_threads()
    results = []
    for chunk, count in ((0, 1), (1, 1), (2, 3)):
        torch.set_num_threads(count)
        try:
            results.append(both(contrast(student, teacher, excluded, TAU, form, chunk), student))
        finally:
            torch.set_num_threads(threads)
    for loss, gradient in results[1:]:
        assert loss.equal(results[0][0]) and gradient.equal(results[0][1])


def test_blocks_bound_the_memory():
    assert kernel.patches_at_once(torch.empty(100, 256, 1)) == 16
    assert kernel.patches_at_once(torch.empty(100, 256, 1), chunk=3) == 3
    assert kernel.patches_at_once(torch.empty(100, 256, 1, device="meta")) == 128
    assert kernel.patches_at_once(torch.empty(1, 2000, 1), chunk=3) == 1


def test_rows_of_the_vectorized_form_on_other_devices(monkeypatch):
    """It takes the differences a few rows at a time there; the CPU goes another way."""
    monkeypatch.setattr(kernel, "SCRATCH", 3 * 10 * 4)
    student, teacher = rows(2, 10, 4)
    weights, out = fill.tensor("w", (2, 10, 10), 1, dtype=torch.float64), torch.empty(2, 10, 4, dtype=torch.float64)
    kernel.signs_by_rows(weights, student.detach(), teacher, out)
    signs = (student.detach()[:, :, None] - teacher[:, None]).sign()
    torch.testing.assert_close(out, (weights[..., None] * signs).sum(2))


def test_what_is_kept_for_the_backward_pass():
    """One array of the size of the rows; none where no gradient is wanted."""
    student, teacher = rows(3, 8, 4)
    excluded, kept = excluded_pairs(4, (1, 2)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        with_gradient = contrast(student, teacher, excluded, TAU)
        with torch.no_grad():
            without = contrast(student, teacher, excluded, TAU)
        constant = contrast(student.detach(), teacher.clone().requires_grad_(), excluded, TAU)
    assert kept == [(3, 8, 4)]
    assert with_gradient.requires_grad and not without.requires_grad and not constant.requires_grad
    assert with_gradient.item() == without.item() == constant.item()
    for wanted, size in ((False, 0), (True, student.numel())):
        arguments = (student.detach(), teacher, excluded, TAU, "vectorized", 0, wanted)
        assert torch.ops.afdcd.contrast(*arguments)[1].numel() == size


@pytest.mark.parametrize("form", ON_CPU)
def test_half_precision_is_left_alone(form):
    student, teacher = rows(2, 8, 6, torch.float32)
    excluded = excluded_pairs(2, (2, 2))
    want = both(contrast(student, teacher, excluded, TAU, form), student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = both(contrast(student, teacher, excluded, TAU, form), student)
    assert got[0].equal(want[0]) and got[1].equal(want[1])
    half, half_teacher = student.detach().bfloat16().requires_grad_(), teacher.bfloat16()
    loss, gradient = both(contrast(half, half_teacher, excluded, TAU, form), half)
    exact = half.detach().float().requires_grad_()
    want = both(contrast(exact, half_teacher.float(), excluded, TAU, form), exact)
    assert loss.equal(want[0]) and gradient.equal(want[1].bfloat16())


def test_the_compiler_sees_one_node():
    student, teacher = rows(2, 8, 6, torch.float32)
    excluded = excluded_pairs(2, (2, 2))
    compiled = torch.compile(contrast, backend="aot_eager", fullgraph=True)
    want, got = (both(f(student, teacher, excluded, TAU), student) for f in (contrast, compiled))
    assert got[0].equal(want[0]) and got[1].equal(want[1])


def test_on_a_simulated_gpu():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        student, teacher = (torch.empty(3, 8, 4, device="cuda") for _ in range(2))
        excluded = torch.empty(8, 8, dtype=torch.bool, device="cuda")
        loss, distances = contrast(student, teacher, excluded, TAU), l1_distances(student, teacher)
        losses, gradient = torch.ops.afdcd.contrast(student, teacher, excluded, TAU, "auto", 0, True)
    shapes = [tuple(x.shape) for x in (loss, distances, losses, gradient)]
    assert shapes == [(), (3, 8, 8), (3, 8), (3, 8, 4)]
    assert {x.device.type for x in (loss, distances, losses, gradient)} == {"cuda"}


@pytest.mark.parametrize("form", ON_CPU)
def test_the_loss_of_maps_and_the_rank_in_every_form(form):
    student = fill.tensor("student", (2, 12, 9, 10), 1, dtype=torch.float64).relu().requires_grad_()
    teacher = fill.tensor("teacher", (2, 12, 9, 10), 1, dtype=torch.float64).relu()
    arguments = (student, teacher, TAU, 6, (2, 3))
    want = both(omni_contrastive_loss(*arguments, implementation="plain"), student)
    rank = positive_rank(student, teacher, 6, (2, 3), implementation="plain")
    assert 0.1 < rank < 0.9
    for chunk in (0, 5):
        got = both(omni_contrastive_loss(*arguments, chunk, implementation=form), student)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        assert positive_rank(student, teacher, 6, (2, 3), chunk, form).item() == rank.item()


def test_the_plain_twin_is_chosen_by_the_switch():
    network = NetInfo("small", {"logits": 5, "c4": 16}, 5)
    chosen = [make("afdcd", network, network, crop=(128, 128), fast=fast).criterion.implementation
              for fast in (True, False)]
    assert chosen == ["auto", "plain"]


def test_what_cannot_run_is_refused():
    student, teacher = rows(2, 8, 6)
    excluded = excluded_pairs(2, (2, 2))
    with pytest.raises(UserError, match="unknown form 'fastest'; expected one of auto, vectorized, compiled, triton"):
        contrast(student, teacher, excluded, TAU, "fastest")
    with pytest.raises(UserError, match="the triton form needs CUDA tensors and the package triton, got cpu tensors"):
        contrast(student, teacher, excluded, TAU, "triton")
    with pytest.raises(UserError, match="the compiled form needs CPU tensors and a C.. compiler, got cuda tensors"):
        kernel.choose_form("compiled", "cuda")
    with pytest.raises(UserError, match=r"rows \(2, 8, 6\) and teacher rows \(2, 8, 5\): expected the same shape"):
        contrast(student, teacher[..., :5], excluded, TAU)


@pytest.mark.parametrize(("device", "compiler", "problem", "form", "line"), [
    ("cpu", True, "", "compiled", "contrast on cpu: compiled form"),
    ("cpu", False, "", "vectorized", "contrast on cpu: vectorized form"),
    ("cuda", True, "", "triton", "contrast on cuda: triton form"),
    ("cuda", True, "triton does not work here (no compiler)", "vectorized",
     "contrast on cuda: vectorized form: slower; triton does not work here (no compiler)"),
    ("mps", True, "", "vectorized", "contrast on mps: vectorized form")])
def test_the_fastest_form_is_chosen_and_logged(device, compiler, problem, form, line, monkeypatch, caplog):
    monkeypatch.setattr(contrast_cpu, "is_available", lambda: compiler)
    monkeypatch.setattr(kernel, "triton_problem", lambda: problem)
    with caplog.at_level(logging.INFO, "afdcd"):
        assert kernel.best_form.__wrapped__(device) == form
    assert caplog.messages == [line]


@pytest.mark.parametrize(("installed", "fault", "problem"), [
    (False, None, "the package triton is not installed"), (True, None, ""),
    (True, RuntimeError("Failed to find C compiler\nhint"), "triton does not work here (Failed to find C compiler)")])
def test_triton_is_tried_before_it_is_chosen(installed, fault, problem, monkeypatch):
    def launch(*rows) -> Tensor:
        if fault:
            raise fault
        return rows[0]

    monkeypatch.setattr(kernel, "has_triton", lambda: installed)
    monkeypatch.setattr(kernel, "triton", lambda device: kernel.Form(launch, launch))
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(*size))
    assert kernel.triton_problem() == problem
