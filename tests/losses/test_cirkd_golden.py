"""CIRKD and CIRKDv2 against recorded values: losses, gradients, queues after a step."""
from __future__ import annotations

import pytest
import torch
from helpers import set_blocks
from reference import golden
from torch import nn

from losses.cirkd import Draws, MemoryRelations, MemorySettings, minibatch_pixel_loss
from losses.cirkdv2 import CHANNEL_TERMS, ChannelRelations, ContextBlock
from losses.core.feature_losses import CriterionFitNet

DTYPES = (torch.float32, torch.float64)


@pytest.fixture(params=[(fast, size) for fast in (True, False) for size in (2 ** 23, 3000)])
def fast(request, monkeypatch) -> bool:
    """The faster form or its twin, with all similarities at a time or a part of them."""
    set_blocks(monkeypatch, request.param[1])
    return request.param[0]


def widths(inputs: dict) -> tuple[int, int]:
    return inputs["student"].shape[1], inputs["teacher"].shape[1]


def close(got: float, want: float, dtype: torch.dtype) -> None:
    assert got == pytest.approx(want, rel=1e-9 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", golden.case_ids("cirkd/minibatch"))
def test_minibatch(name, dtype, fast):
    case = golden.load_case(name)
    inputs = golden.make_inputs(case, dtype)
    loss = minibatch_pixel_loss(inputs["student"], inputs["teacher"], group_size=0, tau=case["config"]["temperature"],
                                pool=2 if case["config"]["avg_pool_2x2"] else 1, fast=fast)
    golden.check_losses(case, {"minibatch_pixel": loss}, inputs)


MEMORY_NAMES = {"pixel.queue": "teacher_pixel_queue", "region.queue": "teacher_segment_queue",
                "pixel.pointer": "pixel_queue_ptr", "region.pointer": "segment_queue_ptr"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", golden.case_ids("cirkd/memory"))
def test_memory(name, dtype, fast):
    case = golden.load_case(name)
    c, inputs, labels = case["config"], golden.make_inputs(case, dtype), golden.make_labels(case)
    settings = MemorySettings(c["pixel_memory_size"], c["region_memory_size"], c["pixel_contrast_per_class"],
                              c["region_contrast_per_class"], c["pixel_update_freq"], c["contrast_temperature"],
                              c["contrast_kd_temperature"], group_size=2, dtype=dtype, as_released=c["bug_compatible"],
                              fast=fast)
    memory = MemoryRelations(*widths(inputs), c["num_classes"], settings).to(dtype)
    golden.fill_params(memory, case, MEMORY_NAMES)
    batch, _, height, width = inputs["student"].shape
    draws = Draws(torch.arange(height * width).expand(batch, -1), torch.arange(c["pixel_memory_size"]),
                  torch.arange(c["region_memory_size"]))
    losses = memory(inputs["student"], inputs["teacher"], labels, draws=draws)
    golden.check_losses(case, {f"memory_{k}": v for k, v in losses.items()}, inputs, memory, MEMORY_NAMES)

    after = case["tensors"]
    assert memory.pixel.pointer.tolist() == after["pixel_ptr_after"]
    assert memory.region.pointer.tolist() == after["region_ptr_after"]
    close(memory.pixel.queue.sum().item(), after["pixel_queue_sum_after"], dtype)
    close(memory.region.queue.sum().item(), after["region_queue_sum_after"], dtype)
    flat = memory.pixel.queue.flatten()
    assert flat[::len(flat) // 8].tolist() == pytest.approx(after["pixel_queue_samples_after"], abs=1e-6)


CHANNEL_NAMES = {"channel.queue": "teacher_channel_queue"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", golden.case_ids("cirkdv2/channel"))
def test_channels(name, dtype, fast):
    case = golden.load_case(name)
    c, inputs = case["config"], golden.make_inputs(case, dtype)
    batch, width = len(inputs["teacher"]), inputs["teacher"].shape[1]
    module = ChannelRelations(*widths(inputs), inputs["student"].shape[-2:], c["channel_memory_size"],
                              c["channel_contrast_size"], frozenset(CHANNEL_TERMS.values()), 2,
                              c["contrast_temperature"], c["contrast_kd_temperature"], dtype, fast=fast).to(dtype)
    golden.fill_params(module, case, CHANNEL_NAMES)
    draws = torch.arange(batch * width), torch.arange(c["channel_memory_size"])
    losses = module(inputs["student"], inputs["teacher"], draws=draws)
    named = {"minibatch_channel": losses["batch"], "memory_channel": losses["memory"], "channel_mse": losses["mse"]}
    golden.check_losses(case, named, inputs, module, CHANNEL_NAMES)
    assert module.channel.pointer.tolist() == case["tensors"]["ptr_after"]
    close(module.channel.queue.sum().item(), case["tensors"]["queue_sum_after"], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", golden.case_ids("cirkdv2/gcn"))
def test_context_block_and_fitnet(name, dtype):
    case = golden.load_case(name)
    inputs = golden.make_inputs(case, dtype)
    module = nn.ModuleDict({"gcn": ContextBlock(inputs["student"].shape[1]), "fit": CriterionFitNet(*widths(inputs))})
    golden.fill_params(module.to(dtype), case)
    loss = module["fit"](module["gcn"](inputs["student"]), inputs["teacher"])
    golden.check_losses(case, {"fitnet": loss}, inputs, module)


def test_every_recorded_case_is_tested():
    kinds = ("cirkd/minibatch", "cirkd/memory", "cirkdv2/channel", "cirkdv2/gcn")
    tested = {name for kind in kinds for name in golden.case_ids(kind)}
    assert tested == {*golden.case_ids("cirkd/"), *golden.case_ids("cirkdv2/")} and len(tested) == 11
