"""The adversarial term: recorded values, the discriminator's parts, its own training, its state."""
from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers import ROOT, launch_forked
from method_cases import batch as batch_of
from method_cases import facts, make, options_of_method
from programs import discriminator
from reference import fill, golden
from torch import nn

from engine.presets import preset
from losses.adversarial import (
    Adversarial,
    Discriminator,
    SelfAttention,
    SpectralNorm,
    WholeBatchNorm2d,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
)
from losses.core import NetInfo, methods
from models.output import SegOutput
from utils.distributed import Distributed
from utils.errors import UserError

DTYPES = (torch.float32, torch.float64)
CLASSES = 3
NET = NetInfo("net", {"logits": CLASSES}, CLASSES)


def logits(name: str, batch=2, size=(64, 64), dtype=torch.float32) -> torch.Tensor:
    return fill.tensor(name, (batch, CLASSES, *size), 5, 2.0, dtype)


def output(x) -> SegOutput:
    return SegOutput(**{**dict.fromkeys(SegOutput._fields), "logits": x})


def narrow(seed=0, dtype=torch.float32, group_size=2, **settings) -> Adversarial:
    """A narrow discriminator whose attention takes part."""
    torch.manual_seed(seed)
    options = options_of_method("adv", **{f"adv_{name}": value for name, value in settings.items()})
    method = Adversarial(options, facts(CLASSES, group_size=group_size), NET, NET, width=8).to(dtype)
    with torch.no_grad():
        method.discriminator.attn1.gamma.fill_(0.3)
        method.discriminator.attn2.gamma.fill_(-0.2)
    return method


def step(method: Adversarial, index: int, batch=2) -> float:
    """One iteration on the maps of that index; the student's term."""
    dtype = method.discriminator.last[0].weight.dtype
    student, teacher = (logits(f"{role}{index}", batch, dtype=dtype) for role in ("student", "teacher"))
    generator = torch.Generator().manual_seed(index)
    value = method(batch_of(output(student), output(teacher)), generator)["adv"].item()
    method.after_step(index)
    return value


def recorded_losses(kind: str, case, inputs, net) -> dict[str, torch.Tensor]:
    student, teacher = inputs["student"], inputs["teacher"]
    if kind == "adv_g":
        return {"adv_g": generator_loss(net(student))}
    if kind == "gp":
        share = golden.uniform(case, "alpha", (len(student), 1, 1, 1), student.dtype)
        return {"gp": gradient_penalty(net, student, teacher, share, case["config"]["lambda_gp"])}
    scores = net(student.detach()), net(teacher)
    return {"adv_d": discriminator_loss(*scores, "wgan-gp" if "wgan" in kind else "hinge")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*golden.case_ids("skd/adv"), *golden.case_ids("skd/gp")])
def test_recorded(name, dtype):
    case = golden.load_case(name)
    inputs = golden.make_inputs(case, dtype)
    net = golden.fill_params(Discriminator(inputs["student"].shape[1]).to(dtype), case)
    kind = name.removeprefix("skd/").rpartition("_")[0]
    golden.check_losses(case, recorded_losses(kind, case, inputs, net), inputs, net)


class TestParts:
    def test_spectral_norm_converges_to_the_largest_singular_value(self):
        torch.manual_seed(0)
        layer = SpectralNorm(nn.Conv2d(3, 5, 4, stride=2, padding=1)).double()
        x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
        for _ in range(300):
            found = layer(x)
        conv = layer.module
        largest = torch.linalg.matrix_norm(conv.weight_bar.flatten(1), 2)
        wanted = nn.functional.conv2d(x, conv.weight_bar / largest, conv.bias, 2, 1)
        torch.testing.assert_close(found, wanted)

    def test_spectral_norm_iterates_once_per_pass_and_only_in_train_mode(self):
        torch.manual_seed(0)
        layer, x = SpectralNorm(nn.Conv2d(2, 4, 4)), torch.randn(1, 2, 8, 8)
        u, matrix = layer.module.weight_u.clone(), layer.module.weight_bar.detach().flatten(1)
        layer(x)
        v = matrix.t() @ u
        wanted = matrix @ (v / v.norm())
        torch.testing.assert_close(layer.module.weight_u, wanted / wanted.norm())
        kept = layer.eval().module.weight_u.clone()
        layer(x)
        assert torch.equal(layer.module.weight_u, kept)

    def test_attention_equals_the_formula_and_starts_as_the_identity(self):
        torch.manual_seed(0)
        layer, x = SelfAttention(16).double(), torch.randn(2, 16, 3, 5, dtype=torch.float64)
        assert torch.equal(layer(x), x)
        layer.gamma.data.fill_(0.7)
        query, key, value = (c(x).flatten(2) for c in (layer.query_conv, layer.key_conv, layer.value_conv))
        wanted = x.clone().flatten(2)
        for n in range(2):
            for i in range(15):
                scores = torch.stack([query[n, :, i] @ key[n, :, j] for j in range(15)]).exp()
                wanted[n, :, i] += 0.7 * (value[n] * (scores / scores.sum())).sum(dim=1)
        torch.testing.assert_close(layer(x), wanted.view_as(x))

    def test_batch_norm_is_that_of_torch_over_all_images(self):
        torch.manual_seed(0)
        layer, x = WholeBatchNorm2d(4), torch.randn(5, 4, 6, 5) * 3 + 1
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
        twin = nn.BatchNorm2d(4)
        twin.load_state_dict(layer.state_dict(), strict=False)
        torch.testing.assert_close(layer(x), twin(x))
        torch.testing.assert_close((layer.running_mean, layer.running_var), (twin.running_mean, twin.running_var))
        torch.testing.assert_close(layer.eval()(x), twin.eval()(x))

    def test_batch_norm_keeps_its_second_derivative_when_others_are_synchronised(self):
        net = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(2), WholeBatchNorm2d(2)))
        assert [type(layer) for layer in net] == [nn.SyncBatchNorm, WholeBatchNorm2d]
        assert torch.autograd.gradgradcheck(WholeBatchNorm2d(2).double(), torch.randn(3, 2, 2, 2, dtype=torch.float64,
                                                                                      requires_grad=True))

    @pytest.mark.parametrize(("size", "scores"), [((64, 64), (1, 1)), ((71, 95), (1, 2)), ((64, 128), (1, 5))])
    def test_score_map(self, size, scores):
        assert narrow().discriminator(logits("x", 1, size)).shape == (1, 1, *scores)

    def test_losses_by_hand(self):
        student, teacher = torch.tensor([-3.0, 0.5]), torch.tensor([0.25, 2.0])
        assert generator_loss(student).item() == 1.25
        assert discriminator_loss(student, teacher).item() == (0 + 1.5) / 2 + (0.75 + 0) / 2
        assert discriminator_loss(student, teacher, "wgan-gp").item() == -1.25 - 1.125

    def test_gradient_penalty_of_a_linear_score(self):
        """Its slope is the weight everywhere: 10 * (||w|| - 1)^2, with a gradient for the weight."""
        weight = torch.full((CLASSES, 4, 4), 0.5, requires_grad=True)
        x = [torch.randn(2, CLASSES, 4, 4) for _ in range(2)]
        penalty = gradient_penalty(lambda maps: (maps * weight).sum(dim=(1, 2, 3)), *x, torch.rand(2, 1, 1, 1))
        norm = 0.5 * (CLASSES * 16) ** 0.5
        assert penalty.item() == pytest.approx(10 * (norm - 1) ** 2, rel=1e-5)
        (gradient,) = torch.autograd.grad(penalty, weight)
        torch.testing.assert_close(gradient, torch.full_like(weight, 20 * (norm - 1) * 0.5 / norm))


class TestGeneratorTerm:
    @pytest.mark.parametrize("group_size", [0, 1, 2])
    def test_gradient_is_that_of_a_plain_batch_norm_over_the_whole_batch(self, group_size):
        """As released, where the discriminator's batch norm is synchronized, whatever ``group_size``."""
        method = narrow(dtype=torch.float64, group_size=group_size)
        twin = copy.deepcopy(method.discriminator)
        twin.preprocess_additional = nn.BatchNorm2d(CLASSES).double()
        # images of different brightness: two images have other statistics than four
        student = logits("s", 4, dtype=torch.float64) + 2 * torch.arange(4).view(-1, 1, 1, 1)
        ours, theirs = (student.clone().requires_grad_() for _ in range(2))
        method(batch_of(output(ours), output(logits("t", 4, dtype=torch.float64))))["adv"].backward()
        (-twin(theirs).mean()).backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-14)
        pairs = torch.cat([torch.autograd.grad(-copy.deepcopy(twin)(x).mean(), x)[0]
                           for x in student.requires_grad_().split(2)])
        assert torch.cosine_similarity(pairs.flatten(), ours.grad.flatten(), dim=0) < 0.9

    def test_gradients_reach_the_student_only(self):
        method, student, teacher = narrow(), logits("s").requires_grad_(), logits("t").requires_grad_()
        before = copy.deepcopy(dict(method.discriminator.named_parameters()))
        terms = method(batch_of(output(student), output(teacher)))
        terms["adv"].backward()
        assert list(terms) == ["adv"] and student.grad.abs().sum() > 0 and teacher.grad is None
        assert all(p.grad is None and p.requires_grad and torch.equal(p, before[n])
                   for n, p in method.discriminator.named_parameters())

    def test_value_is_that_of_the_discriminator(self):
        method, student = narrow(), logits("s")
        twin = copy.deepcopy(method.discriminator)
        found = method(batch_of(output(student), output(logits("t"))))["adv"]
        assert found.item() == -twin(student).mean().item()
        assert torch.equal(method.discriminator.l1[0].module.weight_u, twin.l1[0].module.weight_u)

    def test_autocast_and_half_precision_are_computed_in_float32(self):
        student, teacher = (output(logits(n).bfloat16()) for n in "st")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = narrow()(batch_of(student, teacher))["adv"]
        assert found.dtype == torch.float32
        assert found.item() == narrow()(batch_of(output(logits("s").bfloat16().float()), teacher))["adv"].item()

    def test_small_logits_are_enlarged_on_request_only(self):
        small = [output(logits(n, 2, (45, 80))) for n in "st"]
        with pytest.raises(UserError, match="64x64 or more, got 45x80"):
            narrow()(batch_of(*small))
        method = narrow(upsample=True)
        enlarged = [output(nn.functional.interpolate(x.logits, (64, 80), mode="bilinear", align_corners=True))
                    for x in small]
        assert method(batch_of(*small))["adv"].item() == narrow()(batch_of(*enlarged))["adv"].item()
        method.after_step(0)
        assert method.diagnostics()["d_loss"].isfinite()


class TestDiscriminatorStep:
    @pytest.mark.parametrize("loss", ["hinge", "wgan-gp"])
    def test_equals_the_published_order(self, loss):
        """Student's term; then zero_grad, D(student), D(teacher), (D(mix)), backward, step: bit for bit."""
        method = narrow(loss=loss, d_weight=0.1)
        twin = copy.deepcopy(method.discriminator)
        adam = torch.optim.Adam(twin.parameters(), lr=4e-4, betas=(0.9, 0.99))
        for index in range(2):
            student, teacher = logits(f"student{index}"), logits(f"teacher{index}")
            step(method, index)
            twin(student)
            adam.zero_grad()
            scores = twin(student), twin(teacher)
            value = discriminator_loss(*scores, loss)
            if loss == "wgan-gp":
                share = torch.rand((2, 1, 1, 1), generator=torch.Generator().manual_seed(index))
                value = value + gradient_penalty(twin, student, teacher, share)
            (0.1 * value).backward()
            adam.step()
            assert method.diagnostics()["d_loss"].item() == value.item()
        for name, tensor in twin.state_dict().items():
            assert torch.equal(method.discriminator.state_dict()[name], tensor), name

    def test_it_learns_to_tell_them_apart(self):
        method = narrow(lr=4e-3)
        for _ in range(6):
            step(method, 0)
        found = method.diagnostics()
        assert found["score_teacher"] > found["score_student"] + 1

    def test_a_step_without_a_forward_pass_does_nothing(self):
        method = narrow()
        step(method, 0)
        before = copy.deepcopy(method.discriminator.state_dict())
        method.after_step(1)
        assert all(torch.equal(v, before[k]) for k, v in method.discriminator.state_dict().items())

    def test_two_processes_equal_one(self, tmp_path):
        """Gradients of the student and the discriminator's own training: those of one process with the whole batch."""
        done = launch_forked(str(ROOT / "tests/programs/discriminator.py"), [str(tmp_path / "two.pt")], 2)
        assert done.returncode == 0, done.stderr[-3000:]
        two = torch.load(tmp_path / "two.pt")
        one = {loss: discriminator.train(Distributed(0, 1, 0, torch.device("cpu")), loss) for loss in two}
        torch.testing.assert_close(two, one, rtol=1e-7, atol=1e-10)
        assert all(one[loss][f"body.weight {step}"].norm() > 1e-3 for loss in one for step in (0, 1))

    def test_it_belongs_to_neither_ddp_nor_the_students_optimizer(self):
        method = narrow()
        assert method.trained_parameters() == []
        assert method.unsynchronized() | {"_extra_state"} == set(method.state_dict())


class TestState:
    @pytest.mark.parametrize("loss", ["hinge", "wgan-gp"])
    def test_a_restored_run_is_the_same_run(self, loss):
        first = narrow(loss=loss)
        step(first, 0)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second = narrow(seed=9, loss=loss)
        second.load_state_dict(torch.load(file, weights_only=True))
        assert [step(second, i) for i in (1, 2)] == [step(first, i) for i in (1, 2)]

    def test_the_loaded_state_is_not_shared(self):
        first, second = narrow(), narrow(seed=9)
        step(first, 0)
        state = first.state_dict()
        second.load_state_dict(state)
        moment = state["_extra_state"]["state"][0]["exp_avg"].clone()
        step(second, 1)
        assert torch.equal(first.optimizer.state_dict()["state"][0]["exp_avg"], moment)

    def test_moments_follow_the_parameters(self):
        method = narrow()
        step(method, 0)
        method.double()
        for parameter, moments in method.optimizer.state.items():
            assert moments["exp_avg"].dtype == moments["exp_avg_sq"].dtype == parameter.dtype == torch.float64
            assert moments["step"].item() == 1
        step(method, 1)

    def test_the_learning_rate_is_that_of_the_options(self):
        state = narrow(lr=1e-2).state_dict()
        method = narrow(lr=1e-3)
        method.load_state_dict(state)
        assert method.optimizer.param_groups[0]["lr"] == 1e-3


def build(*flags: str, crop=(512, 512), net=NET, **options) -> Adversarial:
    return make("adv", NET, net, *flags, crop=crop, **options)


def test_method_and_options():
    assert methods()["adv"] is Adversarial
    method = build()
    o = method.options
    assert (o.adv_d_weight, o.adv_lr, o.adv_loss, o.adv_upsample) == (0.1, 4e-4, "hinge", False)
    group = method.optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (4e-4, (0.9, 0.99), 0)
    o = build("--adv-d-weight", "0.5", "--adv_lr", "1e-3", "--adv-loss", "wgan-gp").options
    assert (o.adv_d_weight, o.adv_lr, o.adv_loss) == (0.5, 1e-3, "wgan-gp")


def test_preset():
    assert {k: v for k, v in preset("adv", "citys", "resnet18").items() if v} == {"lambda_kd": 1.0, "lambda_adv": 0.001}


@pytest.mark.parametrize("crop", [(360, 360), (504, 1024)])
def test_small_crops_are_refused_before_training(crop):
    wanted = rf"crops of {crop[0]}x{crop[1]} give .*: use crops of 512x512 or more"
    with pytest.raises(UserError, match=wanted) as refused:
        build(crop=crop)
    assert refused.value.settings == ("crop_size", "lambda_adv", "adv_upsample")
    assert build("--adv-upsample", crop=crop).options.adv_upsample
    assert build(crop=(505, 1024)) is not None  # ceil(505 / 8) = 64


def test_errors_name_what_is_wrong():
    with pytest.raises(UserError, match=r"adv.*\(2, 3, 64, 64\).*\(2, 3, 64, 65\)"):
        narrow()(batch_of(output(logits("s")), output(logits("t", 2, (64, 65)))))
    with pytest.raises(UserError, match="adv loss 'relative': expected one of hinge, wgan-gp"):
        narrow(loss="relative")
    with pytest.raises(UserError, match="logits 3 of the student net and 4 of the teacher other"):
        build(net=NetInfo("other", {"logits": 4}, 4))
