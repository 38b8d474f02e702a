"""Every faster form of the training step against its plain twin, and what half precision and parts do."""
from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    ROOT,
    STEM,
    assert_refused,
    distil_arguments,
    launch_forked,
    records,
    train_arguments,
    write_folder_dataset,
    write_teacher,
)
from torch import nn

import train_kd
from engine import ready
from engine.build import build_objective, build_run
from engine.optimizer import build_optimizer, load_optimizer
from engine.run import train_batch, training_batches
from engine.settings import Settings, parse_settings
from engine.step import StepResult, TrainStep
from losses.core.objective import Objective
from models import get_segmentation_model
from models.prepare import to_channels_last
from utils.distributed import init_distributed
from utils.flops import FlopCounter, peak_flops
from utils.tensor_files import in_plain_order

CLASSES, CROP = 5, 64


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_folder_dataset(tmp_path_factory.mktemp("data") / "set", val=1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth")


def parse(*more: str) -> Settings:
    return parse_settings(["--teacher-pretrained", "x", "--student-model", "deeplabv3", "--student-backbone",
                           "resnet18_w0.125", "--crop-size", str(CROP), "--pool-size", "2", *more])


def step_of(*more: str, dtype: torch.dtype = torch.float64, frozen_norm: bool = False, parts: int = 1,
            laid_out: bool = False, amp: torch.dtype | None = None,
            wrap: Callable[[Objective], nn.Module] = lambda objective: objective) -> TrainStep:
    """Af-DCD (or what ``more`` says) on small networks with the same weights each time.

    frozen_norm: batch norm and dropout as in evaluation. laid_out: in channels-last order. wrap: makes the model."""
    settings = parse("--lr", "0.001", *more)
    torch.manual_seed(0)
    nets = [get_segmentation_model("deeplabv3", f"resnet18_w{w}", CLASSES) for w in (0.25, 0.125)]
    objective = build_objective(settings, nets[1], nets[0]).to(dtype).train()
    of_teacher = nets[0].to(dtype).eval().requires_grad_(False)
    for module in objective.modules() if frozen_norm else ():
        if isinstance(module, (nn.BatchNorm2d, nn.Dropout)):
            module.eval()
    for module in (objective, of_teacher) if laid_out else ():
        to_channels_last(module)
    return TrainStep(wrap(objective), of_teacher, build_optimizer(settings, objective), lr=1e-3, max_iterations=9,
                     amp=amp, parts=parts)


def batch(images: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and labels of which a share that differs from image to image is missing."""
    generator = torch.Generator().manual_seed(seed)
    x = 50 * torch.randn(images, 3, CROP, CROP, generator=generator, dtype=torch.float64)
    target = torch.randint(0, CLASSES, (images, CROP, CROP), generator=generator)
    share = torch.linspace(0.1, 0.8, images)[:, None, None]
    return x.to(dtype), target.masked_fill(torch.rand(target.shape, generator=generator) < share, -1)


def train(step_fn: TrainStep, steps: int = 1, dtype: torch.dtype = torch.float64) -> list[StepResult]:
    results = []
    for i in range(steps):
        images, target = batch(dtype=dtype, seed=i)
        results.append(step_fn(images, images, target, i))
    return results


def weights(step_fn: TrainStep) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in step_fn.objective.named_parameters()}


def gradients(step_fn: TrainStep) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in step_fn.objective.named_parameters()}


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], within: float = 1e-9) -> None:
    """Equal relative to the largest value of each tensor, or of all where that one is close to 0."""
    assert found.keys() == wanted.keys()
    floor = 1e-3 * max(float(v.abs().max()) for v in wanted.values())
    for name, value in wanted.items():
        assert float((found[name] - value).abs().max()) <= within * max(float(value.abs().max()), floor), name


class TestEquality:
    def test_the_fused_update_is_the_plain_one(self) -> None:
        fused, plain = step_of(), step_of("--no-fast")
        assert fused.optimizer.param_groups[0]["fused"] and not plain.optimizer.param_groups[0]["fused"]
        train(fused, 3), train(plain, 3)
        assert_close(weights(fused), weights(plain))

    def test_channels_last_computes_the_same(self) -> None:
        found, wanted = step_of(laid_out=True), step_of()
        a, b = train(found)[0], train(wanted)[0]
        assert {k: v.item() for k, v in a.terms.items()} == pytest.approx({k: v.item() for k, v in b.terms.items()},
                                                                          rel=1e-9)
        assert_close(gradients(found), gradients(wanted), 1e-8)
        momentum = found.optimizer.state[found.objective.student.pretrained.conv2.weight]["momentum_buffer"]
        assert momentum.is_contiguous(memory_format=torch.channels_last)

    def test_counting_operations_changes_nothing(self) -> None:
        found, wanted = step_of(dtype=torch.float32), step_of(dtype=torch.float32)
        wanted.counts_flops = False
        train(found, 2, torch.float32), train(wanted, 2, torch.float32)
        assert wanted.flops is None and found.flops > 1e8
        assert all(torch.equal(value, weights(wanted)[name]) for name, value in weights(found).items())

    @pytest.mark.parametrize("flags", [["--method", "none"], []], ids=["cross entropy", "afdcd"])
    def test_parts_of_a_batch_have_the_gradient_of_the_whole(self, flags) -> None:
        flags = [*flags, "--batch-size", "4"]
        whole, parts = step_of(*flags, frozen_norm=True), step_of(*flags, frozen_norm=True, parts=2)
        a, b = train(whole)[0], train(parts)[0]
        assert_close({**b.terms, **b.weighted, "total": b.total}, {**a.terms, **a.weighted, "total": a.total})
        assert_close(gradients(parts), gradients(whole))
        assert_close(weights(parts), weights(whole))


    def test_parts_of_a_batch_and_fewer_bits_in_two_processes(self) -> None:
        done = launch_forked(str(ROOT / "tests" / "programs" / "exchange_gradients.py"), [])
        assert done.returncode == 0, done.stderr[-3000:]


class TestOptimizerState:
    @pytest.mark.parametrize(("first", "then"), [((), ("--no-fast",)), (("--no-fast",), ())], ids=["off", "on"])
    def test_a_state_goes_on_with_the_other_update(self, first, then) -> None:
        """In channels-last order, from the plain order of the files."""
        whole, changed = (step_of(*first, laid_out=True) for _ in range(2))
        train(whole, 2), train(changed, 2)
        state = in_plain_order(copy.deepcopy(changed.optimizer.state_dict()))
        assert all(v["momentum_buffer"].is_contiguous() for v in state["state"].values())
        other = build_optimizer(parse(*then), changed.objective)
        load_optimizer(other, state)
        assert bool(other.param_groups[0]["fused"]) == (then == ())
        changed.optimizer = other
        images, target = batch(seed=2)
        for step_fn in (whole, changed):
            step_fn(images, images, target, 2)
        assert_close(weights(changed), weights(whole))


class TestHalfPrecision:
    @pytest.mark.parametrize(("amp", "within"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
    def test_losses_stay_float32_and_come_close(self, amp, within) -> None:
        half, full = (step_of(dtype=torch.float32, amp=a) for a in (amp, None))
        a, b = (train(f, dtype=torch.float32)[0] for f in (half, full))
        assert all(v.dtype == torch.float32 for v in (*a.terms.values(), *weights(half).values()))
        found, wanted = ({k: v.item() for k, v in r.terms.items()} for r in (a, b))
        assert found != wanted and found == pytest.approx(wanted, rel=within)

    def test_a_step_that_overflows_is_skipped_and_the_scale_halved(self) -> None:
        step_fn = step_of(dtype=torch.float32, amp=torch.float16)
        step_fn.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 40)
        before = weights(step_fn)
        train(step_fn, dtype=torch.float32)
        assert step_fn.find_fault() is None
        assert all(torch.equal(value, before[name]) for name, value in weights(step_fn).items())
        assert step_fn.scaler.get_scale() == 2.0 ** 39
        step_fn.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 4)
        train(step_fn, dtype=torch.float32)
        assert step_fn.find_fault() is None
        moved = [name for name, value in weights(step_fn).items() if not torch.equal(value, before[name])]
        assert len(moved) == len(before)

    @pytest.mark.parametrize("amp", ["bf16", "fp16"])
    def test_a_resumed_run_ends_with_the_same_weights(self, data, teacher, tmp_path, monkeypatch, amp) -> None:
        flags = ["--amp", amp, "--max-iterations", "2", "--save-per-iters", "1", "--skip-val", "--batch-size", "2"]
        whole, resumed = (train_arguments(data, tmp_path / name, *distil_arguments(teacher), *flags)
                          for name in ("whole", "resumed"))
        save = train_kd.save_run

        def also_for_later(run) -> None:
            save(run)
            if run.step == 1:  # what a run that dies here leaves behind
                shutil.copytree(tmp_path / "whole", tmp_path / "resumed")

        with monkeypatch.context() as patch:
            patch.setattr(train_kd, "save_run", also_for_later)
            assert train_kd.main(whole) == 0
        assert train_kd.main([*resumed, "--resume", "auto"]) == 0
        states = [torch.load(tmp_path / name / f"{STEM}_state.pth", weights_only=True) for name in ("whole", "resumed")]
        assert states[0]["scaler"] == states[1]["scaler"]
        assert states[0]["scaler"].get("scale", 0.0) < 2.0 ** 16, "the first steps of fp16 overflow"
        for part in ("model", "distillers"):
            assert states[0][part].keys() == states[1][part].keys()
            assert all(torch.equal(value, states[1][part][name]) for name, value in states[0][part].items())


class TestFiles:
    def test_states_and_weights_have_the_plain_order(self, data, teacher, tmp_path) -> None:
        argv = train_arguments(data, tmp_path, *distil_arguments(teacher), "--max-iterations", "1", "--channels-last")
        assert train_kd.main(argv) == 0
        state = torch.load(tmp_path / f"{STEM}_state.pth", weights_only=True)
        tensors = [*state["model"].values(), *state["distillers"].values(),
                   *(v["momentum_buffer"] for v in state["optimizer"]["state"].values()),
                   *torch.load(tmp_path / f"{STEM}.pth", weights_only=True).values()]
        assert all(t.is_contiguous() for t in tensors) and any(t.ndim == 4 and t.shape[2] == 3 for t in tensors)


class TestCompile:
    def test_both_networks_are_compiled_and_names_stay(self, data, teacher, tmp_path, monkeypatch) -> None:
        compiled, called = [], []

        def recording(function):
            compiled.append(function.__name__)
            return lambda *args: called.append(function.__name__) or function(*args)

        monkeypatch.setattr(torch, "compile", recording)
        argv = train_arguments(data, tmp_path, *distil_arguments(teacher), "--compile")
        run = build_run(parse_settings(argv), init_distributed(True))
        before = list(run.objective.state_dict())
        ready.get_ready(run)
        train_batch(run, next(iter(training_batches(run))))
        assert compiled[1:] == ["run_student", "forward"] and called[1:] == ["forward", "run_student"]
        assert list(run.objective.state_dict()) == before and run.step_fn.flops is None

    def test_without_a_compiler_it_says_so(self, monkeypatch) -> None:
        def broken(function):
            def call(*_):
                raise RuntimeError("no g++ found\nmore")
            return call

        monkeypatch.setattr(torch, "compile", broken)
        with pytest.raises(Exception, match=r"--compile: .* C\+\+ compiler.*no g\+\+ found\)$"):
            ready.check_compiler(torch.device("cpu"))


class TestRefusals:
    @pytest.mark.parametrize(("flags", "words"), [
        (("--grad-accumulation", "3"), ("--grad-accumulation 3", "4 images")),
        (("--grad-accumulation", "4"), ("one image per batch norm", "--grad-accumulation")),
        (("--grad-accumulation", "2", "--group-size", "0"), ("--grad-accumulation 2", "--group-size")),
        (("--grad-accumulation", "2", "--group-size", "4"), ("--grad-accumulation 2", "multiple of --group-size 4")),
        (("--grad-accumulation", "2", "--method", "cirkd", "--crop-size", "128"), ("--grad-accumulation 2", "cirkd")),
        (("--grad-accumulation", "2", "--lambda-adv", "1", "--adv-upsample"), ("--grad-accumulation 2", "adv")),
        (("--amp", "int8"), ("--amp", "bf16")), (("--ddp-compression", "fp8"), ("--ddp-compression",))])
    def test_one_line(self, data, teacher, tmp_path, capsys, flags, words) -> None:
        argv = train_arguments(data, tmp_path / "run", *distil_arguments(teacher), *flags)
        assert_refused(capsys, train_kd.main, argv, *words)


class TestTeacher:
    def test_the_run_prepares_it_for_what_its_methods_read(self, data, teacher, tmp_path) -> None:
        argv = train_arguments(data, tmp_path, *distil_arguments(teacher, "--lambda-kd", "0"), "--amp", "bf16")
        run = build_run(parse_settings(argv), init_distributed(True))
        ready.get_ready(run)
        assert set(run.teacher.channels) == {"c4"} and run.step_fn.teacher is run.teacher
        output = run.teacher(torch.zeros(2, 3, 64, 64))
        assert output.logits is None and output.c4.dtype == torch.bfloat16

    @pytest.mark.parametrize(("flags", "dtype"), [
        (("--teacher-precision", "bf16"), torch.float32), (("--amp", "bf16", "--teacher-precision", "float32"),
                                                          torch.float32), (("--no-fast",), torch.float32)])
    def test_its_precision(self, data, teacher, tmp_path, flags, dtype) -> None:
        run = build_run(parse_settings(train_arguments(data, tmp_path, *distil_arguments(teacher), *flags)),
                        init_distributed(True))
        plain = copy.deepcopy(run.teacher)
        ready.get_ready(run)
        x = 50 * torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        found, wanted = run.teacher(x).c4, plain(x).c4
        assert found.dtype == dtype
        error = float((found - wanted).norm() / wanted.norm())
        assert error == 0 if "--no-fast" in flags else error < (0.05 if flags[0] != "--amp" else 1e-5)


class TestSpeedInTheLog:
    @pytest.mark.parametrize("groups", [1, 2, 4])
    def test_operations_of_a_convolution(self, groups) -> None:
        conv = nn.Conv2d(4, 8, 3, padding=1, groups=groups, bias=False)
        with FlopCounter() as counter:
            conv(torch.zeros(2, 4, 10, 10, requires_grad=True)).sum().backward()
        # forward, gradients of images and of weights
        assert counter.total == 3 * 2 * (2 * 10 * 10) * 8 * (4 // groups) * 9

    def test_the_share_of_the_peak(self, data, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr("engine.journal.peak_flops", lambda device, dtype: 1e12)
        monkeypatch.setattr("engine.journal.LONG_RUN", 1)
        assert train_kd.main(train_arguments(data, tmp_path, "--method", "none", "--max-iterations", "2",
                                             "--skip-val")) == 0
        for record in records(tmp_path):
            assert record["tflops"] > 0 and record["utilization"] == pytest.approx(record["tflops"], abs=1e-4)
        (text,) = (tmp_path / "logs").glob("*_log.txt")
        assert "TFLOP/s (" in text.read_text() and "% of peak)" in text.read_text()

    def test_peaks_of_known_devices(self, monkeypatch) -> None:
        cuda = torch.device("cuda")
        for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
                           ("NVIDIA A100-SXM4-80GB", 312e12), ("another", None)):
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
            assert peak_flops(cuda, torch.bfloat16) == peak
        assert math.isfinite(peak_flops(torch.device("cpu"), torch.float32)) and peak_flops(
            torch.device("cpu"), torch.float32) > 1e8

    def test_peak_of_a_cpu_does_not_count_the_time_of_other_processes(self, monkeypatch) -> None:
        monkeypatch.setattr("utils.flops.time", SimpleNamespace(
            perf_counter=iter((0.0, 0.0, 1.0)).__next__, thread_time=iter((5.0, 5.25)).__next__))
        assert peak_flops(torch.device("cpu"), torch.float32) == 2 * 9 * (256 * 64) ** 2 / 0.25
