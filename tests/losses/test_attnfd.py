"""AttnFD: recorded values, attention and loss in loops, groups, edge cases, the method."""
from __future__ import annotations

import copy

import pytest
import torch
from method_cases import batch, make, preparation
from reference import fill, golden
from torch import nn
from torch.nn import functional as F

from losses.attnfd import CBAM, TAPS, AttnFD, attnfd_loss, connector
from losses.core import NetInfo, methods
from models.heads import resize
from models.output import SegOutput
from utils.errors import UserError

DTYPES = (torch.float32, torch.float64)
REFERENCE_NAMES = {"mlp.0": "ChannelGate.mlp.1", "mlp.2": "ChannelGate.mlp.3", "conv": "SpatialGate.spatial.conv",
                   "bn": "SpatialGate.spatial.bn"}


def reference_name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{REFERENCE_NAMES[module]}.{leaf}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", golden.case_ids("attnfd/cbam_"))
def test_golden_attention(name, dtype):
    case = golden.load_case(name)
    inputs = golden.make_inputs(case, dtype)
    module = CBAM(case["config"]["gate_channels"], case["config"]["reduction"]).to(dtype)
    golden.fill_params(module, case, reference_name)
    loss = module(inputs["student"]).square().mean()
    golden.check_losses(case, {"mean_sq": loss}, inputs, module, reference_name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", golden.case_ids("attnfd/loss_"))
def test_golden_loss(name, dtype):
    case = golden.load_case(name)
    inputs = golden.make_inputs(case, dtype)
    students, teachers = ([inputs[f"{role}{i}"] for i in range(3)] for role in ("student", "teacher"))
    pairs = zip(students, teachers, strict=True)
    # the recorded module has three more connectors, for stages that it does not compare
    module = nn.ModuleList([connector(4, 4) for _ in range(3)]
                           + [connector(s.shape[1], t.shape[1]) for s, t in pairs]).to(dtype)
    golden.fill_params(module, case, "d.Connectors.{}".format)
    aligned = [connect(x) for connect, x in zip(module[3:], students, strict=True)]
    golden.check_losses(case, {"attnfd": attnfd_loss(aligned, teachers)}, inputs, module, "d.Connectors.{}".format)


def test_every_recorded_case_is_checked():
    assert set(golden.case_ids("attnfd/")) == {*golden.case_ids("attnfd/cbam_"), *golden.case_ids("attnfd/loss_")}


def maps(shape=(3, 4, 3, 5), scale=1.0):
    return [fill.tensor(n, shape, 1, scale, torch.float64) for n in ("s", "t")]


def test_attention_in_loops():
    x, module = maps((2, 6, 4, 5))[0], fill.fill_module(CBAM(6, 3).double(), 2)
    state, refined = module.state_dict(), torch.empty(2, 6, 4, 5).double()
    summary = torch.empty(2, 2, 4, 5).double()
    for n in range(2):
        scores = 0
        for pooled in (torch.stack([c.mean() for c in x[n]]), torch.stack([c.max() for c in x[n]])):
            hidden = (state["mlp.0.weight"] @ pooled + state["mlp.0.bias"]).clamp(min=0)
            scores = scores + state["mlp.2.weight"] @ hidden + state["mlp.2.bias"]
        for c in range(6):
            refined[n, c] = x[n, c] / (1 + torch.exp(-scores[c]))
        for i in range(4):
            for j in range(5):
                summary[n, :, i, j] = torch.stack([refined[n, :, i, j].max(), refined[n, :, i, j].mean()])
    z = F.conv2d(summary, state["conv.weight"], padding=3)
    z = (z - z.mean()) / (z.var(correction=0) + 1e-5).sqrt() * state["bn.weight"] + state["bn.bias"]
    torch.testing.assert_close(module(x), refined * z.sigmoid(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("group", [0, 1, 2, 3])
def test_loss_in_loops(group):
    (s, t), total = maps(), 0.0
    size = group or 3
    for start in range(0, 3, size):
        ours, theirs = (x[start:start + size].flatten().tolist() for x in (s, t))
        a, b = (sum(v * v for v in x) ** 0.5 for x in (ours, theirs))
        total += sum((x / a - y / b) ** 2 for x, y in zip(ours, theirs, strict=True)) / 3
    assert attnfd_loss([s], [t], group).item() == pytest.approx(total, rel=1e-10)
    assert attnfd_loss([s, t], [t, s], group).item() == pytest.approx(2 * total, rel=1e-10)


def test_equal_scaled_and_zero_maps():
    s, t = maps()
    assert attnfd_loss([t * 3], [t]).item() == pytest.approx(0, abs=1e-14)
    zero = torch.zeros_like(s, requires_grad=True)
    loss = attnfd_loss([zero], [torch.zeros_like(t)])
    loss.backward()
    assert loss.item() == 0 and zero.grad.isfinite().all()


def test_half_precision_is_computed_in_float32_and_the_teacher_gets_no_gradient():
    s, t = (x.bfloat16().requires_grad_() for x in maps())
    got = attnfd_loss([s], [t], 2)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(attnfd_loss([s.float()], [t.float()], 2).item(), rel=1e-6)
    got.backward()
    assert t.grad is None and s.grad is not None


def net(name: str, c4: int, head: int, stride: int = 8) -> NetInfo:
    return NetInfo(name, {"logits": 5, "c4": c4, "head": head}, 5, stride)


def output(c4, head) -> SegOutput:
    return SegOutput(logits=head, aux=None, c1=c4, c2=c4, c3=c4, c4=c4, head=head)


def test_method_trains_the_students_side_only():
    assert methods()["attnfd"] is AttnFD and AttnFD.terms[0].weight == 0
    small, large = net("small", 32, 16), net("large", 48, 24)
    method = make("attnfd", small, large, group_size=1, attnfd_connector_steps=0)
    assert method.group_size == 1
    s, t = (output(torch.randn(2, i.channels["c4"], 4, 6).requires_grad_(), torch.randn(2, i.channels["head"], 4, 6))
            for i in (small, large))
    method(batch(s, t))["attnfd"].backward()
    trained = {n for n, p in method.named_parameters() if p.grad is not None}
    assert trained == {n for n, _ in method.named_parameters() if not n.startswith("teacher_attention")}
    assert len(method.trained_parameters()) == len(trained) and t.c4.grad is None and s.c4.grad is not None


def test_misfits_are_named():
    with pytest.raises(UserError, match=r"attnfd.*\(3, 4, 3, 5\).*\(3, 4, 3, 4\)"):
        attnfd_loss([maps()[0]], [maps()[1][..., :4]])
    with pytest.raises(UserError, match="needs c4 of the student"):
        make("attnfd", NetInfo("none", {"head": 5}, 5), net("large", 3, 4))


class Net(nn.Module):
    """Two maps of the images, with a batch norm that shows whether it ran in train mode."""

    def __init__(self, c4: int, head: int, stride: int = 1) -> None:
        super().__init__()
        self.c4, self.head = (nn.Sequential(nn.Conv2d(3, c, 3, stride, 1), nn.BatchNorm2d(c)) for c in (c4, head))

    def forward(self, images) -> SegOutput:
        return output(self.c4(images), self.head(images))


def batches(steps: int, batch_size: int, start: int, role: str):
    assert role == "both"
    for step in range(start, steps):
        images = fill.tensor(f"images{step}", (batch_size, 3, 6, 8), 1)
        yield (images, 2 * images), torch.zeros(batch_size, 6, 8, dtype=torch.long)


def staged(folder, steps: int | None = 3, images: int = 0, stride: int = 1) -> tuple[AttnFD, Net, Net, AttnFD]:
    """(method after its stage, student, teacher, the method before its stage); the student has to be as it was.
    stride: of the student's maps; the teacher's have 1."""
    torch.manual_seed(0)
    method = make("attnfd", net("small", 8, 6), net("large", 10, 7), attnfd_connector_steps=steps, batch_size=2,
                  lr=0.1, momentum=0.9, weight_decay=1e-3, active={"attnfd": 2.0}, max_iterations=10)
    student, teacher = Net(8, 6, stride).train(), Net(10, 7).eval()
    before, untouched = copy.deepcopy(method), copy.deepcopy(student.state_dict())
    method.prepare(preparation(teacher, folder, batches, images=images, student=student))
    assert student.training and all(v.equal(untouched[k]) for k, v in student.state_dict().items())
    return method, student, teacher, before


def test_connectors_start_as_released():
    """N(0, sqrt(2 / C_out)) for the convolution, 1 and 0 for the batch norm."""
    torch.manual_seed(0)
    convolution, norm = connector(400, 300)
    assert convolution.weight.std().item() == pytest.approx((2 / 300) ** 0.5, rel=0.01)
    assert convolution.weight.mean().abs() < 1e-3
    assert norm.weight.eq(1).all() and norm.bias.eq(0).all() and convolution.bias is None


@pytest.mark.parametrize("compat", ["fixed", "reference"])
def test_compat_reference_trains_only_convolutions_and_batch_norms_of_the_students_attention(compat):
    """As the released optimizer, which collects the parameters of these two kinds of modules."""
    method = make("attnfd", net("small", 32, 16), net("large", 48, 24), compat=compat, attnfd_connector_steps=2)
    kinds = (nn.Conv2d, nn.BatchNorm2d) if compat == "reference" else (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
    collected = [p for m in method.student_attention.modules() if isinstance(m, kinds) for p in m.parameters()]
    trained = set(map(id, method.trained_parameters())) - set(map(id, method.connectors.parameters()))
    assert trained == set(map(id, collected)) and len(trained) == (2 * 3 if compat == "reference" else 2 * 7)
    s, t = (output(torch.randn(2, i.channels["c4"], 4, 6).requires_grad_(), torch.randn(2, i.channels["head"], 4, 6))
            for i in (net("small", 32, 16), net("large", 48, 24)))
    method(batch(s, t))["attnfd"].backward()
    assert s.c4.grad.abs().max() > 0, "the student learns through them all the same"


@pytest.mark.parametrize("stride", [1, 2])
def test_the_stage_trains_the_connectors_alone_at_the_rate_of_the_run(tmp_path, stride):
    """As released: its scheduler gives the only group of their optimizer lr (1 - i/N)^0.9, N of the whole run. Smaller
    maps of the student are resized, as they are after the stage."""
    method, student, teacher, twin = staged(tmp_path, stride=stride)
    twin.connectors.requires_grad_(True)
    optimizer = torch.optim.SGD(twin.connectors.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for i, (images, _) in enumerate(batches(3, 2, 0, "both")):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - i / 10) ** 0.9
        optimizer.zero_grad()
        small, large = student(images[0]), teacher(images[1])
        if stride > 1:
            small = small._replace(**{tap: resize(getattr(small, tap), getattr(large, tap).shape[2:]) for tap in TAPS})
        (2 * twin(batch(small, large))["attnfd"]).backward()
        optimizer.step()
    for (name, value), other in zip(method.connectors.named_parameters(), twin.connectors.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-7)
        assert not value.requires_grad and value.grad is None, name
    assert {id(p) for p in method.trained_parameters()} == {id(p) for p in method.student_attention.parameters()}
    assert method.student_attention.state_dict()["0.mlp.0.weight"].equal(
        twin.student_attention.state_dict()["0.mlp.0.weight"])


def test_the_stage_is_one_epoch_long_by_default_and_cached(tmp_path):
    method, *_ = staged(tmp_path, steps=None, images=9)
    (path,) = tmp_path.glob("attnfd_connectors_*.pth")
    assert torch.load(path, weights_only=True)["step"] == 4
    again, *_ = staged(tmp_path, steps=None, images=9)
    assert all(a.equal(b) for a, b in zip(method.connectors.parameters(), again.connectors.parameters(), strict=True))
    assert staged(tmp_path, steps=0)[0].connectors[0][0].weight.requires_grad


def test_a_stage_longer_than_the_run_decays_over_itself(tmp_path):
    method, *_ = staged(tmp_path, steps=12)
    assert all(p.isfinite().all() for p in method.connectors.parameters())
