"""CIRKD's terms: slow twins from the formulas, grouping, blocks, options, the Distiller."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import set_blocks
from method_cases import batch, make
from torch.nn import functional as F

from losses.cirkd import CIRKD, Draws, MemoryRelations, MemorySettings, minibatch_pixel_loss
from losses.core import NetInfo
from losses.core.memory import RelationOptions
from losses.core.queues import queue_names, random_unit_vectors
from models.output import SegOutput
from utils.cli import parse_options
from utils.errors import UserError

TERMS = ("cirkd_batch", "cirkd_pixel", "cirkd_region")
SMALL = {"cirkd_pixel_queue": 40, "cirkd_region_queue": 6, "cirkd_pixel_contrast": 20, "cirkd_region_contrast": 8}
STUDENT, TEACHER = NetInfo("s", {"head": 6}, 4), NetInfo("t", {"head": 9}, 4)
#: pixel queue, region queue, pixels and class means compared with, pixels per image, the temperatures, group size
MEMORY = MemorySettings(40, 6, 5, 3, 16, 0.1, 1.0, 2)


def maps(batch=4, height=5, width=7, dtype=torch.float64, seed=0):
    """Student and teacher head maps and labels at eight times their size."""
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(batch, 6, height, width, generator=g, dtype=dtype).relu().requires_grad_()
    teacher = torch.randn(batch, 9, height, width, generator=g, dtype=dtype).relu()
    small = torch.randint(-1, 4, (batch, height, width), generator=g)
    return student, teacher, small.repeat_interleave(8, 1).repeat_interleave(8, 2)


def output(head: torch.Tensor) -> SegOutput:
    return SegOutput(*[None] * 6, head=head)


def build(*terms: str, **changes) -> CIRKD:
    return make("cirkd", STUDENT, TEACHER, active=terms, **{"crop": (40, 56), **SMALL, **changes}).double()


def slow_minibatch(student, teacher, groups, tau):
    """A loop over the ordered pairs of every group; groups weigh by their images."""
    total = 0.0
    s, t = (F.normalize(x, dim=1).flatten(2) for x in (student, teacher))
    for group in groups:
        pairs = 0.0
        for i in group:
            for j in group:
                p = (t[i].T @ t[j] / tau).softmax(1)
                q = (s[i].T @ s[j] / tau).softmax(1)
                pairs = pairs + (p * (p / q).log()).sum(1).mean()
        total = total + pairs / len(group) ** 2 * len(group) / len(student)
    return total


@pytest.mark.parametrize("group_size, groups", [(0, [range(5)]), (2, [range(2), range(2, 4), [4]]), (9, [range(5)]),
                                                (1, [[i] for i in range(5)])])
@pytest.mark.parametrize("block", [2 ** 23, 1200])
@pytest.mark.parametrize("fast", [True, False])
def test_minibatch_equals_the_loop_over_pairs(group_size, groups, block, fast, monkeypatch):
    set_blocks(monkeypatch, block)
    student, teacher, _ = maps(5)
    got = minibatch_pixel_loss(student, teacher, group_size, 0.1, fast=fast)
    want = slow_minibatch(student, teacher, groups, 0.1)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (got, want)))


def test_minibatch_of_equal_maps_is_zero_and_the_teacher_gets_no_gradient():
    student, teacher, _ = maps()
    teacher.requires_grad_()
    minibatch_pixel_loss(student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().max() > 0
    assert minibatch_pixel_loss(student, student.detach() * 3).item() == pytest.approx(0, abs=1e-12)


def test_minibatch_refuses_maps_that_do_not_fit():
    student, teacher, _ = maps()
    with pytest.raises(UserError, match=r"\(4, 6, 5, 7\).*\(4, 9, 5, 6\)"):
        minibatch_pixel_loss(student, teacher[..., :6])
    with pytest.raises(UserError, match="5x7 map.*pooled by 6") as refused:
        minibatch_pixel_loss(student, teacher, pool=6)
    assert refused.value.settings == ("cirkd_pool",)


def memory_twin(memory, student, teacher, target, draws):
    """The memory terms as sequential loops over images and classes; the queues of ``memory`` are not touched."""
    s, positions = memory.settings, student.shape[2] * student.shape[3]
    queues = {n: (q.queue.clone(), q.pointer.clone()) for n, q in (("pixel", memory.pixel), ("region", memory.region))}
    labels = target[:, ::8, ::8].reshape(len(target), positions)
    features = F.normalize(teacher, dim=1).flatten(2).transpose(1, 2)
    for image, label, priority in zip(features, labels, draws.priority, strict=True):
        for k in range(memory.num_class):
            members = (label == k).nonzero().flatten()
            if not len(members):
                continue
            order = priority[members].argsort()[:s.pixel_update]
            picked = image[order if s.as_released else members[order]]
            for name, rows in (("pixel", picked), ("region", F.normalize(image[members].mean(0), dim=0)[None])):
                queue, pointer = queues[name]
                n, at = len(rows), int(pointer[k])
                if at + n >= queue.shape[1]:
                    queue[k, -n:], pointer[k] = rows, 0
                else:
                    queue[k, at:at + n], pointer[k] = rows, at + n
    size = s.group_size or len(student)
    projected = F.normalize(memory.project_head(student), dim=1).flatten(2).transpose(1, 2)
    losses = {}
    for name, order, most in (("pixel", draws.pixel_order, s.pixel_contrast),
                              ("region", draws.region_order, s.region_contrast)):
        keys = queues[name][0][:, order[:most]].flatten(0, 1)
        losses[name] = 0.0
        for start in range(0, len(student), size):
            part = slice(start, start + size)
            valid = labels[part] >= 0
            if valid.any():
                logs = [(x[part][valid] @ keys.T / s.tau / s.kd_tau).log_softmax(1) for x in (projected, features)]
                mean = F.kl_div(*logs, reduction="batchmean", log_target=True) * s.kd_tau ** 2
                losses[name] = losses[name] + mean * len(valid) / len(student)
    return losses, queues


@pytest.mark.parametrize("as_released", [False, True])
@pytest.mark.parametrize("group_size, pixel_queue, block", [(2, 40, 2 ** 23), (0, 17, 440), (3, 16, 1)])
@pytest.mark.parametrize("fast", [True, False])
def test_memory_equals_the_loops(as_released, group_size, pixel_queue, block, fast, monkeypatch):
    """Several steps, so that the queues wrap around, also more than once in a step."""
    set_blocks(monkeypatch, block)
    settings = MemorySettings(pixel_queue, 3, 10, 2, 16, 0.1, 2.0, group_size, dtype=torch.float64,
                              as_released=as_released, fast=fast)
    memory = MemoryRelations(6, 9, 4, settings).double()
    generator = torch.Generator().manual_seed(3)
    for step in range(4):
        student, teacher, target = maps(5, seed=step)
        target[2:4, :, 8 * step:] = -1
        draws = memory.draw(5, 35, target.device, generator)
        want, queues = memory_twin(memory, student, teacher, target, draws)
        got = memory(student, teacher, target, draws=draws)
        for name, queue in (("pixel", memory.pixel), ("region", memory.region)):
            torch.testing.assert_close(queue.queue, queues[name][0])
            assert queue.pointer.equal(queues[name][1])
            torch.testing.assert_close(got[name], want[name])
            torch.testing.assert_close(*(torch.autograd.grad(x[name], student, retain_graph=True)[0]
                                         for x in (got, want)))


def test_fixed_queues_hold_pixels_of_their_class_and_released_ones_do_not():
    """The teacher's feature is one-hot in the label, so a queue shows what went into it."""
    target = torch.arange(4).repeat(1, 2, 1).repeat_interleave(8, 1).repeat_interleave(16, 2)
    label = target[:, ::8, ::8]
    teacher = F.one_hot(label, 9).movedim(-1, 1).double()
    student = torch.randn(1, 6, *label.shape[1:], dtype=torch.float64)
    shares = []
    for as_released in (False, True):
        settings = replace(MEMORY, pixel_queue=16, region_queue=2, pixel_update=4, as_released=as_released)
        memory = MemoryRelations(6, 9, 4, settings).double()
        memory(student, teacher, target, generator=torch.Generator().manual_seed(0))
        assert memory.pixel.filled.tolist() == [4] * 4
        shares.append([memory.pixel.queue[k, :4, k].mean().item() for k in range(4)])
    assert shares[0] == [1.0] * 4
    assert shares[1][3] == 0.0  # its four pixels were taken from the first positions of the map


def test_batch_without_labels_gives_zero_with_a_gradient_and_leaves_the_queues():
    distiller = build(*TERMS)
    before = {k: v.clone() for k, v in distiller.state_dict().items() if k in distiller.unsynchronized()}
    student, teacher, target = maps()
    losses = distiller(batch(output(student), output(teacher), torch.full_like(target, -1)))
    (losses["cirkd_pixel"] + losses["cirkd_region"]).backward()
    assert losses["cirkd_pixel"].item() == losses["cirkd_region"].item() == 0 and student.grad.abs().max() == 0
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in distiller.parameters())
    assert all(v.equal(distiller.state_dict()[k]) for k, v in before.items())


def test_any_ignore_label_and_any_number_outside_the_classes_are_left_out():
    student, teacher, target = maps()
    results = []
    for ignored, label in ((-1, -1), (255, 255), (-1, -7)):
        memory = MemoryRelations(6, 9, 4, replace(MEMORY, dtype=torch.float64), ignored,
                                 torch.Generator().manual_seed(1)).double()
        torch.manual_seed(0), [torch.nn.init.normal_(m.weight) for m in memory.project_head if hasattr(m, "weight")]
        losses = memory(student, teacher, target.masked_fill(target < 0, label),
                        generator=torch.Generator().manual_seed(2))
        results.append((losses["pixel"].item(), losses["region"].item(), memory.pixel.queue.sum().item()))
    assert results[0] == results[1] == results[2]


def test_only_filled_slots_are_compared_with():
    """With a single written vector in one class the distribution is trivial; with all slots it is not."""
    student, teacher, target = maps(2)
    target = torch.where(torch.arange(target[0].numel()).view_as(target[0]) == 0, 1, -1).expand_as(target).clone()
    target[1] = -1
    values = []
    for only in (True, False):
        distiller = build("cirkd_region", cirkd_only_filled=only)
        values.append(distiller(batch(output(student), output(teacher), target))["cirkd_region"].item())
        assert distiller.memory.region.filled.tolist() == [0, 1, 0, 0]
    assert values[0] == pytest.approx(0, abs=1e-12) and values[1] > 1e-3


def test_only_filled_before_anything_is_written_gives_zero():
    distiller = build("cirkd_pixel", cirkd_only_filled=True)
    student, teacher, target = maps()
    loss = distiller(batch(output(student), output(teacher), torch.full_like(target, -1)))["cirkd_pixel"]
    loss.backward()
    assert loss.item() == 0 and student.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_queues_take_half_the_memory_and_change_little(dtype):
    student, teacher, target = maps(dtype=torch.float32)
    values = []
    for name in ("float32", dtype):
        torch.manual_seed(0)
        distiller = make("cirkd", STUDENT, TEACHER, cirkd_queue_dtype=name, **SMALL)
        assert distiller.memory.pixel.queue.dtype == getattr(torch, name)
        loss = distiller(batch(output(student), output(teacher), target))["cirkd_pixel"]
        assert loss.dtype == torch.float32
        values.append(loss.item())
    # as much as rounding a vector's components does
    assert values[0] != values[1] == pytest.approx(values[0], rel=torch.finfo(getattr(torch, dtype)).eps)


def test_autocast_computes_the_relations_in_float32():
    student, teacher, _ = maps(dtype=torch.float32)
    half = student.detach().bfloat16(), teacher.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = minibatch_pixel_loss(*half)
    want = minibatch_pixel_loss(half[0].float(), half[1].float())
    assert got.dtype == torch.float32
    assert got.item() == want.item()
    distiller, same = build(*TERMS).float(), build(*TERMS).float()
    same.load_state_dict(distiller.state_dict())
    _, _, target = maps()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = distiller(batch(output(half[0].requires_grad_()), output(half[1]), target))
    sum(losses.values()).backward()
    exact = same(batch(output(half[0].detach().float()), output(half[1].float()), target))
    for name, value in losses.items():
        # the projection is in half precision
        assert value.dtype == torch.float32 and value.item() == pytest.approx(exact[name].item(), rel=5e-3)
    assert half[0].grad.isfinite().all() and half[0].grad.abs().max() > 0


@pytest.mark.parametrize("terms", [[t] for t in TERMS] + [list(TERMS)])
def test_only_active_terms_are_built_and_every_parameter_is_used(terms):
    distiller = build(*terms)
    student, teacher, target = maps(3, 7, 3)
    losses = distiller(batch(output(student), output(teacher), target, 5))
    assert set(losses) == set(terms)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in distiller.parameters())
    held = {name.split(".")[1] for name in distiller.unsynchronized()}
    assert held == {t.removeprefix("cirkd_") for t in terms} - {"batch"}
    assert bool(list(distiller.parameters())) == (terms != ["cirkd_batch"])


def test_state_dict_is_complete_and_a_step_depends_on_seed_and_step_only():
    student, teacher, target = maps()
    first = build(*TERMS)
    for step in range(3):
        first(batch(output(student), output(teacher), target, step), torch.Generator().manual_seed(step))
    second = build(*TERMS, seed=9)
    second.load_state_dict(first.state_dict())
    torch.manual_seed(77)
    a, b = (d(batch(output(student), output(teacher), target, 3)) for d in (first, build(*TERMS, seed=0)))
    assert a["cirkd_pixel"] != b["cirkd_pixel"]  # the fresh one has random queues and another projection
    second.seed = 0
    c = second(batch(output(student), output(teacher), target, 3), torch.Generator().manual_seed(5))
    assert all(a[k].item() == c[k].item() for k in TERMS)
    assert all(v.equal(second.state_dict()[k]) for k, v in first.state_dict().items())


def test_queues_start_as_unit_vectors_of_the_seed():
    a, b, c = (build("cirkd_pixel", seed=s).memory.pixel.queue for s in (1, 1, 2))
    assert a.equal(b) and not a.equal(c)
    torch.testing.assert_close(a.norm(dim=-1), torch.ones(4, 40, dtype=torch.float64))
    half = random_unit_vectors((70000, 4), torch.float16, torch.Generator().manual_seed(0))
    assert half.dtype == torch.float16 and (half.float().norm(dim=1) - 1).abs().max() < 2e-3


def test_published_sizes_and_diagnostics():
    distiller = make("cirkd", NetInfo("s", {"head": 2}, 19), NetInfo("t", {"head": 3}, 19))
    s = distiller.memory.settings
    assert (s.pixel_contrast, s.region_contrast, s.pixel_update, s.tau, s.kd_tau) == (216, 54, 16, 0.1, 1.0)
    assert distiller.memory.pixel.queue.shape == (19, 20000, 3) and distiller.memory.region.queue.shape[1] == 2000
    assert {k: v.item() for k, v in distiller.diagnostics().items()} == {"pixel_queue_filled": 0.0,
                                                                        "region_queue_filled": 0.0}
    wide = MemoryRelations(128, 256, 2, replace(MEMORY, pixel_queue=16, region_queue=1))
    assert sum(p.numel() for p in wide.project_head.parameters() if p.dim() > 1) + 512 == 98816
    assert queue_names(wide) == {f"{q}.{n}" for q in ("pixel", "region") for n in ("queue", "pointer", "filled")}


def test_bad_settings_are_refused():
    with pytest.raises(UserError, match="pixel queue of 15.*16") as refused:
        build("cirkd_pixel", cirkd_pixel_queue=15)
    assert refused.value.settings == ("cirkd_pixel_queue", "cirkd_pixel_update")
    with pytest.raises(UserError, match="'cirkd' needs head of the teacher"):
        make("cirkd", STUDENT, NetInfo("t", {"c4": 9}, 4))
    with pytest.raises(UserError, match=r"'cirkd' needs maps of 6x6.*40x56 give 5x7.*48x48") as refused:
        build("cirkd_batch", cirkd_pool=6)
    assert refused.value.settings == ("crop_size", "cirkd_pool")
    build("cirkd_region", cirkd_pool=6)


def test_options_have_the_published_defaults_and_draws_can_be_given():
    flags = ["--cirkd-only-filled", "--cirkd-queue-dtype", "bfloat16"]
    options = parse_options(RelationOptions, flags, prog="test", description="")
    assert options.cirkd_only_filled and options.cirkd_queue_dtype == "bfloat16"
    assert (options.cirkd_pixel_queue, options.cirkd_region_queue, options.cirkd_pixel_contrast,
            options.cirkd_region_contrast) == (20000, 2000, 4096, 1024)
    memory, (student, teacher, target) = build("cirkd_pixel").memory, maps()
    draws = Draws(torch.zeros(4, 35, dtype=torch.long), torch.arange(40), None)
    assert set(memory(student, teacher, target, draws=draws)) == {"pixel"}
