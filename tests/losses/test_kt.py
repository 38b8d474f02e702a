"""KT: loop twins of the tailoring as it was released, the stages, the projections, refusals."""
from __future__ import annotations

import pytest
import torch
from method_cases import batch, facts, make, options_of_method
from reference import fill
from torch.nn import functional as F

from losses.core import NetInfo, methods
from losses.cwd import cwd_loss
from losses.kd import kd_loss
from losses.kt import KT, FeatureTailoring, contrast_loss, logit_tailoring_loss, mix_channels, tailor_logits
from models.output import SegOutput
from utils.errors import UserError

ALL = frozenset({"kt_logit", "kt_feature", "kt_contrast", "kt_aux"})
STUDENT = NetInfo("s", {"logits": 4, "aux": 4, "head": 6}, 4)
TEACHER = NetInfo("t", {"logits": 4, "aux": 4, "head": 8}, 4)


def output(logits, aux, head) -> SegOutput:
    return SegOutput(logits, aux, head, head, head, head, head)


def outputs(**more) -> tuple[SegOutput, SegOutput]:
    return tuple(output(*(fill.tensor(f"{net.name}{i}", (2, width, 5, 3), 8, 1.5).requires_grad_()
                          for i, width in enumerate((4, 4, net.channels["head"])))) for net in (STUDENT, TEACHER))


def build(*arguments: str, active: frozenset[str] = ALL, student: NetInfo = STUDENT, **options) -> KT:
    torch.manual_seed(0)
    return make("kt", student, TEACHER, *arguments, active=active, kd_temperature=4.0, **options)


def taps(student: NetInfo = STUDENT, active: frozenset[str] = ALL) -> tuple[str, ...]:
    """The taps that KT requires of both networks."""
    needs = KT.requires(options_of_method("kt"), facts(active=dict.fromkeys(active, 1.0)), student, TEACHER)
    assert needs.student == needs.teacher
    return needs.student


def labels_of(height: int, width: int, seed: int) -> torch.Tensor:
    """Labels of 4 classes, drawn pixel by pixel, a fifth of them ignored."""
    return fill.labels("y", (2, 4 * height, 4 * width), 4, seed, 0.2, -1)[:, ::4, ::4]


def slow_tailor(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Image by image and class by class with boolean selections, as released; a mean over nothing is NaN."""
    classes = range(logits.shape[1])
    mask = torch.stack([labels == c for c in classes], dim=1).to(logits.dtype)
    inside, outside = logits * mask, logits * (1 - mask)
    for b in range(len(logits)):
        for c in classes:
            floor = inside[b, c][inside[b, c] > 0].mean()
            ceiling = outside[b, c].mean()
            inside[b, c][inside[b, c] < floor] = floor
            outside[b, c][outside[b, c] > ceiling] = ceiling
    return inside * mask, outside * (1 - mask)


@pytest.mark.parametrize("kind", ["mixed", "one class", "all ignored", "all negative"])
def test_tailored_logits_loop_twin(kind):
    logits = fill.tensor("z", (2, 4, 5, 3), 1, 2.0, torch.float64)
    if kind == "all negative":
        logits = -logits.abs() - 0.1
    logits.requires_grad_()
    labels = {"one class": torch.full((2, 5, 3), 2), "all ignored": torch.full((2, 5, 3), -1)}.get(
        kind, labels_of(5, 3, 1))
    got = tailor_logits(logits, labels[:, None] == torch.arange(4).view(1, -1, 1, 1))
    want = slow_tailor(logits, labels)
    weights = [fill.tensor(n, (2, 4, 5, 3), 2, 1.0, torch.float64) for n in "ab"]
    gradients = [torch.autograd.grad(sum((x * w).sum() for x, w in zip(pair, weights, strict=True)), logits)[0]
                 for pair in (got, want)]
    for ours, theirs in zip((*got, gradients[0]), (*want, gradients[1]), strict=True):
        assert theirs.isfinite().all()
        torch.testing.assert_close(ours, theirs)


def test_logit_tailoring_loss():
    student, teacher = (fill.tensor(n, (2, 4, 5, 3), 3, 2.0, torch.float64).requires_grad_() for n in "st")
    labels = labels_of(5, 3, 3)
    (s_in, s_out), (t_in, t_out) = slow_tailor(student, labels), slow_tailor(teacher, labels)
    want = cwd_loss(student, t_in + t_out, 4.0) + cwd_loss(s_in, t_in, 4.0) + cwd_loss(s_out, t_out, 4.0)
    loss = logit_tailoring_loss(student, teacher, labels, 4.0)
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    other = torch.where(labels < 0, 255, labels)
    torch.testing.assert_close(logit_tailoring_loss(student, teacher, other, 4.0, ignore_label=255), want)


def test_mixed_channels_loop_twin():
    source, goal = fill.tensor("s", (2, 4, 5, 3), 4, 1.0, torch.float64), fill.tensor("g", (2, 6, 5, 3), 4)
    goal = goal.double()
    high, low = mix_channels(source, goal)
    for b in range(2):
        correlation = torch.stack([torch.stack([F.cosine_similarity(goal[b, d].reshape(-1), source[b, c].reshape(-1),
                                                                    dim=0) for c in range(4)]) for d in range(6)])
        for mixed, weight in ((high, correlation), (low, 1 - correlation)):
            want = torch.stack([sum(weight[d, c] * source[b, c] for c in range(4)) for d in range(6)])
            torch.testing.assert_close(mixed[b], want)


def test_contrast_loop_twin():
    maps = [fill.tensor(n, (2, 4, 5, 3), 5, 0.5, torch.float64) for n in "ahl"]
    anchor, high, low = maps
    near, far = ([((anchor[b, c, y] - x[b, c, y] + 1e-7) ** 2).sum() ** 0.5
                  for b in range(2) for c in range(4) for y in range(5)] for x in (high, low))
    want = sum(max(float(n - f) + 1, 0.0) for n, f in zip(near, far, strict=True)) / len(near)
    assert contrast_loss(*maps).item() == pytest.approx(want)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("step", [0, 2, 3])
def test_stages(step, trained):
    """Iteration numbers start at 1 in the released code: --kt-switch 4 ends the first stage after 3 of them."""
    method = build("--kt-switch", "4", *(["--kt-train-projections"] if trained else []))
    student, teacher = outputs()
    terms = method(batch(student, teacher, fill.labels("y", (2, 40, 24), 4, 8, 0.2, -1), step))
    tails = method.features
    s, t = student.head, teacher.head
    if step < 3:
        high, low = (tails.student_tail(x) for x in mix_channels(s, t))
        want = cwd_loss(high, t, 4.0), contrast_loss(tails.anchor(s), high, low)
    else:
        high, low = (tails.teacher_tail(x) for x in mix_channels(t, s))
        want = cwd_loss(s, high, 4.0), contrast_loss(s, high, low)
    torch.testing.assert_close((terms["kt_feature"], terms["kt_contrast"]), want)
    assert set(terms) == ALL and terms["kt_aux"].item() == kd_loss(student.aux, teacher.aux, 4.0).item()
    sum(terms.values()).backward()
    assert all(x.grad is None for x in teacher) and student.head.grad.abs().sum() > 0
    if not trained:
        assert not method.trained_parameters() and all(p.grad is None for p in method.parameters())
    else:
        assert all(p.grad is not None for p in method.trained_parameters())
        used = {n.split(".")[1] for n, p in method.named_parameters() if p.grad.abs().sum() > 0}
        assert used == ({"student_tail", "anchor"} if step < 3 else {"teacher_tail"})
    assert len(method.state_dict()) == 13


def test_logits_at_their_stride_or_at_crop_size():
    """Label edges on the grid of the logits: both give the same number, the released way with 64 times the work."""
    student, teacher = outputs()
    coarse = labels_of(5, 3, 9)
    target = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)
    fixed, released = (build(active=frozenset({"kt_logit"}), compat=c)(batch(student, teacher, target))
                       for c in ("fixed", "reference"))
    assert list(fixed) == ["kt_logit"]
    torch.testing.assert_close(fixed, released)
    shifted = target.roll(2, dims=2)
    moved = batch(student, teacher, shifted)
    fixed, released = (build(active=frozenset({"kt_logit"}), compat=c)(moved)["kt_logit"].item()
                       for c in ("fixed", "reference"))
    assert fixed != pytest.approx(released, rel=1e-4)


@pytest.mark.parametrize("name", sorted(ALL))
def test_only_active_terms(name):
    assert methods()["kt"] is KT
    method = build("--kt-train-projections", active=frozenset({name}))
    assert bool(method.trained_parameters()) == (name in ("kt_feature", "kt_contrast"))
    student, teacher = outputs()
    terms = method(batch(student, teacher, torch.zeros(2, 40, 24, dtype=torch.long)))
    assert list(terms) == [name]


def test_a_network_without_auxiliary_head_does_without_that_term():
    bare = NetInfo("bare", {"logits": 4, "head": 6}, 4)
    method = build(student=bare)
    student, teacher = outputs()
    terms = method(batch(student._replace(aux=None), teacher, torch.zeros(2, 40, 24, dtype=torch.long)))
    assert set(terms) == ALL - {"kt_aux"} == {term.name for term in method.terms}
    assert {term.name for term in build().terms} == ALL and set(taps(bare)) == {"logits", "head"}
    assert set(taps()) == {"logits", "aux", "head"} and taps(active=frozenset({"kt_aux"})) == ("aux",)


@pytest.mark.parametrize("step", [0, 10000])
def test_autocast(step):
    method = build()
    student, teacher = outputs()
    target = fill.labels("y", (2, 40, 24), 4, 8, 0.2, -1)
    want = method(batch(student, teacher, target, step))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = method(batch(student, teacher, target, step))
    for name in ALL:
        assert got[name].dtype == torch.float32
        assert got[name].item() == pytest.approx(want[name].item(), rel=0.05, abs=1e-3)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="'kt' needs head of the student"):
        build(student=NetInfo("bare", {"logits": 4}, 4))
    with pytest.raises(UserError, match="kt"):
        build(student=NetInfo("other", {"logits": 5, "head": 6}, 5))
    with pytest.raises(UserError, match="kt_aux: student and teacher need an auxiliary head"):
        bare = NetInfo("bare", {"logits": 4, "head": 6}, 4)
        build(student=bare, active=frozenset({"kt_aux"}))
    with pytest.raises(UserError, match=r"kt: .*\(1, 8, 4, 5\)"):
        FeatureTailoring(6, 8, options_of_method("kt"))(torch.zeros(1, 6, 4, 4), torch.zeros(1, 8, 4, 5), 0)
    for name in ("kt_temperature", "kd_temperature"):
        with pytest.raises(UserError, match="temperature 0.0: expected a number above 0"):
            options_of_method("kt", **{name: 0.0})
