"""CWD: recorded values of every variant, the formula as a loop, alignment and its divisor."""
from __future__ import annotations

import math

import pytest
import torch
from method_cases import batch, facts, make, options_of_method
from reference import fill, golden
from torch import nn

from engine.presets import preset
from losses.core import NetInfo, methods
from losses.cwd import CWD, cwd_loss
from models.output import SegOutput
from utils.errors import UserError

DTYPES = (torch.float32, torch.float64)
BOTH = frozenset({"cwd_feat", "cwd_logit"})
SMALL, LARGE = NetInfo("small", {"logits": 5, "head": 6}, 5), NetInfo("large", {"logits": 5, "head": 9}, 5)


def maps(student_channels=5, teacher_channels=5, dtype=torch.float64) -> tuple:
    student = fill.tensor("student", (2, student_channels, 7, 9), 3, 1.5, dtype).requires_grad_()
    return student, fill.tensor("teacher", (2, teacher_channels, 7, 9), 4, 2.0, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [n for n in golden.case_ids("cwd/") if "feat" not in n])
def test_recorded(name, dtype):
    case = golden.load_case(name)
    config = case["config"]
    inputs = golden.make_inputs(case, dtype)
    loss = cwd_loss(*inputs.values(), config.get("temperature", config.get("tau")),
                    norm=config.get("norm", "channel"), divergence=config.get("divergence", "kl"))
    golden.check_losses(case, {"cwd": config.get("loss_weight", 1) * loss}, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", golden.case_ids("cwd/cirkd_feat"))
def test_recorded_with_alignment(name, dtype):
    case = golden.load_case(name)
    config = case["config"]
    inputs = golden.make_inputs(case, dtype)
    options = options_of_method("cwd", cwd_temperature=config["temperature"])
    method = CWD(config["s_channels"], config["t_channels"], options, ["cwd_feat"]).to(dtype)
    golden.fill_params(method, case)
    golden.check_losses(case, {"cwd": method.feature_loss(**inputs)}, inputs, method)


def test_every_recorded_case_is_one_of_these():
    assert len(golden.case_ids("cwd/")) == 8


def slow_loss(student, teacher, temperature) -> float:
    total = 0.0
    batch, channels = student.shape[:2]
    for n in range(batch):
        for c in range(channels):
            q, p = ((x[n, c].flatten() / temperature).exp() for x in (student, teacher))
            p, q = (p / p.sum()).tolist(), (q / q.sum()).tolist()
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return temperature ** 2 * total / (batch * channels)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equals_the_formula(temperature):
    student, teacher = maps()
    found = cwd_loss(student, teacher, temperature).item()
    assert found == pytest.approx(slow_loss(student.detach(), teacher, temperature), rel=1e-10)


def test_large_values_do_not_underflow():
    student, teacher = (x * 1e4 for x in maps(dtype=torch.float32))
    loss = cwd_loss(student, teacher, 1.0)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(cwd_loss(student.double(), teacher.double(), 1.0).item(), rel=1e-4)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_a_constant_per_channel_changes_nothing():
    student, teacher = maps()
    moved = student + torch.arange(5.0)[:, None, None]
    torch.testing.assert_close(cwd_loss(moved, teacher), cwd_loss(student, teacher))


def test_autocast_and_half_precision_are_computed_in_float32():
    student, teacher = (x.detach().bfloat16() for x in maps())
    for variant in ({}, {"norm": "spatial"}, {"norm": "channel_mean", "divergence": "mse"}):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = cwd_loss(student, teacher, **variant)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, cwd_loss(student.float(), teacher.float(), **variant), rtol=0, atol=0)


def test_equal_maps_give_zero_and_the_teacher_no_gradient():
    student, teacher = maps()
    assert cwd_loss(student, student.detach()).item() == pytest.approx(0, abs=1e-14)
    teacher.requires_grad_()
    cwd_loss(student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def outputs(dtype=torch.float64) -> tuple[SegOutput, SegOutput]:
    heads, logits = maps(6, 9, dtype), maps(5, 5, dtype)
    empty = dict.fromkeys(SegOutput._fields)
    return tuple(SegOutput(**{**empty, "head": h, "logits": z}) for h, z in zip(heads, logits, strict=True))


def build(active=BOTH, student=SMALL, teacher=LARGE, *flags: str) -> CWD:
    return make("cwd", student, teacher, *flags, active=active)


def test_method_and_its_terms():
    assert methods()["cwd"] is CWD
    student, teacher = outputs()
    method = build().double()
    terms = method(batch(student, teacher))
    assert terms["cwd_logit"].item() == cwd_loss(student.logits, teacher.logits, 4.0).item()
    aligned = nn.functional.conv2d(student.head, method.conv.weight)
    assert terms["cwd_feat"].item() == pytest.approx(9 / 6 * cwd_loss(aligned, teacher.head, 4.0).item(), rel=1e-12)


def test_divided_by_the_teachers_width_on_request():
    student, teacher = outputs()
    torch.manual_seed(0)
    published = build().double()
    formula = build(BOTH, SMALL, LARGE, "--cwd-divide-by", "teacher").double()
    formula.load_state_dict(published.state_dict())
    got, want = (m(batch(student, teacher)) for m in (published, formula))
    assert got["cwd_feat"].item() == pytest.approx(want["cwd_feat"].item() * 9 / 6, rel=1e-12)
    assert got["cwd_logit"].item() == want["cwd_logit"].item()


def test_the_width_is_of_no_effect_where_positions_divide():
    student, teacher = outputs()
    first, second = (build(BOTH, SMALL, LARGE, "--cwd-norm", "spatial", "--cwd-divide-by", by).double()
                     for by in ("student", "teacher"))
    second.load_state_dict(first.state_dict())
    one, other = (method(batch(student, teacher))["cwd_feat"].item() for method in (first, second))
    assert one == other


def test_options_reach_both_terms():
    student, teacher = outputs()
    method = build(BOTH, SMALL, LARGE, "--cwd_temperature", "2", "--cwd-norm", "spatial").double()
    terms = method(batch(student, teacher))
    wanted = {"temperature": 2.0, "norm": "spatial"}
    assert terms["cwd_logit"].item() == cwd_loss(student.logits, teacher.logits, **wanted).item()
    assert terms["cwd_feat"].item() == cwd_loss(method.conv(student.head), teacher.head, **wanted).item()


@pytest.mark.parametrize(("active", "taps", "parameters"), [(["cwd_logit"], ("logits",), 0),
                                                            (["cwd_feat"], ("head",), 54), (BOTH, None, 54)])
def test_builds_and_reads_only_what_is_active(active, taps, parameters):
    method = build(active)
    student, teacher = outputs(torch.float32)
    if taps:
        needs = CWD.requires(options_of_method("cwd"), facts(active=dict.fromkeys(active, 1.0)), SMALL, LARGE)
        assert needs.student == needs.teacher == taps
        student, teacher = (SegOutput(*(v if f in taps else None for f, v in x._asdict().items()))
                            for x in (student, teacher))
    assert set(method(batch(student, teacher))) == set(active)
    assert sum(p.numel() for p in method.parameters()) == parameters


def test_equal_widths_need_no_convolution():
    """The reference's would exist without ever getting a gradient, which DDP refuses."""
    assert not list(build(BOTH, LARGE, LARGE).parameters())


def test_preset_is_the_published_row():
    weights = {"lambda_kd": 1.0, "lambda_cwd_feat": 50.0, "lambda_cwd_logit": 3.0, "lambda_adv": 0.001}
    for dataset, adversarial in (("citys", 0.001), ("voc", 0.001), ("camvid", 0.0)):
        found = {k: v for k, v in preset("cwd", dataset, "resnet18").items() if k in weights or v}
        assert found == {**weights, "lambda_adv": adversarial}


def test_errors_name_what_is_wrong():
    student, teacher = maps()
    with pytest.raises(UserError, match=r"cwd.*\(2, 5, 7, 9\).*\(2, 5, 7, 8\)"):
        cwd_loss(student, teacher[..., :8])
    with pytest.raises(UserError, match="cwd: norm channel_mean"):
        cwd_loss(student, teacher, norm="channel_mean")
    with pytest.raises(UserError, match="cwd: norm channel_mean.*mse"):
        build(BOTH, SMALL, LARGE, "--cwd-norm", "channel_mean")
    with pytest.raises(UserError, match="logits 5 of the student small and 6 of the teacher large"):
        build(BOTH, SMALL, NetInfo("large", {"logits": 6, "head": 9}, 6))
    with pytest.raises(UserError, match="needs head of the student, but small offers only logits"):
        build(["cwd_feat"], NetInfo("small", {"logits": 5}, 5))
