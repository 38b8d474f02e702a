"""DSD: recorded values of both kinds of student, a loop twin of both terms, which maps are compared."""
from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from method_cases import batch, make
from reference import golden

from losses.core import NetInfo, methods
from losses.dsd import DSD, csd_loss, psd_loss
from models.output import SegOutput
from utils.errors import UserError

BOTH = frozenset({"dsd_psd", "dsd_csd"})
WITH_AUX = NetInfo("with", {"logits": 3, "aux": 3, "head": 4}, 3)
WITHOUT = NetInfo("without", {"logits": 3, "head": 4}, 3)


def output(logits, aux, head) -> SegOutput:
    return SegOutput(logits, aux, head, head, head, head, head)


def recorded(name: str, dtype: torch.dtype, compat: str):
    """The recorded inputs as network outputs, through the method: {recorded name: loss}."""
    case = golden.load_case(name)
    inputs = golden.make_inputs(case, dtype)
    outputs, nets = [], []
    for role in ("student", "teacher"):
        logits, aux, head = (inputs.get(f"{role}_{kind}") for kind in ("logits", "aux", "feat"))
        outputs.append(output(logits, aux, head))
        widths = {"logits": logits.shape[1], "head": head.shape[1]} | ({} if aux is None else {"aux": aux.shape[1]})
        nets.append(NetInfo(role, widths, logits.shape[1]))
    terms = make("dsd", *nets, compat=compat)(batch(*outputs))
    if compat == "reference" and "mobile" in name:
        assert terms["dsd_psd"].item() == psd_loss([inputs["student_logits"], inputs["student_feat"],
                                                    inputs["student_logits"]],
                                                   [inputs[f"teacher_{k}"] for k in ("aux", "feat", "logits")]).item()
        # no gradient at all reaches the logits; the recorded one is an array of zeros
        terms["dsd_psd"] = terms["dsd_psd"] + 0 * inputs["student_logits"].sum()
    return case, inputs, {name.removeprefix("dsd_"): value for name, value in terms.items()}


@pytest.mark.parametrize("compat", ["fixed", "reference"])
@pytest.mark.parametrize("name", golden.case_ids("dsd/"))
def test_golden(name, compat):
    case, inputs, losses = recorded(name, torch.float64, compat)
    if compat == "fixed" and "mobile" in name:
        assert losses["psd"].item() != pytest.approx(case["losses"]["psd"], rel=1e-3)
        losses["psd"] = recorded(name, torch.float64, "reference")[2]["psd"]
        assert losses["csd"].item() == pytest.approx(case["losses"]["csd"], rel=1e-6)
    else:
        golden.check_losses(case, losses, inputs)


@pytest.mark.parametrize("name", golden.case_ids("dsd/"))
def test_golden_float32(name):
    """Pixel similarity only: the values of the other term are rounding errors of numbers near 1e-3."""
    case, inputs, losses = recorded(name, torch.float32, "reference")
    only = {**case, **{key: {"psd": case[key]["psd"]} for key in ("losses", "losses_float32", "grads")}}
    golden.check_losses(only, {"psd": losses["psd"]}, inputs)


def slow_unit(values: list) -> list:
    length = sum(v * v for v in values) ** 0.5
    return [v / length for v in values]


def slow_psd(student: list, teacher: list) -> torch.Tensor:
    total, count = 0.0, 0
    for b in range(len(student[0])):
        residuals = []
        for maps in (student, teacher):
            attention = [slow_unit([p for p in x[b].pow(2).mean(0).reshape(-1)]) for x in maps]
            residuals.append([slow_unit([v - u for u, v in zip(attention[i], attention[j], strict=True)])
                              for i, j in combinations(range(len(maps)), 2)])
        for ours, theirs in zip(*residuals, strict=True):
            total += sum((u - v) ** 2 for u, v in zip(ours, theirs, strict=True))
            count += len(ours)
    return total / count


def slow_gram(logits: torch.Tensor, temperature: float) -> list[list[torch.Tensor]]:
    """For one image [K, h, w]."""
    maps = []
    for channel in logits:
        height, width = channel.shape
        cells = [channel[i:i + 2, j:j + 2].mean() for i in range(0, height, 2) for j in range(0, width, 2)]
        weights = [(c / temperature).exp() for c in cells]
        maps.append([w / sum(weights) for w in weights])
    return [[sum(u * v for u, v in zip(a, b, strict=True)) for b in maps] for a in maps]


def test_loop_twins():
    torch.manual_seed(0)
    student, teacher = ([torch.randn(2, c, 5, 3).double() for c in widths] for widths in ((3, 4, 3), (3, 6, 3)))
    torch.testing.assert_close(psd_loss(student, teacher), slow_psd(student, teacher))
    grams = [[slow_gram(image, 4.0) for image in maps[-1]] for maps in (student, teacher)]
    squares = [(grams[0][b][i][j] - grams[1][b][i][j]) ** 2 for b in range(2) for i in range(3) for j in range(3)]
    torch.testing.assert_close(csd_loss(student[-1], teacher[-1]), sum(squares) / len(squares))


@pytest.mark.parametrize("compat, student, teacher, expected", [
    ("fixed", WITH_AUX, WITH_AUX, ("aux head logits", "aux head logits")),
    ("reference", WITH_AUX, WITH_AUX, ("aux head logits", "aux head logits")),
    ("fixed", WITHOUT, WITH_AUX, ("head logits", "head logits")),
    ("reference", WITHOUT, WITH_AUX, ("logits head logits", "aux head logits"))])
def test_compared_maps(compat, student, teacher, expected):
    method = make("dsd", student, teacher, compat=compat)
    assert (" ".join(method.student_taps), " ".join(method.teacher_taps)) == expected


@pytest.mark.parametrize("active", [BOTH, {"dsd_psd"}, {"dsd_csd"}])
def test_method(active):
    assert methods()["dsd"] is DSD
    torch.manual_seed(0)
    method = make("dsd", WITH_AUX, WITH_AUX, active=active)
    tensors = [torch.randn(1, c, 5, 3, requires_grad=True) for c in (3, 3, 4, 3, 3, 4)]
    terms = method(batch(output(*tensors[:3]), output(*tensors[3:])))
    assert set(terms) == set(active)
    sum(terms.values()).backward()
    assert tensors[0].grad.abs().sum() > 0 and all(t.grad is None for t in tensors[3:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = method(batch(output(*tensors[:3]), output(*tensors[3:])))
    for name in active:
        torch.testing.assert_close(half[name], terms[name])


def test_maps_of_one_network_need_one_stride():
    """The teacher's for a start: the student's are resized to those, but for an auxiliary map that it has alone."""
    outside = replace(WITH_AUX, name="outside", stride=1, strides={"aux": 8, "head": 16}, takes_taps=True)
    with pytest.raises(UserError, match="dsd_psd .* teacher outside .*strides are aux 8, head 16, logits 1: expected "
                                        "one stride") as error:
        make("dsd", WITH_AUX, outside)
    assert error.value.settings == ("list_taps", "teacher_taps", "lambda_dsd_psd")
    assert make("dsd", WITH_AUX, outside, active={"dsd_csd"})
    assert make("dsd", outside, WITH_AUX).student_taps == ("aux", "head", "logits")
    assert make("dsd", outside, WITHOUT).student_taps == ("head", "logits")
    with pytest.raises(UserError, match="dsd_psd .* student outside .*strides are aux 8, head 4, logits 4"):
        make("dsd", outside, replace(WITHOUT, stride=4), compat="reference")


def test_what_does_not_fit_is_refused():
    x, y = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 5)
    for maps in (([x, x], [x]), ([x], [x])):
        with pytest.raises(UserError, match="at least 2"):
            psd_loss(*maps)
    with pytest.raises(UserError, match=r"dsd: .*\(1, 3, 4, 5\)"):
        psd_loss([x, y], [x, x])
    with pytest.raises(UserError, match="dsd: "):
        csd_loss(x, y)
    with pytest.raises(UserError, match="'dsd' needs head of the student"):
        make("dsd", NetInfo("bare", {"logits": 3}, 3), WITHOUT)
