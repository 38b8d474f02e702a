"""``train_kd.py --list-methods``: every method, exact counts, the networks and the data set that were asked for."""
from __future__ import annotations

import re

import pytest
import torch
from helpers import assert_refused

import train_kd
from engine.build import run_facts
from engine.method_list import amount, method_facts, method_table, unallocated_network, written
from engine.presets import published
from engine.settings import parse_settings
from losses.core import NetInfo, methods
from models import NetworkChoice, get_segmentation_model

SMALL = ["--student-model", "psp", "--student-backbone", "resnet18_w0.125", "--teacher-model", "psp",
         "--teacher-backbone", "resnet18_w0.25", "--teacher-pretrained", "t.pth", "--dataset", "camvid"]


def shown(capsys, *argv: str) -> str:
    assert train_kd.main(["--list-methods", *argv]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_every_method_is_listed_with_paper_preset_and_cost(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = shown(capsys)
    flat = " ".join(text.split())
    for name, cls in methods().items():
        assert re.search(rf"^{name}  .*{cls.year}", text, re.MULTILINE), name
        assert cls.paper in flat and cls.title in flat and cls.cost in flat, name
    assert max(map(len, text.splitlines())) <= 120
    row = next(x for x in text.splitlines() if x.startswith("afdcd "))
    assert "c4" in row and "fd 2e-06" in row and "ctr 0.005" in row and "152 M" in row
    assert "--rand-mask false, --enhance-projector true" in flat
    row = next(x for x in text.splitlines() if x.startswith("maskd "))
    assert "maskd 1, --weight-decay 0.0005" in row
    assert "buffers and frozen networks" in flat
    for name in ("adv", "skd"):  # a discriminator is counted wherever a preset asks for it
        assert re.search(rf"^{name}  .* 3\.19 M ", text, re.MULTILINE), name


def test_the_data_set_and_networks_count(capsys) -> None:
    text = shown(capsys, *SMALL)
    assert "psp-resnet18_w0.25 -> psp-resnet18_w0.125 on camvid (11 classes" in text
    row = next(x for x in text.splitlines() if x.startswith("afdcd "))
    assert "fd 8e-06" in row and "152 M" not in row and "--" not in row


def test_what_a_preset_sets_beside_the_weights_is_shown() -> None:
    for backbone in ("resnet18", "mobilenetv2"):
        model = "psp" if backbone == "resnet18" else "psp_mobile"
        config = parse_settings(["--method", "none", "--student-model", model, "--student-backbone", backbone])
        flat = " ".join(method_table(config, width=140).split())
        for name in methods():
            for option, value in published(name, "citys", backbone).items():
                flag = "--" + option.replace("_", "-")
                assert option.startswith("lambda_") or f"{flag} {str(value).lower().removesuffix('.0')}" in flat, flag
    assert "maskd 1, --weight-decay 0.0002" in flat and "--rand-mask" not in flat


@pytest.mark.parametrize(("value", "text"), [(False, "false"), (True, "true"), (5e-4, "0.0005"), (4.0, "4"), (3, "3"),
                                             ((4, 4), "4 4"), ("float16", "float16")])
def test_values_are_written_as_flags_take_them(value, text) -> None:
    assert written(value) == text


def test_the_counts_are_those_of_the_built_method() -> None:
    settings = parse_settings([*SMALL, "--method", "afdcd", "--crop-size", "128"])
    networks = [get_segmentation_model(model="psp", backbone=f"resnet18_w{w}", num_class=11) for w in (0.125, 0.25)]
    infos = [NetInfo.of(n) for n in networks]
    assert infos == [unallocated_network(NetworkChoice("psp", f"resnet18_w{w}"), 11) for w in (0.125, 0.25)]
    real = methods()["afdcd"].build(settings.method_options["afdcd"], run_facts(settings, 11), *infos)
    facts = method_facts("afdcd", settings, *infos)
    assert facts.parameters == sum(p.numel() for p in real.parameters()) > 0
    assert facts.state == sum(b.numel() * b.element_size() for b in real.buffers()) > 0
    assert facts.weights == {"fd": 8e-6, "ctr": 1e-2, "kd": 1.0} and facts.taps == "c4, logits" and not facts.refused


def test_a_method_that_the_settings_do_not_allow_says_why() -> None:
    config = parse_settings(["--method", "none", "--crop-size", "64"])
    text = method_table(config, width=120)
    assert re.search(r"not with these settings: .*--crop-size", " ".join(text.split()))


def test_nothing_is_allocated(monkeypatch) -> None:
    devices = set()
    allocate = torch.nn.Conv2d.__init__

    def spy(self, *args, **kwargs) -> None:
        allocate(self, *args, **kwargs)
        devices.add(self.weight.device.type)

    monkeypatch.setattr(torch.nn.Conv2d, "__init__", spy)
    method_table(parse_settings([*SMALL, "--method", "none"]), width=120)
    assert devices == {"meta"}


def test_unknown_networks_are_refused_in_one_line(capsys) -> None:
    assert_refused(capsys, train_kd.main, ["--list-methods", "--student-backbone", "nonsense"], "nonsense")


@pytest.mark.parametrize(("number", "text"), [(0, "-"), (7, "7"), (33000, "33 k"), (76548096, "76.5 M"),
                                              (2.5e9, "2.5 G")])
def test_amounts(number, text) -> None:
    assert amount(number) == text
    assert number == 0 or amount(number, "B") == (text + "B" if " " in text else text + " B")
