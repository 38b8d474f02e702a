"""Training and evaluation on a GPU that is not there: every tensor on its device, and no step makes the host wait.

``utils/simulated_gpu.py`` says what is found. Stages before training are run for two steps, without their files.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers import write_folder_dataset
from method_cases import (
    CLASSES,
    RUN_STUDENT,
    RUN_TEACHER,
    STUDENT,
    TEACHER,
    as_flags,
    build,
    images_like,
    outputs,
)
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.nn import functional as F

import losses.attnfd
import losses.lad
import losses.stages.tokens
from engine.build import build_run
from engine.evaluate import predict
from engine.ready import get_ready
from engine.run import Run, run_stages, train_batch
from engine.settings import parse_settings
from losses.core import Batch, methods
from losses.kd import KD
from models import get_segmentation_model
from models.preprocess import _per_channel
from utils.distributed import Distributed
from utils.score import SegmentationMetric
from utils.simulated_gpu import HostWait, NoHostWaits, WrongDevice, simulated_gpu

NAMES = list(methods())
CROP = (512, 512)  # enough for every method; without values the size costs nothing


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_folder_dataset(tmp_path_factory.mktemp("data") / "folder", train=2, val=1, size=(64, 64))


@pytest.fixture
def gpu(monkeypatch) -> Iterator[torch.device]:
    """The simulated device. Weights are not read: there is nothing to put them into, and no value to make a digest of.
    """
    monkeypatch.setattr("models.registry.load_weights", lambda *args, **kwargs: None)
    monkeypatch.setattr("models.registry._open_own", lambda *args: None)
    monkeypatch.setattr("engine.build.weights_digest", lambda tensors: "")
    _per_channel.cache_clear()
    with simulated_gpu() as device:
        yield device
    _per_channel.cache_clear()


def loader_batch(size: int, crop: tuple[int, int] = CROP) -> dict[str, torch.Tensor]:
    """What the loader delivers, on the CPU."""
    return {"image": torch.zeros((size, 3, *crop), dtype=torch.uint8),
            "valid": torch.zeros((size, 4), dtype=torch.int32), "label": torch.zeros((size, *crop), dtype=torch.int16)}


def strict_stage(stage, state, net, settings, role="teacher") -> None:
    """In place of ``run_stage``: steps without digest, files and log, which read values and are not part of a step."""
    for done, (images, target) in enumerate(stage.batches(settings.steps, settings.batch_size, 0, role)):
        with NoHostWaits():
            state.learn(images, target, done)


def small_run(data: Path, folder: Path, device: torch.device, monkeypatch, name: str, *flags: str) -> Run:
    """The run of a method as the program builds it, after its stages, with the constants of preprocessing in place."""
    settings = parse_settings([
        "--method", name, "--dataset", "folder", "--data", str(data), "--crop-size", *map(str, CROP),
        "--batch-size", "2", "--student-model", RUN_STUDENT[0], "--student-backbone", RUN_STUDENT[1],
        "--teacher-model", RUN_TEACHER[0], "--teacher-backbone", RUN_TEACHER[1], "--teacher-pretrained", "teacher.pth",
        "--skip-val", "--no-tensorboard",
        "--save-dir", str(folder), "--log-dir", str(folder), *as_flags(methods()[name].trial), *flags])
    run = build_run(settings, Distributed(0, 1, 0, device))
    for module in (losses.attnfd, losses.lad, losses.stages.tokens):
        monkeypatch.setattr(module, "run_stage", strict_stage)
    monkeypatch.setattr("engine.run.build_loader", lambda run, start, steps, size: [
        loader_batch(size) for _ in range(start, steps)])
    run.student.preprocess(loader_batch(1)["image"].to(device))
    run.model.train()
    run_stages(run)
    get_ready(run)
    return run


def strict_step(run: Run) -> dict[str, torch.Tensor]:
    """One iteration; the terms."""
    with NoHostWaits():
        return train_batch(run, loader_batch(2)).terms


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_step_in_half_precision(name, data, tmp_path, gpu, monkeypatch) -> None:
    run = small_run(data, tmp_path, gpu, monkeypatch, name, "--amp", "bf16")
    terms = strict_step(run)
    assert {t for t in run.settings.active if t in terms} and all(v.device == gpu for v in terms.values())
    assert all(v.dtype == torch.float32 for v in terms.values())


@pytest.mark.parametrize("flags", [(), ("--no-fast",)], ids=["fast", "plain"])
def test_a_whole_step_in_full_precision(flags, data, tmp_path, gpu, monkeypatch) -> None:
    terms = strict_step(small_run(data, tmp_path, gpu, monkeypatch, "afdcd", *flags))
    assert all(v.device == gpu for v in terms.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_plain_twin_of_every_method(name, gpu) -> None:
    distiller = build(name, CROP, flags=("--no-fast",)).to(gpu)
    target = loader_batch(2)["label"].to(gpu).long()
    for step, precision in enumerate((nullcontext(), torch.autocast("cuda", torch.bfloat16))):
        student, teacher = (outputs(i, CROP, device=gpu) for i in (STUDENT, TEACHER))
        batch = Batch(student, teacher, target, images_like(student, target), step)
        with NoHostWaits(), precision:
            sum(distiller(batch, torch.Generator(gpu)).values()).backward()
            distiller.after_step(step)


def test_autocast_casts_as_on_a_gpu(gpu) -> None:
    conv, x = torch.nn.Conv2d(3, 4, 3).to(gpu), torch.rand(2, 3, 8, 8, device=gpu)
    with torch.autocast("cuda", torch.bfloat16):
        y = conv(x)
        half, full = y @ y, [y.softmax(1), y.sum(), y.square().mean().exp(), F.cross_entropy(y, y[:, 0].long())]
        with torch.autocast("cuda", enabled=False):
            assert conv(x).dtype == torch.float32
    assert y.dtype == half.dtype == torch.bfloat16 and {z.dtype for z in full} == {torch.float32}
    y.sum().backward()
    assert conv.weight.grad.dtype == torch.float32 and conv(x).dtype == torch.float32


class TestWhatIsFound:
    @pytest.mark.parametrize(("fault", "error"), [
        (lambda x: x.mean().item(), DataDependentOutputException),
        (lambda x: 1.0 if x.mean() > 0 else 2.0, DataDependentOutputException),
        (lambda x: x.mean().tolist(), DataDependentOutputException),
        (lambda x: x[x > 0], DynamicOutputShapeException),
        (lambda x: x.nonzero(), DynamicOutputShapeException),
        (lambda x: x.unique(), DynamicOutputShapeException),
        (lambda x: torch.bincount(x.long().flatten(), minlength=9), DynamicOutputShapeException),
        (lambda x: x.cpu(), HostWait),
        (lambda x: torch.zeros(2, 3).copy_(x), HostWait),
        (lambda x: torch.tensor([2.0], device=x.device), HostWait),
        (lambda x: torch.zeros(2, 3).to(x.device), HostWait),
        (lambda x: torch.empty_like(x).copy_(torch.zeros(2, 3)), HostWait),
        (lambda x: x.index_put((x > 0,), x.mean()), HostWait),
        (lambda x: x + torch.ones(2, 3), WrongDevice),
        (lambda x: x[torch.arange(2)], WrongDevice),
        (lambda x: torch.rand(1, device=x.device, generator=torch.Generator()), WrongDevice),
        (lambda x: torch.rand(1, generator=torch.Generator(x.device)), WrongDevice),
    ], ids=["item", "branch", "tolist", "mask", "nonzero", "unique", "bincount", "to-host", "copy-to-host", "constant",
            "from-host", "copy-from-host", "write-mask", "cpu-tensor", "cpu-index", "cpu-generator", "gpu-generator"])
    def test_a_fault(self, fault, error, gpu) -> None:
        x = torch.rand(2, 3, device=gpu)
        with NoHostWaits(), pytest.raises(error):
            fault(x)

    def test_the_harmless_is_let_through(self, gpu) -> None:
        x = torch.rand(2, 3, device=gpu)
        with NoHostWaits():
            x = x + torch.tensor(2.0) + torch.zeros(2, 3).to(gpu, non_blocking=True)
            x[x > 1] = 0.0
            x[:, torch.arange(2, device=gpu)] = torch.rand(2, 2, device=gpu, generator=torch.Generator(gpu))
        assert x.is_cuda and not x.is_meta and x.device == gpu

    @pytest.mark.parametrize(("fault", "error"), [
        (lambda x: x.mean().item(), DataDependentOutputException), (lambda x: torch.ones(1), WrongDevice)],
        ids=["item", "cpu-tensor"])
    def test_a_step_of_a_faulty_method_is_refused(self, fault, error, data, tmp_path, gpu, monkeypatch) -> None:
        good = KD.forward
        monkeypatch.setattr(KD, "forward", lambda self, batch, generator=None: {
            name: value * fault(batch.student.logits) for name, value in good(self, batch).items()})
        run = small_run(data, tmp_path, gpu, monkeypatch, "kd")
        with pytest.raises(error):
            strict_step(run)

    def test_a_step_with_weights_left_on_the_host_is_refused(self, data, tmp_path, gpu, monkeypatch) -> None:
        run = small_run(data, tmp_path, gpu, monkeypatch, "fitnet")
        run.objective.distillers["fitnet"].to("cpu")
        with pytest.raises(WrongDevice):
            strict_step(run)


class TestEvaluation:
    @pytest.mark.parametrize("options", [{}, {"scales": (0.5, 1.0), "flip": True}, {"window": (32, 32)}],
                             ids=["plain", "scales", "window"])
    def test_predict(self, options, gpu) -> None:
        net = get_segmentation_model(*RUN_STUDENT, num_class=CLASSES, preprocess="rgb").to(gpu).eval()
        image, valid = (x.to(gpu) for x in (loader_batch(1, (48, 64))[k] for k in ("image", "valid")))
        net.preprocess(image)
        with NoHostWaits(), torch.no_grad():
            logits = predict(net, image, valid, **options)
        assert logits.device == gpu and logits.shape == (1, CLASSES, 48, 64)

    def test_the_counts(self, gpu) -> None:
        metric = SegmentationMetric(CLASSES).to(gpu)
        logits, label = torch.rand(1, CLASSES, 8, 8, device=gpu), torch.zeros((1, 8, 8), dtype=torch.int64, device=gpu)
        with NoHostWaits():
            metric.update(logits, label)
