"""The divergence of relations in blocks: a dense twin, gradients, edges, what is kept for the backward pass."""
from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from losses.core.relations import blocks, relation_divergence

#: (groups, rows, sets, keys per set)
SHAPES = [(1, 13, 2, 7), (3, 5, 1, 9), (2, 8, 3, 4), (1, 1, 1, 1)]
TAU = 0.1


def problem(groups, rows, sets, keys, dtype=torch.float64, own_keys=True):
    """Rows, keys and weights; every third weight is 0. own_keys: the student's keys are another leaf, of width 4;
    otherwise both networks share constant keys, as those of a queue."""
    g = torch.Generator().manual_seed(groups * 100 + rows)

    def unit(*shape):
        return F.normalize(torch.randn(shape, generator=g, dtype=torch.float64), dim=-1).to(dtype)

    width = 4 if own_keys else 6
    student, teacher = unit(groups, rows, width).requires_grad_(), unit(groups, rows, 6)
    teacher_keys = unit(groups, sets, keys, 6)
    student_keys = unit(groups, sets, keys, width).requires_grad_() if own_keys else teacher_keys
    weight = torch.rand(groups, rows, generator=g, dtype=torch.float64).to(dtype)
    weight.view(-1)[2::3] = 0
    return student, teacher, student_keys, teacher_keys, weight


def dense(student, teacher, student_keys, teacher_keys, weight, tau=TAU, usable=None):
    """The definition, all at once."""
    q, p = (torch.einsum("grc,gjmc->grjm", *x) / tau for x in ((student, student_keys), (teacher, teacher_keys)))
    if usable is not None:
        q, p = q[..., usable], p[..., usable]
    q, p = q.log_softmax(-1), p.log_softmax(-1)
    return ((p.exp() * (p - q)).sum((-2, -1)) * weight).sum()


def leaves(inputs):
    return [x for x in inputs if x.requires_grad]


def check_rounding(loss, want, inputs):
    """A float32 loss and its gradients equal those of the dense form in float64 up to a few roundings."""
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    for gradient, other in zip(*(torch.autograd.grad(x, leaves(inputs)) for x in (loss, want)), strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-6 * other.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("own_keys", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block", [1, 60, 100, 2 ** 23])
def test_value_and_gradients_equal_the_dense_form(shape, own_keys, masked, block, monkeypatch):
    monkeypatch.setattr("losses.core.relations.BLOCK", block)
    inputs = problem(*shape, own_keys=own_keys)
    usable = torch.arange(shape[3]) % 3 != 1 if masked else None
    got, want = (form(*inputs, TAU, usable) for form in (relation_divergence, dense))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    gradients, expected = (torch.autograd.grad(-3 * x, leaves(inputs)) for x in (got, want))
    assert len(gradients) == 1 + own_keys
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("groups, rows, columns", [(1, 13, 14), (5, 4, 3), (5, 4, 12), (2, 3, 500), (1, 0, 7),
                                                   (0, 3, 7)])
@pytest.mark.parametrize("block", [1, 50, 101, 2 ** 23])
def test_blocks_cover_every_row_once_and_keep_to_the_size(groups, rows, columns, block, monkeypatch):
    monkeypatch.setattr("losses.core.relations.BLOCK", block)
    seen, sizes = torch.zeros(groups, rows), []
    for g, r in blocks(groups, rows, columns):
        seen[g, r] += 1
        sizes.append(seen[g, r].numel())
    assert seen.eq(1).all()
    assert all(n * columns <= block or n == 1 for n in sizes) and sizes[0:1] == sorted(sizes)[-1:]


@pytest.mark.parametrize("own_keys", [True, False])
def test_gradcheck(own_keys, monkeypatch):
    monkeypatch.setattr("losses.core.relations.BLOCK", 30)
    inputs = problem(2, 5, 2, 3, own_keys=own_keys)
    assert torch.autograd.gradcheck(lambda *x: relation_divergence(*x, 0.5), inputs)


def test_one_tensor_as_rows_and_keys_gets_both_gradients():
    student, teacher, *_, weight = problem(2, 8, 2, 4)
    gradients = []
    for form in (relation_divergence, dense):
        loss = form(student, teacher, student.unflatten(1, (2, 4)), teacher.unflatten(1, (2, 4)), weight, TAU)
        gradients.append(torch.autograd.grad(loss, student)[0])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_any_strides_and_gradients_of_an_own_layout():
    inputs = problem(2, 8, 3, 5)
    odd = [x.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_(x.requires_grad) for x in inputs]
    gradients = [torch.autograd.grad(relation_divergence(*x, TAU), leaves(x)) for x in (inputs, odd)]
    for gradient, other in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("block", [60, 2 ** 23])
def test_float32_is_close_and_autocast_does_not_touch_it(block, monkeypatch):
    monkeypatch.setattr("losses.core.relations.BLOCK", block)
    inputs = problem(1, 13, 2, 7, torch.float32)
    plain = relation_divergence(*inputs, TAU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = relation_divergence(*inputs, TAU)
    want = dense(*(x.double() for x in inputs))
    assert plain.dtype == torch.float32 and cast.equal(plain)
    check_rounding(cast, want, inputs)


def test_what_is_kept_has_the_size_of_the_student():
    """The similarities of this problem are 20 times as many numbers as its rows and keys."""
    inputs, kept = problem(1, 100, 2, 100), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = relation_divergence(*inputs, TAU)
    assert sorted(x.numel() for x in kept) == sorted(x.numel() for x in leaves(inputs))
    for _ in range(2):  # the backward pass leaves them as they are
        gradients = torch.autograd.grad(loss, leaves(inputs), retain_graph=True)
        assert all(g.equal(k.view_as(g)) for g, k in zip(gradients, kept, strict=True))


def test_only_the_student_gets_gradients_and_only_once():
    student, teacher, student_keys, teacher_keys, weight = problem(1, 5, 2, 4)
    others = [x.requires_grad_() for x in (teacher, teacher_keys, weight)]
    loss = relation_divergence(student, teacher, student_keys, teacher_keys, weight, TAU)
    gradient = torch.autograd.grad(loss.square(), [student, *others], create_graph=True, allow_unused=True)
    assert gradient[0].abs().max() > 0 and gradient[1:] == (None, None, None)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient[0].sum().backward()


def test_without_a_gradient_the_value_is_the_same_and_none_is_made(monkeypatch):
    inputs = problem(1, 5, 2, 4)
    want = relation_divergence(*inputs, TAU)
    monkeypatch.setattr(torch.Tensor, "baddbmm_", None)
    with torch.no_grad():
        assert relation_divergence(*inputs, TAU).equal(want)
    assert relation_divergence(*(x.detach() for x in inputs), TAU).equal(want)
    with pytest.raises(TypeError):
        relation_divergence(*inputs, TAU)


@pytest.mark.parametrize("what", ["no rows", "vectors of zeros", "no usable column", "no weight"])
def test_edges_give_zero_and_a_zero_gradient(what):
    usable = None
    if what == "no rows":
        inputs = problem(2, 0, 2, 3)
    elif what == "vectors of zeros":
        inputs = [x.detach().zero_().requires_grad_(x.requires_grad) for x in problem(2, 3, 2, 3)[:4]]
        inputs.append(torch.ones(2, 3, dtype=torch.float64))
    else:
        inputs = problem(2, 3, 2, 3)
        usable = torch.zeros(3, dtype=torch.bool) if what == "no usable column" else None
        inputs[4].mul_(0 if what == "no weight" else 1)
    loss = relation_divergence(*inputs, TAU, usable)
    assert loss.item() == 0
    for x, gradient in zip(leaves(inputs), torch.autograd.grad(loss, leaves(inputs)), strict=True):
        assert gradient.shape == x.shape and (gradient == 0).all()


def test_a_small_temperature_is_as_exact():
    inputs = problem(1, 7, 2, 9, torch.float32)
    loss = relation_divergence(*inputs, 1e-3)
    want = dense(*(x.double() for x in inputs), tau=1e-3)
    check_rounding(loss, want, inputs)
