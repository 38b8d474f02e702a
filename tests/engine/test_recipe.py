"""Settings for data of one's own: epochs, class weights, warm-up, AdamW, weights that belong to a map size."""
from __future__ import annotations

import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import (
    CLASSES,
    STEM,
    assert_refused,
    assert_same_run,
    distil_arguments,
    train_arguments,
    write_folder_dataset,
    write_teacher,
)

import train_kd
from dataset import SegmentationDataset, get_dataset_spec
from engine.build import build_dataset, build_run, check_length, in_iterations
from engine.class_weights import count_pixels, enet_weights
from engine.method_list import unallocated_network
from engine.optimizer import load_optimizer
from engine.run import network_inputs, train_batch, training_batches
from engine.settings import Settings, parse_settings
from engine.weights import weight_factors
from losses.core import NetInfo, Term, methods
from losses.core.distiller import PUBLISHED_MAPS
from models import NetworkChoice
from tools.make_scripts import TABLES
from utils.distributed import init_distributed
from utils.errors import UserError
from utils.schedule import warmup_factor

#: everything at once
ALL = ("--optimizer", "adamw", "--warmup", "3", "--class-weights", "auto", "--ohem", "--ohem-kept", "0.5")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    write_folder_dataset(folder / "set", train=6, val=1, ignored=0.5)
    write_teacher(folder / "teacher.pth")
    return folder


def parsed(*words: str) -> Settings:
    return parse_settings(["--teacher-pretrained", "t.pth", *words])


def refused(words: tuple[str, ...]) -> str:
    with pytest.raises(UserError) as error:
        parsed(*words)
    return str(error.value)


@pytest.mark.parametrize(("words", "said"), [
    (("--method", "none", "--epochs", "3", "--max-iterations", "9"), ("--epochs", "--max-iterations")),
    (("--method", "none", "--warmup", "40000"), ("--warmup 40000", "--max-iterations")),
    (("--method", "none", "--optimizer", "adamw", "--nesterov"), ("--optimizer adamw", "--nesterov")),
    (("--method", "lad", "--optimizer", "adamw"), ("--lad-lr",)),
    (("--method", "kd", "--scale-weights", "kd"), ("--scale-weights kd", "fd")),
    (("--method", "none", "--name", "a", "--save-dir", "b"), ("--name", "--save-dir"))])
def test_flags_that_exclude_each_other(words, said) -> None:
    assert all(word in refused(words) for word in said)


class TestEpochs:
    def arguments(self, place: Path, *more: str) -> list[str]:
        argv = train_arguments(place / "set", place / "unused", "--method", "none", *more)
        for flag in ("--max-iterations", "--val-per-iters"):
            at = argv.index(flag)
            del argv[at:at + 2]
        return argv

    def test_they_become_iterations_of_the_training_set(self, place) -> None:
        settings = in_iterations(parse_settings(self.arguments(place, "--epochs", "15")))
        assert settings.optimization.max_iterations == math.ceil(15 * 6 / 4)
        assert (settings.running.val_per_iters, settings.running.save_per_iters) == (3, 3), "save was given"
        with pytest.raises(UserError, match="--warmup 5: expected fewer than the 3 steps of --epochs 2: 6 images"):
            in_iterations(parse_settings(self.arguments(place, "--epochs", "2", "--warmup", "5")))

    def test_the_published_length_is_refused_for_a_few_images(self, place, capsys) -> None:
        assert_refused(capsys, train_kd.main, self.arguments(place), "--max-iterations 40000",
                       "6 training images 26667", "--epochs")
        check_length(parse_settings(self.arguments(place, "--max-iterations", "40000")), 6)  # asked for: a warning
        for dataset, images in (("citys", 2975), ("camvid", 367), ("voc", 10582)):
            check_length(parsed("--method", "none", "--dataset", dataset), images)


class TestClassWeights:
    def test_auto_are_those_of_enet_by_the_labels(self, place) -> None:
        settings = parse_settings(train_arguments(place / "set", place / "unused", "--method", "none"))
        spec = get_dataset_spec("folder", str(place / "set"))
        pixels = count_pixels(build_dataset(settings, spec, "train", train=True), torch.device("cpu"))
        labels = [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in (place / "set/labels/train").iterdir()]
        assert pixels == [sum(int((label == k).sum()) for label in labels) for k in range(CLASSES)]
        assert enet_weights([0, 30, 70]) == pytest.approx([1 / math.log(1.02), 1 / math.log(1.32), 1 / math.log(1.72)])

    def test_labels_are_read_without_their_images_and_ignored_values_do_not_count(self, place, tmp_path) -> None:
        root = shutil.copytree(place / "set", tmp_path / "set")
        for image in (root / "images/train").iterdir():
            image.write_bytes(b"no picture")
        classes, file = [{"name": "a", "id": 4}, {"name": "b", "id": 0}, {"name": "c", "id": 9}], root / "classes.json"
        file.write_text(json.dumps({"classes": classes, "ignore": [1, 2, 3, 255]}))
        train_set = SegmentationDataset(get_dataset_spec("folder", root), root, "train", train=True)
        train_set.require_labels()
        labels = np.stack([cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in (root / "labels/train").iterdir()])
        pixels = count_pixels(train_set, torch.device("cpu"))
        assert pixels == [int((labels == value).sum()) for value in (4, 0, 9)] and pixels[0] and not pixels[2]
        file.write_text(json.dumps({"classes": classes, "ignore": [1, 2, 255]}))
        train_set = SegmentationDataset(get_dataset_spec("folder", root), root, "train", train=True)
        with pytest.raises(UserError, match=r"labels/train/\d.png: label value 3; .* expects 0..2, 4, 9, 255"):
            count_pixels(train_set, torch.device("cpu"))

    @pytest.mark.parametrize(("content", "said"), [
        ("[1, 2]", "5 numbers"), ("[1, 2, 3, 4, -1]", "at least 0"), ("[0, 0, 0, 0, 0]", "not all 0"),
        ('{"class0": 1}', "'class1' is missing"), ('{"road": 1, "class0": 1}', "class1"), ("1 2", "JSON")])
    def test_a_file_that_does_not_fit(self, place, tmp_path, capsys, content, said) -> None:
        (tmp_path / "weights.json").write_text(content)
        argv = train_arguments(place / "set", tmp_path / "run", "--method", "none", "--class-weights",
                               str(tmp_path / "weights.json"))
        assert_refused(capsys, train_kd.main, argv, "--class-weights", "weights.json", said)
        assert not (tmp_path / "run").exists()

    def test_a_file_by_names(self, place, tmp_path) -> None:
        path = tmp_path / "weights.json"
        path.write_text(json.dumps({f"class{i}": i for i in reversed(range(CLASSES))}))
        run = build_run(parse_settings(train_arguments(place / "set", tmp_path, "--method", "none", "--class-weights",
                                                       str(path))), init_distributed(True))
        assert run.objective.criterion.class_weights.tolist() == [0, 1, 2, 3, 4]


def test_warm_up() -> None:
    assert [warmup_factor(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert warmup_factor(0, 0) == 1


def test_adamw_equals_torch_with_decay_of_weights_alone(place, tmp_path) -> None:
    argv = train_arguments(place / "set", tmp_path, *distil_arguments(place / "teacher.pth"), "--optimizer", "adamw",
                           "--head-lr-factor", "10", "--warmup", "2", "--no-fast")  # rounding is a whole step of Adam's
    run = build_run(parse_settings(argv), init_distributed(True))
    assert run.settings.optimization.lr == 1e-4 and run.settings.optimization.weight_decay == 0.01
    twin = copy.deepcopy(run.objective).train()
    optimizer = torch.optim.AdamW([
        {"params": [p], "times": 10.0 if name.startswith("student.") and "pretrained" not in name else 1.0,
         "weight_decay": 0.01 if p.ndim > 1 else 0.0} for name, p in twin.named_parameters()])
    for i, batch in zip(range(2), training_batches(run), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = group["times"] * 1e-4 * (1 - i / 6) ** 0.9 * (i + 1) / 2
        images, teacher_images, target = network_inputs(run, batch)
        optimizer.zero_grad()
        with torch.no_grad():
            taught = run.teacher(teacher_images)
        terms = twin(images, taught, target, i, run.step_fn.seed_streams(i, target.device))
        sum(twin.weighted(terms, i).values()).backward()
        torch.nn.utils.clip_grad_norm_(twin.distillers["afdcd"].parameters(), 15.0)
        optimizer.step()
        train_batch(run, batch)
        run.step += 1
    for (name, value), expected in zip(run.objective.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7, msg=name)


def test_a_state_of_another_optimizer_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    sgd, adamw = torch.optim.SGD([parameter]), torch.optim.AdamW([parameter])
    for optimizer, other in ((sgd, adamw), (adamw, sgd)):
        with pytest.raises(ValueError, match="--optimizer"):
            load_optimizer(optimizer, other.state_dict())


def test_a_resumed_run_with_all_of_it_is_the_same_run(place, tmp_path, monkeypatch) -> None:
    def arguments(save: Path) -> list[str]:
        return train_arguments(place / "set", save, "--method", "none", "--max-iterations", "4", "--save-per-iters",
                               "2", "--val-per-iters", "4", "--grad-accumulation", "2", *ALL)

    assert train_kd.main(arguments(tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        steps = [train_batch] * 3
        patch.setattr(train_kd, "train_batch", lambda run, batch: steps.pop()(run, batch))
        with pytest.raises(IndexError):
            train_kd.main(arguments(tmp_path / "cut"))
    assert torch.load(tmp_path / "cut" / f"{STEM}_state.pth", weights_only=True)["step"] == 2
    assert train_kd.main([*arguments(tmp_path / "cut"), "--resume", "auto"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


class TestScaledWeights:
    R101 = NetInfo("r101", {"c4": 2048, "head": 512}, 19)

    @pytest.mark.parametrize("method", ["afdcd", "at", "dsd"])
    @pytest.mark.parametrize("dataset", TABLES)
    def test_published_settings_stay_as_they_are(self, method, dataset) -> None:
        if method != "afdcd" and dataset != "citys":  # published there alone
            return
        settings = parsed("--method", method, "--dataset", dataset, "--crop-size", *map(str, TABLES[dataset].crop))
        factors = weight_factors(settings, self.R101)
        assert len(factors) == 1 and [factor for factor, _ in factors.values()] == [1.0]

    @pytest.mark.parametrize(("method", "crop", "factor"), [
        ("afdcd", 360, (64 * 128 * 2048) / (45 * 45 * 320)), ("mgd", 100, (64 * 64 * 2048) / (13 * 13 * 320)),
        ("at", 512, 0.5), ("dsd", 512, 0.5)])
    def test_others_are_scaled(self, method, crop, factor) -> None:
        settings = parsed("--method", method, "--dataset", "toy_streets", "--crop-size", str(crop))
        ((found, why),) = weight_factors(settings, NetInfo("small", {"c4": 320}, 11)).values()
        assert found == factor and "published" in why

    def test_of_a_sum_over_another_map(self, monkeypatch) -> None:
        method = methods()["mgd"]
        monkeypatch.setattr(method, "terms", (replace(method.terms[0], sum_over="c1"),))
        settings = parsed("--method", "mgd", "--dataset", "toy_streets", "--crop-size", "100")
        teacher = NetInfo("small", {"c1": 24}, 11, strides={"c1": 4})
        assert weight_factors(settings, teacher)["mgd"][0] == (128 * 128 * 256) / (25 * 25 * 24)
        with pytest.raises(ValueError, match="term 'x': sum_over 'head'; expected one of c1, c2, c3, c4"):
            Term("x", 0.0, "", sum_over="head")
        r101 = unallocated_network(NetworkChoice("deeplabv3", "resnet101"), 19)
        assert {tap: (r101.channels[tap], r101.stride_of(tap)) for tap in PUBLISHED_MAPS} == PUBLISHED_MAPS

    def test_of_the_positions_of_the_map_that_a_term_reads(self, monkeypatch) -> None:
        """Logits at the size of the image, as networks of other libraries give them, say nothing of the head."""
        teacher = NetInfo("outside", {"head": 480, "c1": 24}, 11, stride=1, strides={"head": 16, "c1": 4})
        settings = parsed("--method", "at", "--dataset", "toy_streets", "--crop-size", "512", "1024")
        assert weight_factors(settings, teacher)["at"] == (
            0.25, "it shrinks with the number of positions, 32 x 64 in place of the published 64 x 128")
        method = methods()["at"]
        monkeypatch.setattr(method, "terms", (replace(method.terms[0], of_unit_maps="c1"),))
        assert weight_factors(settings, teacher)["at"][0] == 1
        with pytest.raises(ValueError, match="term 'x': of_unit_maps True; expected one of logits, aux, .*, head"):
            Term("x", 0.0, "", of_unit_maps=True)

    def test_a_weight_that_is_given_is_taken_as_it_is(self) -> None:
        for words in (("--method", "afdcd", "--lambda-fd", "2e-6"), ("--lambda-fd", "2e-6"), (),
                      ("--method", "afdcd", "--scale-weights", "none"), ("--method", "kd")):
            assert not weight_factors(parsed(*words, "--crop-size", "64"), self.R101), words
        asked = parsed("--lambda-fd", "2e-6", "--scale-weights", "fd", "--crop-size", "64")
        assert list(weight_factors(asked, self.R101)) == ["fd"]

    def test_the_objective_has_the_scaled_weight_and_the_settings_the_published_one(self, place, tmp_path) -> None:
        argv = train_arguments(place / "set", tmp_path, *distil_arguments(place / "teacher.pth")[:6], "--method",
                               "afdcd", "--pool-size", "2")
        run = build_run(parse_settings(argv), init_distributed(True))
        positions = (64 * 128 * 2048) / (8 * 8 * run.teacher.channels["c4"])
        assert run.objective.weights["fd"] == 2e-6 * positions and run.settings.weights["fd"] == 2e-6
        assert run.settings.recipe.scale_weights == ("fd",) and np.isclose(run.objective.weights["ctr"], 5e-3)
