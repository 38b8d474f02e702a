"""CIRKDv2's terms: slow twins from the formulas, the context block, queue size and crop, the Distiller."""
from __future__ import annotations

import pytest
import torch
from helpers import set_blocks
from method_cases import batch, make
from reference import fill
from torch.nn import functional as F

from losses.cirkdv2 import CHANNEL_TERMS, ChannelRelations, CIRKDv2, CIRKDv2Options, ContextBlock
from losses.core import NetInfo
from losses.core.queues import FeatureQueue
from losses.core.relations import minibatch_pixel_loss
from models.output import SegOutput
from utils.cli import parse_options
from utils.errors import UserError

TERMS = tuple(t.name for t in CIRKDv2.terms)
SMALL = {"cirkd_pixel_queue": 40, "cirkd_region_queue": 6, "cirkd_pixel_contrast": 20, "cirkd_region_contrast": 8,
         "cirkdv2_channel_contrast": 12}


def maps(batch=3, height=9, width=6, dtype=torch.float64):
    g = torch.Generator().manual_seed(batch)
    student = torch.randn(batch, 6, height, width, generator=g, dtype=dtype).relu().requires_grad_()
    teacher = torch.randn(batch, 10, height, width, generator=g, dtype=dtype).relu()
    return student, teacher, torch.randint(-1, 4, (batch, height * 8 - 3, width * 8 - 5), generator=g)


def output(head: torch.Tensor) -> SegOutput:
    return SegOutput(*[None] * 6, head=head)


def build(*terms: str, crop=(69, 43), **changes) -> CIRKDv2:
    """The method with a channel queue of 60 slots, fewer than the program accepts."""
    distiller = make("cirkdv2", NetInfo("s", {"head": 6}, 4), NetInfo("t", {"head": 10}, 4), active=terms, crop=crop,
                     **{**SMALL, **changes})
    if "cirkdv2_channel_memory" in terms:
        channels = distiller.channels
        channels.channel = FeatureQueue(60, channels.channel.queue.shape[1])
    return distiller.double()


def pooled(x: torch.Tensor) -> torch.Tensor:
    """Averages over 4x4 windows, smaller at the edge: [B, C, h', w']."""
    rows = [torch.stack([part.mean((2, 3)) for part in band.split(4, 3)], -1) for band in x.split(4, 2)]
    return torch.stack(rows, 2)


def slow_channels(module, student, teacher, groups, draws):
    """The three channel terms with loops over pairs of images and pushes of single vectors."""
    s = F.normalize(module.project_head(pooled(student)).flatten(2), dim=2)
    t = F.normalize(pooled(teacher).flatten(2), dim=2)
    batch = 0.0
    for group in groups:
        for i in group:
            for j in group:
                p, q = ((x[i] @ x[j].T / module.tau).softmax(1) for x in (t, s))
                batch = batch + (p * (p / q).log()).sum(1).mean() / (len(group) * len(student))
    queue, at = module.channel.queue.clone(), int(module.channel.pointer)
    rows = t.flatten(0, 1)[draws[0]][:256]
    if at + len(rows) >= len(queue):
        queue[-len(rows):] = rows
    else:
        queue[at:at + len(rows)] = rows
    keys = queue[draws[1][:module.contrast]]
    p, q = ((x.flatten(0, 1) @ keys.T / module.tau / module.kd_tau).softmax(1) for x in (t, s))
    memory = (p * (p / q).log()).sum(1).mean() * module.kd_tau ** 2
    return {"batch": batch, "memory": memory, "mse": (s - t).square().mean()}


@pytest.mark.parametrize("group_size, groups, block", [(2, [[0, 1], [2]], 2 ** 23), (0, [[0, 1, 2]], 120)])
@pytest.mark.parametrize("fast", [True, False])
def test_channels_equal_the_loops(group_size, groups, block, fast, monkeypatch):
    set_blocks(monkeypatch, block)
    student, teacher, _ = maps()
    module = ChannelRelations(6, 10, (9, 6), 70, 12, frozenset(CHANNEL_TERMS.values()), group_size, 0.1, 2.0,
                              torch.float64, fast=fast).double()
    for _ in range(3):
        draws = torch.randperm(30), torch.randperm(70)
        want = slow_channels(module, student, teacher, groups, draws)
        got = module(student, teacher, draws=draws)
        assert set(got) == set(want)
        for name in want:
            torch.testing.assert_close(got[name], want[name])
            torch.testing.assert_close(*(torch.autograd.grad(x[name], student, retain_graph=True)[0]
                                         for x in (got, want)))
    assert module.channel.pointer.item() == 0 and module.channel.filled.item() == 70  # 30, 60, the end


@pytest.mark.parametrize("fast", [True, False])
def test_only_filled_slots_are_compared_with(fast):
    """The first step writes 30 of 60 channels: those alone count, however many a step compares with."""
    student, teacher, target = maps()
    found = []
    for only, queue, contrast in ((True, 60, 60), (True, 60, 45), (False, 30, 30)):
        distiller = build("cirkdv2_channel_memory", cirkd_only_filled=only, fast=fast,
                          cirkdv2_channel_contrast=contrast)
        distiller.channels.channel = FeatureQueue(queue, distiller.channels.channel.queue.shape[1]).double()
        distiller.channels.project_head = fill.fill_module(distiller.channels.project_head, 1)
        found.append(distiller(batch(output(student), output(teacher), target))["cirkdv2_channel_memory"])
    for loss in found[:2]:
        torch.testing.assert_close(loss, found[2])


def test_context_block_equals_dense_attention():
    block, (x, _, _) = ContextBlock(6).double(), maps()
    q, k, v = (node(x).flatten(2) for node in (block.node_q, block.node_k, block.node_v))
    attention = (q.transpose(1, 2) @ k / 3 ** 0.5).softmax(-1)
    context = (attention @ v.transpose(1, 2)).transpose(1, 2).view(len(x), 3, *x.shape[-2:])
    want = block.out_conv(torch.cat([x, block.conv1(context)], 1))
    torch.testing.assert_close(block(x), want)


def test_with_fitnet_every_term_sees_the_context_block():
    student, teacher, target = maps()
    distiller = build("cirkdv2_fitnet", "cirkdv2_batch")
    losses = distiller(batch(output(student), output(teacher), target))
    torch.testing.assert_close(losses["cirkdv2_batch"], minibatch_pixel_loss(distiller.gcn(student), teacher))
    plain = build("cirkdv2_batch")(batch(output(student), output(teacher), target))
    assert plain["cirkdv2_batch"].item() == minibatch_pixel_loss(student, teacher).item()
    assert plain["cirkdv2_batch"].item() != losses["cirkdv2_batch"].item()


@pytest.mark.parametrize("terms", [[t] for t in TERMS] + [list(TERMS)])
def test_only_active_terms_are_built_and_every_parameter_is_used(terms):
    student, teacher, target = maps()
    distiller = build(*terms)
    losses = distiller(batch(output(student), output(teacher), target))
    assert set(losses) == set(terms)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in distiller.parameters()) and student.grad.isfinite().all()
    queues = {"cirkdv2_pixel": "memory.pixel", "cirkdv2_region": "memory.region",
              "cirkdv2_channel_memory": "channels.channel"}
    held = {name.rpartition(".")[0] for name in distiller.unsynchronized()}
    assert held == {queues[t] for t in terms if t in queues}


def test_state_dict_round_trip_continues_the_run():
    student, teacher, target = maps()
    first, second = build(*TERMS), build(*TERMS, seed=3)
    for step in range(3):
        first(batch(output(student), output(teacher), target, step))
    second.load_state_dict(first.state_dict())
    second.seed = 0
    a, b = (d(batch(output(student), output(teacher), target, 3), torch.Generator().manual_seed(i))
            for i, d in enumerate((first, second)))
    assert {k: v.item() for k, v in a.items()} == {k: v.item() for k, v in b.items()}
    assert first.channels.channel.pointer.item() == 60 - 60 + 30 * (4 % 2)
    assert all(v.equal(second.state_dict()[k]) for k, v in first.state_dict().items())


@pytest.mark.parametrize(("large", "asked", "pool"), [(6, 1, 4), (6, 2, 4), (6, 5, 5), (7, 2, 2)])
def test_large_maps_are_pooled_before_the_pixel_relations(large, asked, pool, monkeypatch):
    """By 4, or by what was asked for where that is more."""
    monkeypatch.setattr("losses.cirkdv2.LARGE", large)
    student, teacher, target = maps()
    distiller = build("cirkdv2_batch", cirkd_pool=asked)
    got = distiller(batch(output(student), output(teacher), target))["cirkdv2_batch"]
    assert got.item() == minibatch_pixel_loss(student, teacher, pool=pool).item()


def test_another_map_size_than_the_crop_is_refused_only_with_a_queue():
    student, teacher, target = maps()
    with pytest.raises(UserError, match="8x6 head maps.*9x6") as refused:
        build("cirkdv2_channel_memory", crop=(64, 43))(batch(output(student), output(teacher), target))
    assert refused.value.settings == ("crop_size",)
    build("cirkdv2_channel", crop=(64, 43))(batch(output(student), output(teacher), target))


def test_bad_settings_are_refused():
    with pytest.raises(UserError, match="60 slots|60 vectors"):
        many = torch.randn(7, 10, 9, 6, dtype=torch.float64)
        build("cirkdv2_channel_memory")(batch(output(many[:, :6]), output(many), torch.zeros(7, 69, 43).long()))
    with pytest.raises(UserError, match="1 channel"):
        ContextBlock(1)
    with pytest.raises(UserError, match=r"cirkdv2.*\(1, 6, 10, 7\).*\(1, 10, 9, 7\)"):
        build("cirkdv2_pixel")(batch(output(torch.zeros(1, 6, 10, 7)), output(torch.zeros(1, 10, 9, 7))))
    with pytest.raises(SystemExit):
        parse_options(CIRKDv2Options, ["--cirkdv2-channel-queue", "255"], prog="test", description="")
    assert parse_options(CIRKDv2Options, [], prog="test", description="").cirkdv2_channel_queue == 10000


def test_autocast_and_a_batch_without_labels():
    torch.manual_seed(0)
    student, teacher, target = maps(dtype=torch.float32)
    distiller, same = build(*TERMS).float(), build(*TERMS).float()
    same.load_state_dict(distiller.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = distiller(batch(output(student), output(teacher), torch.full_like(target, -1)))
    sum(losses.values()).backward()
    exact = same(batch(output(student), output(teacher), torch.full_like(target, -1)))
    for name, value in losses.items():
        # the context block and the projections are in half precision
        assert value.dtype == torch.float32 and value.item() == pytest.approx(exact[name].item(), rel=1e-2)
    assert student.grad.isfinite().all() and student.grad.abs().max() > 0
    assert losses["cirkdv2_pixel"].item() == losses["cirkdv2_region"].item() == 0
    assert losses["cirkdv2_channel"].item() > 0


def test_presets_name_existing_options():
    known = {"lambda_kd", *(t.setting for t in CIRKDv2.terms)}
    assert all(set(values) == known for values in CIRKDv2.preset.values())
    assert set(CHANNEL_TERMS) < set(TERMS)
