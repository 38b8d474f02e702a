"""LAD: the label channel, the widened network, the teacher's stage, the method, whole runs."""
from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import (
    STUDENT,
    assert_refused,
    launch_forked,
    records,
    train_arguments,
    write_folder_dataset,
    write_teacher,
)
from method_cases import CLASSES, RUN_STUDENT, build, images_like, labels, outputs, preparation, run, settings_of
from method_cases import STUDENT as SMALL
from torch import nn

import train_kd
from losses.core import NetInfo
from losses.core.task import SegCrossEntropyLoss
from losses.cwd import cwd_loss
from losses.lad import LAD, NOISE
from losses.stages.label_assisted import (
    TeacherRecipe,
    TeacherState,
    channel_scale,
    fixed_codes,
    random_codes,
    teacher_losses,
    with_labels,
)
from losses.stages.stage import StageSettings
from models import get_segmentation_model
from models.heads import resize
from models.preprocess import CAFFE_BGR, IMAGENET_RGB
from models.segmentation import add_input_channels
from models.weights import read_state_dict, save_state_dict
from utils.errors import UserError
from utils.randomness import seed_everything, step_generator

CROP = (64, 64)


def small_net(seed: int = 0, preprocess: str = "bgr") -> nn.Module:
    torch.manual_seed(seed)
    return get_segmentation_model(model="psp", backbone="resnet18_w0.125", num_class=CLASSES, preprocess=preprocess)


class TestLabelChannel:
    def test_every_pixel_has_the_code_of_its_class(self) -> None:
        target = torch.tensor([[[0, 2], [-1, 1]], [[1, 1], [0, -1]]])
        images = torch.randn(2, 3, 2, 2)
        codes = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
        found = with_labels(images, target, codes, 0.0, 10.0)
        assert found[:, :3].equal(images)
        assert found[:, 3].tolist() == [[[10, 30], [40, 20]], [[60, 60], [50, 80]]]
        same = with_labels(images, target, codes[0], 0.0, 10.0)
        assert same[1, 3].tolist() == [[20, 20], [10, 40]]
        other = with_labels(images, torch.where(target < 0, 255, target), codes, 0.0, 10.0, ignore_label=255)
        assert other.equal(found)

    def test_the_noise_is_normal_and_comes_from_the_generator(self) -> None:
        target = torch.zeros(1, 200, 200, dtype=torch.int64)
        drawn = [with_labels(torch.zeros(1, 3, 200, 200), target, torch.zeros(3), 0.03, 100.0,
                             generator=torch.Generator().manual_seed(seed))[0, 3] for seed in (1, 1, 2)]
        assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])
        assert drawn[0].std().item() == pytest.approx(3.0, rel=0.05)
        assert drawn[0].mean().item() == pytest.approx(0.0, abs=0.1)

    def test_codes(self) -> None:
        torch.testing.assert_close(fixed_codes(21), (torch.arange(22) - 11) / 10)
        many = fixed_codes(150)
        assert many.shape == (151,) and many.abs().max() <= 2 and (many.diff() > NOISE).all()
        drawn = random_codes(500, 20, torch.Generator().manual_seed(0), torch.device("cpu"))
        assert drawn.shape == (500, 21) and drawn.std().item() == pytest.approx(1, rel=0.05)

    def test_the_scale_is_in_units_of_the_input(self) -> None:
        assert channel_scale(CAFFE_BGR) == 100
        assert channel_scale(IMAGENET_RGB) == pytest.approx(100 / 255 / 0.226, rel=1e-3)


class TestWidenedNetwork:
    @pytest.mark.parametrize("name", [("psp", "resnet18_w0.125"), ("deeplabv3", "resnet50_original_w0.125"),
                                      ("deeplab_mobile", "mobilenetv2_w0.25")])
    def test_zeros_in_the_new_channel_leave_the_output_as_it_was(self, name) -> None:
        """So a student with a fourth channel of zeros, as released, is one with three."""
        net = get_segmentation_model(model=name[0], backbone=name[1], num_class=3).eval()
        images = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            before = net(images)
            add_input_channels(net, 1)
            after = net(torch.cat([images, torch.zeros(1, 1, 64, 64)], dim=1))
            shown = net(torch.cat([images, torch.randn(1, 1, 64, 64)], dim=1))
        torch.testing.assert_close(after.logits, before.logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(shown.c1, before.c1, rtol=1e-2)
        with pytest.raises(UserError, match=r"\[B, 4, H, W\].*\[1, 3, 64, 64\]"):
            net(images)


class TestTeacherStage:
    def test_losses_are_those_of_the_formula(self) -> None:
        one, two = (outputs(SMALL, CROP, seed=seed, dtype=torch.float64) for seed in (1, 2))
        target = labels(CROP)
        found = teacher_losses(one, two, target)
        entropy = SegCrossEntropyLoss()
        assert found["task"].item() == pytest.approx((entropy(one.logits, target) + entropy(two.logits, target)).item())
        assert found["aux"].item() == pytest.approx((entropy(one.aux, target) + entropy(two.aux, target)).item())
        expected = 0.0
        for ours, theirs in ((one, two), (two, one)):
            q, p = ((z.logits / 4).flatten(2).softmax(2) for z in (ours, theirs))
            expected += 16 * (p * (p / q).log()).sum().item() / (2 * CLASSES)
        assert found["consistency"].item() == pytest.approx(expected, rel=1e-10)

    def test_each_path_is_the_other_ones_constant(self) -> None:
        one, two = (outputs(SMALL, CROP, seed=seed, dtype=torch.float64) for seed in (1, 2))
        teacher_losses(one, two, labels(CROP))["consistency"].backward()
        fixed = two.logits.detach()
        (alone,) = torch.autograd.grad(cwd_loss(one.logits, fixed), one.logits)
        torch.testing.assert_close(one.logits.grad, alone)

    def test_a_step_is_sgd_on_two_independent_label_channels(self) -> None:
        recipe = TeacherRecipe(momentum=0.9, weight_decay=1e-3, power=0.9)
        state = TeacherState(add_input_channels(small_net(), 1), StageSettings(3, 2, 0.01, True, method="lad"), recipe)
        twin = add_input_channels(small_net(), 1).train()
        twin.load_state_dict(state.module.state_dict())
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)
        for step in range(3):
            target = labels(CROP, seed=step)
            images = images_like(outputs(SMALL, CROP), target, step)
            state.learn(images, target, step)
            seed_everything(0, "lad stage", step, 0)
            generator = step_generator(torch.device("cpu"), 0, "lad stage noise", step, 0)
            inputs = [with_labels(images, target, torch.randn(2, CLASSES + 1, generator=generator), 0.03, 100.0,
                                  generator=generator) for _ in range(2)]
            assert not inputs[0].equal(inputs[1])
            terms = teacher_losses(*map(twin, inputs), target)
            optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 3) ** 0.9
            optimizer.zero_grad()
            (terms["task"] + 0.4 * terms["aux"] + 5 * terms["consistency"]).backward()
            optimizer.step()
        assert int(state.step) == 3
        for name, value in twin.state_dict().items():
            torch.testing.assert_close(state.module.state_dict()[name], value, rtol=1e-5, atol=1e-7)


class Batches:
    """Batches of labelled colours that are a function of the step (or the same one); raises at a chosen step."""

    def __init__(self, dies_at: int | None = None, same: bool = False) -> None:
        self.dies_at, self.same, self.roles = dies_at, same, []

    def __call__(self, steps: int, batch_size: int, start: int, role: str):
        for step in range(start, steps):
            if step == self.dies_at:
                raise KeyboardInterrupt
            self.roles.append(role)
            target = labels(CROP, batch_size, seed=0 if self.same else step)
            colours = torch.linspace(-80, 80, CLASSES)[target.clamp(min=0)][:, None].expand(-1, 3, -1, -1)
            yield colours + 20 * images_like(outputs(SMALL, CROP), target, 0 if self.same else step) / 50, target


def prepared(folder, batches=None, steps: int = 4, *flags: str) -> tuple[LAD, list[str]]:
    lines: list[str] = []
    method = build("lad", CROP, flags=("--lad-steps", str(steps), "--save-per-iters", "2", "--lad-lr", "0.02", *flags))
    method.prepare(preparation(None, folder, batches or Batches(), lines.append))
    return method, lines


class TestStageRun:
    def test_the_loss_falls_and_the_network_is_frozen_again(self, tmp_path) -> None:
        method, lines = prepared(tmp_path, Batches(same=True), 24, "--lad-lr", "0.1")
        tasks = [float(line.split("task ")[1].split()[0]) for line in lines if "task " in line]
        assert sum(tasks[-5:]) < 0.8 * sum(tasks[:5])
        assert not method.network.training and not any(p.requires_grad for p in method.network.parameters())
        assert all(p.grad is None for p in method.network.parameters())
        assert method.trained_parameters() == [] and not method.train().network.training

    def test_a_killed_stage_goes_on_to_the_same_network(self, tmp_path) -> None:
        whole, _ = prepared(tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt):
            prepared(tmp_path / "cut", Batches(dies_at=3))
        rest = Batches()
        resumed, _ = prepared(tmp_path / "cut", rest)
        assert rest.roles == ["student"] * 2  # after the state of step 2
        for name, value in whole.state_dict().items():
            assert value.equal(resumed.state_dict()[name]), name
        assert not list((tmp_path / "cut").glob("*_partial*"))

    def test_the_cache_is_used_for_the_same_settings_only(self, tmp_path) -> None:
        first, lines = prepared(tmp_path)
        (saved,) = tmp_path.glob("lad_teacher_*.pth")
        assert str(saved) in lines[-1]
        none = Batches()
        again, _ = prepared(tmp_path, none)
        assert not none.roles
        for name, value in first.network.state_dict().items():
            assert value.equal(again.network.state_dict()[name]), name
        other = Batches()
        prepared(tmp_path, other, 4, "--weight-decay", "0.01")
        assert len(other.roles) == 4

    def test_its_file_serves_other_runs(self, tmp_path) -> None:
        first, _ = prepared(tmp_path)
        (saved,) = tmp_path.glob("lad_teacher_*.pth")
        none = Batches()
        again, _ = prepared(tmp_path / "other", none, 4, "--lad-teacher", str(saved))
        assert not none.roles and again.settings is None
        for name, value in first.network.state_dict().items():
            assert value.equal(again.network.state_dict()[name]), name

    def test_weights_that_do_not_fit_are_refused(self, tmp_path) -> None:
        save_state_dict(small_net(), tmp_path / "three.pth")
        with pytest.raises(UserError, match=r"three.pth: .*\[\d+, 3, 3, 3\].*wants \[\d+, 4, 3, 3\]"):
            build("lad", CROP, flags=("--lad-teacher", str(tmp_path / "three.pth")))
        save_state_dict(add_input_channels(small_net(preprocess="rgb"), 1), tmp_path / "rgb.pth")
        with pytest.raises(UserError, match="rgb.pth.*same kind"):
            build("lad", CROP, flags=("--lad-teacher", str(tmp_path / "rgb.pth")))
        student = NetInfo(SMALL.name, SMALL.channels, CLASSES, 8, IMAGENET_RGB)
        right = build("lad", CROP, student=student, flags=("--lad-teacher", str(tmp_path / "rgb.pth")))
        assert right.recipe.scale == pytest.approx(1.735, rel=1e-3)


class TestMethod:
    def test_the_loss_is_cwd_from_the_assisted_logits(self) -> None:
        method = build("lad", CROP)
        student, target = outputs(SMALL, CROP), labels(CROP)
        found = run(method, student, None, target)["lad"]
        images = images_like(student, target)
        with torch.no_grad():
            assisted = with_labels(images, target, fixed_codes(CLASSES), NOISE, 100.0,
                                   generator=torch.Generator().manual_seed(0))
            taught = method.network(assisted).logits
        assert found.item() == cwd_loss(student.logits, taught).item()
        right = (taught.argmax(1) == target[:, ::8, ::8]) & (target[:, ::8, ::8] >= 0)
        share = right.sum() / (target[:, ::8, ::8] >= 0).sum()
        assert method.diagnostics()["teacher_accuracy"].item() == pytest.approx(share.item(), abs=1e-6)

    def test_a_student_of_another_stride_is_resized(self) -> None:
        method, target = build("lad", CROP, student=replace(SMALL, stride=4)), labels(CROP)
        student = outputs(replace(SMALL, stride=4), CROP)
        found = run(method, student, None, target)["lad"]
        found.backward()
        assert student.logits.shape[2:] == (16, 16) and student.logits.grad.abs().sum() > 0
        fitted = student._replace(logits=resize(student.logits, torch.Size((8, 8))))
        assert found.item() == run(method, fitted, None, target)["lad"].item()

    def test_its_teacher_is_the_students_twin_unless_said_otherwise(self) -> None:
        made = build("lad", CROP)
        assert made.network.name == "-".join(RUN_STUDENT) and made.network.in_channels == 4
        other = build("lad", CROP, flags=("--lad-model", "deeplab_mobile", "--lad-backbone", "mobilenetv2_w0.25"))
        assert other.network.name == "deeplab_mobile-mobilenetv2_w0.25"
        settings = settings_of("lad", CROP)
        assert (settings.active, settings.networks.aux_weight) == ({"lad": 3.0}, 0.02)

    def test_it_starts_from_the_students_imagenet_weights_with_the_same_backbone_only(self, tmp_path) -> None:
        base = small_net(seed=5)
        torch.save(base.pretrained.state_dict(), tmp_path / "base.pth")
        flags = ("--student-pretrained-base", str(tmp_path / "base.pth"))
        stem = next(iter(base.pretrained.state_dict().values()))
        for more, loaded in (((), True), (("--lad-backbone", RUN_STUDENT[1]), True),
                             (("--lad-backbone", "resnet18_w0.25"), False)):
            made = next(iter(build("lad", CROP, flags=(*flags, *more)).network.pretrained.state_dict().values()))
            assert (made.shape[0] == stem.shape[0] and made[:, :3].equal(stem)) == loaded

    def test_the_scale_of_the_label_channel_is_restored(self) -> None:
        student = NetInfo(SMALL.name, SMALL.channels, CLASSES, 8, IMAGENET_RGB)
        rgb, resumed = build("lad", CROP, student=student), build("lad", CROP)
        assert resumed.scale.item() == 100
        resumed.load_state_dict(rgb.state_dict())
        assert resumed.scale.item() == pytest.approx(1.735, rel=1e-3)
        assert values_of(resumed) == values_of(rgb)


def values_of(method: LAD) -> float:
    return run(method, outputs(SMALL, CROP), None, labels(CROP))["lad"].item()


class TestRuns:
    def arguments(self, data, save, *more: str) -> list[str]:
        return train_arguments(data, save, "--method", "lad", "--lad-steps", "2", "--skip-val", "--save-per-iters", "1",
                               "--max-iterations", "2", *more)

    def test_a_run_needs_no_other_teacher_and_resumes_without_the_stage(self, tmp_path) -> None:
        data, save = write_folder_dataset(tmp_path / "set"), tmp_path / "run"
        assert train_kd.main(self.arguments(data, save)) == 0
        (cached,) = save.glob("lad_teacher_*.pth")
        (state,) = save.glob("*_state.pth")
        kept = {k.removeprefix("lad.network."): v for k, v in
                torch.load(state, weights_only=True)["distillers"].items() if k.startswith("lad.network.")}
        trained = read_state_dict(cached)
        assert kept.keys() == trained.keys() and all(v.equal(trained[k]) for k, v in kept.items())
        assert all("lad/teacher_accuracy" in r["diagnostics"] for r in records(save))
        cached.unlink()
        assert train_kd.main(self.arguments(data, save, "--max-iterations", "3", "--resume", "auto")) == 0
        assert not list(save.glob("lad_teacher_*.pth")) and len(records(save)) == 3

    def test_a_resumed_run_reads_none_of_the_files_that_its_teacher_came_from(self, tmp_path, capsys) -> None:
        data, save = write_folder_dataset(tmp_path / "set"), tmp_path / "run"
        given = tmp_path / "given.pth"
        save_state_dict(add_input_channels(get_segmentation_model(
            model="deeplab_mobile", backbone=STUDENT, num_class=CLASSES), 1), given)
        assert train_kd.main(self.arguments(data, save, "--lad-teacher", str(given))) == 0
        assert "no effect" in capsys.readouterr().out and not list(save.glob("lad_teacher_*"))
        given.unlink()
        assert train_kd.main(self.arguments(data, save, "--resume", "auto")) == 0
        assert "will differ" not in capsys.readouterr().out

    def test_a_teacher_that_nothing_reads_is_mentioned(self, tmp_path, capsys) -> None:
        data = write_folder_dataset(tmp_path / "set")
        teacher = write_teacher(tmp_path / "teacher.pth")
        assert train_kd.main(self.arguments(data, tmp_path / "run", "--teacher-pretrained", str(teacher))) == 0
        assert "no method of this run reads that teacher: --teacher-pretrained" in capsys.readouterr().out
        logging.getLogger("afdcd").handlers.clear()

    def test_together_with_a_method_that_reads_a_teacher_it_needs_one(self, tmp_path, capsys) -> None:
        data = write_folder_dataset(tmp_path / "set")
        assert_refused(capsys, train_kd.main, self.arguments(data, tmp_path / "run", "--lambda-kd", "1"),
                       "--teacher-pretrained is missing")

    def test_two_processes_train_the_teacher_of_one(self, tmp_path) -> None:
        """In float64, without dropout and noise, with codes that do not depend on the process, unevenly labelled."""
        data = write_folder_dataset(tmp_path / "set", ignored=0.8)
        found = []
        for count in (1, 2):
            save = tmp_path / f"processes{count}"
            done = launch_forked(str(Path(__file__).parents[1] / "programs" / "train_lad.py"),
                          self.arguments(data, save, "--lad-steps", "3"), count)
            assert done.returncode == 0, done.stderr[-3000:]
            (path,) = save.glob("lad_teacher_*.pth")
            found.append(torch.load(path, weights_only=True))
        start = torch.load(tmp_path / "processes1" / "start.pth", weights_only=True)
        for name, value in found[0].items():
            torch.testing.assert_close(found[1][name], value, rtol=1e-7, atol=1e-9)
        assert any(not torch.allclose(value, start[name]) for name, value in found[0].items())
