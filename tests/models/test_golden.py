"""Outputs of every network equal the recorded ones of the reference implementation, in eval and in train mode."""
from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from reference import fill

from models import get_segmentation_model

CASES = json.loads((Path(fill.__file__).parent / "models.json").read_text())["cases"]
#: the reference builds a ResNet-50 under this name, this repository a ResNet-18
EXCLUDED = "resnet18_original"
#: which outputs a recorded list of that length holds
RECORDED = {4: ("logits", "aux", "c4", "head"), 3: ("logits", "c4", "head"), 2: ("logits", "head")}


def groups() -> dict[tuple, list[dict]]:
    """Cases by network, so that each network is filled once."""
    by_network: dict[tuple, list[dict]] = {}
    for case in CASES:
        spec = case["spec"]
        if spec["backbone"] != EXCLUDED:
            by_network.setdefault((spec["model"], spec["backbone"], spec["aux"], spec["seed"]), []).append(case)
    return by_network


GROUPS = groups()


@pytest.fixture(scope="module", autouse=True)
def remember_draws():
    """The fill rule is a pure function of name and shape, and the networks share most names: draw each once."""
    fill.selfcheck()
    original = fill.value
    fill.value = functools.cache(original)
    yield
    fill.value = original


def build(model: str, backbone: str, aux: bool, seed: int) -> torch.nn.Module:
    with torch.device("meta"):  # no time spent on an initialization that is overwritten
        net = get_segmentation_model(model=model, backbone=backbone, num_class=19, aux=aux, pretrained="None",
                                     pretrained_base="None", norm_layer=torch.nn.BatchNorm2d)
    return fill.fill_module(net.to_empty(device="cpu"), seed)


def worst_error(net: torch.nn.Module, case: dict) -> float:
    errors = []
    for name, shape, seed in case["spec"]["inputs"]:
        out = net(fill.tensor(name, shape, seed))
        taps = RECORDED[case["expect"][f"{name}:n"]]
        errors += [fill.compare(fill.digest(getattr(out, tap)), case["expect"][f"{name}:{i}"])
                   for i, tap in enumerate(taps)]
    if "running_stats" in case["expect"]:
        stats = [v.flatten() for k, v in net.state_dict().items() if k.endswith(("running_mean", "running_var"))]
        errors.append(fill.compare(fill.digest(torch.cat(stats)), case["expect"]["running_stats"]))
    return max(errors)


@torch.no_grad()
@pytest.mark.parametrize("key", GROUPS, ids=lambda k: f"{k[0]}-{k[1]}{'' if k[2] else '-noaux'}")
def test_outputs_equal_the_reference(key):
    net = build(*key)
    for case in sorted(GROUPS[key], key=lambda c: c["spec"]["mode"]):  # eval first: train changes the statistics
        train = case["spec"]["mode"] == "train"
        (fill.no_dropout(net) if train else net).train(train)
        assert worst_error(net, case) < max(1e-4, 20 * case["f32_dev"]), case["id"]


def test_nothing_is_skipped():
    covered = sum(len(g) for g in GROUPS.values())
    assert covered == sum(c["spec"]["backbone"] != EXCLUDED for c in CASES) == 25


@torch.no_grad()
def test_a_wrong_dilation_would_show():
    """The comparison has teeth: one dilation of one block more, and the error is far above the tolerance."""
    key = ("psp", "resnet18", True, 1)
    net = build(*key).eval()
    net.pretrained.layer4[1].conv2.dilation = net.pretrained.layer4[1].conv2.padding = (2, 2)
    assert worst_error(net, GROUPS[key][0]) > 1e-2
