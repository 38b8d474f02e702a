"""``--teacher-classes``: the file, what does not fit, and a training with it from start to repeat."""
from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, STEM, STUDENT, TEACHER, assert_refused, train_arguments, write_folder_dataset

import train_kd
from dataset import collate, get_dataset_spec
from engine.class_map import class_map_changes, class_map_of, read_class_map
from engine.evaluate import evaluate
from engine.method_list import method_table
from engine.options import Networks
from engine.results import differences
from engine.settings import parse_settings
from engine.tap_list import tap_table
from engine.teacher import load_teacher
from examples.espnet import camvid
from models import get_segmentation_model, save_state_dict
from models.class_map import ClassMap, MappedTeacher, for_predictions
from tools import compare
from tools.comparison.runs import check_teacher, only_distilled, read_run
from tools.latency import find_subjects
from utils.cli import describe_error
from utils.errors import UserError

CITYS, CAMVID = get_dataset_spec("citys"), get_dataset_spec("camvid")
#: classes of the teacher of the runs here; those of the data set are class0 ... class4
TAUGHT = ["sky", "tree", "wall", "Tall  House", "car", "bus", "dog"]
MAP = """
[classes]
class0 = "sky"
class2 = ["tall house", 2]
3 = ["car", "bus"]
class4 = []
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> SimpleNamespace:
    """data: five classes. teacher: of seven, whose file names them. flags: of a run without a map."""
    base = tmp_path_factory.mktemp("classes")
    data = write_folder_dataset(base / "set", train=4, val=2)
    torch.manual_seed(0)
    net = get_segmentation_model("deeplab_mobile", TEACHER, len(TAUGHT))
    net.trained_on = {"classes": TAUGHT}
    save_state_dict(net, base / "teacher.pth")
    flags = ["--teacher-model", "deeplab_mobile", "--teacher-backbone", TEACHER, "--teacher-pretrained",
             str(base / "teacher.pth")]
    return SimpleNamespace(data=data, teacher=base / "teacher.pth", flags=flags)


def networks(text: str, folder: Path, pretrained: Path | None = None) -> Networks:
    path = folder / "map.toml"
    path.write_text(text, encoding="utf-8")
    return Networks(teacher_model="deeplab_mobile", teacher_backbone=TEACHER, teacher_classes="map.toml",
                    teacher_pretrained=pretrained and str(pretrained), class_map=read_class_map(str(path)))


class TestFile:
    def test_names_and_numbers(self, tmp_path, material) -> None:
        spec = get_dataset_spec("folder", material.data)
        found = class_map_of(networks(MAP, tmp_path, material.teacher), spec)
        assert found == ClassMap((0, 2, 3), ((0,), (3, 2), (4, 5)), 5, 7, tuple(TAUGHT))
        assert (found.part, found.missing, found.unread) == ((0, 2, 3), (1, 4), (1, 6))
        assert class_map_of(Networks(), spec) is None

    @pytest.mark.parametrize("line", ['teacher = "citys"', f"teacher = {json.dumps(CITYS.classes)}", "teacher = 19"])
    def test_the_classes_of_the_teacher(self, line, tmp_path) -> None:
        found = class_map_of(networks(f"{line}\n[classes]\nsky = 10\ncar = [13, 14]", tmp_path), CAMVID)
        assert found.groups == ((10,), (13, 14)) and found.taught == 19
        assert found.names == (None if "19" in line else CITYS.classes)

    def test_the_example(self) -> None:
        path = "examples/cityscapes_for_camvid.toml"
        found = class_map_of(Networks(class_map=read_class_map(str(ROOT / path))), CAMVID)
        assert found.part is None and [CITYS.classes[k] for k in found.unread] == ["terrain"]
        merged = {CAMVID.classes[k]: [CITYS.classes[part] for part in group]
                  for k, group in enumerate(found.groups) if len(group) > 1}
        assert merged == {"building": ["building", "wall"], "sign/symbol": ["traffic sign", "traffic light"],
                          "car": ["car", "truck", "bus", "train"], "bicyclist": ["rider", "bicycle", "motorcycle"]}
        assert path in (ROOT / "docs/networks.md").read_text()

    @pytest.mark.parametrize(("text", "message"), [
        ("[classes", "not a TOML file that can be read"),
        ("", r"expected \[classes\] and below it"),
        ("[classes]\n", "maps no class: expected lines such as"),
        ("[classes]\nsky = []", "maps no class"),
        ("[class]\nsky = 1", "there is no entry 'class'; did you mean 'classes'"),
        ("[classes]\nsky = 1.5", "sky = 1.5: expected a class of the teacher, by name or number"),
        ("[classes]\nsky = [true]", r"sky = \[True\]: expected a class"),
        ("teacher = 0\n[classes]\nsky = 1", 'teacher = 0: expected teacher = "citys"'),
        ("[classes]\nsky = 1", "neither the teacher's weights nor this file say which classes it has"),
        ('teacher = "city"\n[classes]\nsky = 1', "teacher = 'city': unknown data set 'city'; expected one of"),
        ('teacher = "folder"\n[classes]\nsky = 1', "teacher = 'folder': "),
        ('teacher = "citys"\n[classes]\nsly = "sky"', "CamVid has no class 'sly'; did you mean 'sky'.: expected one"),
        ('teacher = "citys"\n[classes]\nsky = "road "\ntree = "vegetatoin"',
         "the teacher has no class 'vegetatoin'; did you mean 'vegetation'"),
        ('teacher = "citys"\n[classes]\nsky = 19', "the teacher has no class 19: expected 0 to 18"),
        ('teacher = "citys"\n[classes]\n11 = 3', "CamVid has no class 11: expected 0 to 10"),
        ('teacher = "citys"\n[classes]\nsky = 0\n0 = 1', "'sky' is class 0 of CamVid, which is mapped already"),
        ('teacher = "citys"\n[classes]\nsky = "road"\ncar = [13, 0]',
         "the teacher's class road stands for 'car' and again for 'sky'"),
        ("teacher = 4\n[classes]\ncar = [3, 3]", "the teacher's class 3 stands for 'car' and again for 'car'"),
        ('teacher = 4\n[classes]\ncar = "bus"', "'bus': the names of the 4 classes of the teacher are not known"),
        ('teacher = ["a", "b", "A"]\n[classes]\ncar = "a"', "the teacher has 2 classes 'a': expected the number"),
    ])
    def test_what_does_not_fit(self, text, message, tmp_path) -> None:
        with pytest.raises(UserError, match=f"^--teacher-classes .*map.toml: .*{message}"):
            class_map_of(networks(text, tmp_path), CAMVID)

    def test_the_weights_know_better(self, tmp_path, material) -> None:
        other = json.dumps(["x", *TAUGHT[1:]])
        for line, message in (("teacher = 19", r"has 19 classes, but it has 7 classes \(sky, tree"),
                              (f"teacher = {other}", "class 0 of the teacher is 'x', but its weights say 'sky'")):
            with pytest.raises(UserError, match=message):
                class_map_of(networks(f"{line}\n[classes]\nsky = 1", tmp_path, material.teacher), CAMVID)
        assert class_map_of(networks("teacher = 7\n[classes]\nsky = 'dog'", tmp_path, material.teacher), CAMVID)

    def test_a_missing_file(self) -> None:
        with pytest.raises(UserError, match="--teacher-classes none.toml: not a TOML file that can be read"):
            read_class_map("none.toml")

    def test_changes_are_told_by_class(self) -> None:
        one, two = (json.dumps({"teacher": None, "classes": classes})
                    for classes in ({"a": ["x"], "b": ["y"]}, {"b": ["y", 3], "c": ["x"]}))
        assert class_map_changes(one, two) == "a: x -> nothing, b: y -> y + 3, c: nothing -> x"
        assert (class_map_changes(None, one), class_map_changes(one, None)) == ("no map -> a map", "a map -> no map")
        three, four, five = (json.dumps({"teacher": said, "classes": {"a": [1], **more}})
                             for said, more in ((3, {}), ("citys", {}), ("citys", {"c": []})))
        assert class_map_changes(three, five) == "teacher = 3 -> 'citys'"
        assert class_map_changes(four, five) == "the same, written in another way"

    def test_a_configuration_that_was_edited(self) -> None:
        for text in ("x", "[]", "{}", '{"teacher": null, "classes": {"a": 1}}'):
            with pytest.raises(UserError, match="not what --teacher-classes FILE leaves .*: give the file again"):
                class_map_of(Networks(teacher_pretrained=None, class_map=text), CAMVID)


class TestWithoutMap:
    """A teacher of other classes is refused, with both lists where they are known."""
    BOTH = ("7 classes (sky, tree, wall, Tall House, car, bus, dog)",
            "5 classes (class0, class1, class2, class3, class4)", "--teacher-classes FILE")

    def test_another_number(self, material, tmp_path, capsys) -> None:
        argv = train_arguments(material.data, tmp_path / "run", "--method", "kd", *material.flags)
        assert_refused(capsys, train_kd.main, argv, *self.BOTH)

    def test_another_number_without_names(self, material, tmp_path) -> None:
        torch.save(torch.load(material.teacher, weights_only=True), tmp_path / "t.pth")
        settings = parse_settings([*material.flags, "--teacher-pretrained", str(tmp_path / "t.pth")])
        with pytest.raises(UserError, match=r"has 7 classes without names, CamVid has 11 classes \(sky, building"):
            load_teacher(settings, CAMVID)

    def test_another_order(self, material, tmp_path) -> None:
        net = get_segmentation_model("deeplab_mobile", TEACHER, 11)
        net.trained_on = {"classes": [*CAMVID.classes[1:], CAMVID.classes[0]]}
        save_state_dict(net, tmp_path / "t.pth")
        settings = parse_settings([*material.flags, "--teacher-pretrained", str(tmp_path / "t.pth")])
        with pytest.raises(UserError, match="in another order .* or --teacher-classes FILE, which maps them"):
            load_teacher(settings, CAMVID)

    def test_a_network_of_elsewhere(self, tmp_path) -> None:
        torch.save(camvid().state_dict(), tmp_path / "t.pth")
        settings = parse_settings(["--teacher-model", "module:examples.espnet:camvid", "--teacher-pretrained",
                                   str(tmp_path / "t.pth")])
        with pytest.raises(UserError, match="has 11 classes without names, Cityscapes has 19 classes .road, "):
            load_teacher(settings, CITYS)

    def test_what_is_wrong_with_something_else_is_said_as_ever(self, material) -> None:
        settings = parse_settings([*material.flags, "--teacher-pretrained", "none.pth"])
        with pytest.raises(UserError, match="none.pth: no such weights file"):
            load_teacher(settings, CAMVID)


def test_an_ignored_class_and_classes_that_are_left_out_exclude_each_other(material, tmp_path) -> None:
    (tmp_path / "m.toml").write_text(MAP)
    settings = parse_settings([*material.flags, "--teacher-classes", str(tmp_path / "m.toml"), "--ignore-label", "3"])
    with pytest.raises(UserError, match="--ignore-label 3 is a class, but .* expected none of 0 to 4"):
        load_teacher(settings, get_dataset_spec("folder", material.data))


@pytest.fixture(scope="module")
def trained(material, tmp_path_factory) -> SimpleNamespace:
    """A run with a map: methods on logits, on features with labels, and with a stage that learns from the teacher."""
    base, seen = tmp_path_factory.mktemp("trained"), []
    (base / "map.toml").write_text(MAP)
    argv = [*train_arguments(material.data, base / "run", "--method", "dist", *material.flags, "--teacher-classes",
                             str(base / "map.toml"), "--max-iterations", "2", "--tensorboard", "--val-per-iters", "2",
                             "--results", str(base / "results"))]
    for term in ("dkd", "adv", "maskd", "freekd", "cirkd-pixel", "lad"):
        argv += [f"--lambda-{term}", "0.1"]
    for stage in ("maskd", "freekd", "lad"):
        argv += [f"--{stage}-steps", "2", f"--{stage}-batch-size", "4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_kd, "report", lambda run, journal: seen.append(run))
        assert train_kd.main([*argv, "--adv-upsample"]) == 0
    return SimpleNamespace(run=seen[0], argv=[*argv, "--adv-upsample"], folder=base / "run", map=base / "map.toml",
                           log=next((base / "run" / "logs").glob("*_log.txt")).read_text(), results=base / "results")


class TestRun:
    def test_it_trains(self, trained) -> None:
        run = trained.run
        assert isinstance(run.teacher, MappedTeacher) and run.objective.narrowed == {"dist", "dkd", "adv", "maskd"}
        assert run.objective.distillers["maskd"].tokens.shape[1] == 3
        assert run.objective.distillers["lad"].network.num_class == 5
        records = [json.loads(line) for line in next((trained.folder / "logs").glob("*.jsonl")).open()]
        raw = [record["raw"] for record in records if record["kind"] == "train"][-1]
        assert {"dist", "dkd", "adv", "maskd", "freekd", "cirkd_pixel", "lad"} < set(raw) and all(
            value is not None for value in raw.values())

    def test_it_says_what_is_mapped(self, trained) -> None:
        said = " ".join(trained.log.split())
        assert "map.toml: 3 of the 5 classes of" in said and "class0 = sky, class2 = Tall House + wall" in said
        assert "not known to the teacher: class1, class4" in said and "of the teacher not used: tree, dog" in said

    def test_the_panels_show_classes_of_the_data_set(self, trained) -> None:
        shown = torch.cat([x.flatten() for x in trained.run.teacher_predictions.values()]).unique().tolist()
        assert len(trained.run.teacher_predictions) == 2 and set(shown) <= {0, 2, 3}

    def test_the_teacher_is_evaluated_through_the_map(self, trained) -> None:
        """Its answers are those that its own scores give when they are merged by hand."""
        teacher, val, answers = for_predictions(trained.run.teacher), trained.run.val_set, {}
        counted = evaluate(teacher, val, device=torch.device("cpu"),
                           on_prediction=lambda found, item: answers.update({item["index"]: found}))
        assert counted["iou_per_class"][1] == counted["iou_per_class"][4] == 0 < counted["mIoU"]
        for index, answer in answers.items():
            image, valid = (collate([val[index]])[name] for name in ("image", "valid"))
            sky, _, wall, house, car, bus, _ = teacher.net(teacher.preprocess(image, valid)).logits.double()[0].exp()
            scores = torch.stack([sky, wall + house, car + bus])[None].log()
            resized = F.interpolate(scores, answer.shape, mode="bilinear", align_corners=True)
            assert (torch.tensor([0, 2, 3])[resized.argmax(1)[0]] == answer).float().mean() > 0.999

    def test_a_comparison_shows_its_answers_through_the_map(self, trained) -> None:
        runs = {role: read_run(f"--{role}", trained.folder) for role in ("plain", "distilled")}
        answers = compare.evaluate_all(runs, trained.run.val_set, SimpleNamespace(no_cuda=True, workers=0))
        assert list(answers) == ["teacher", "plain", "distilled"]
        assert not answers["teacher"].confusion[:, [1, 4]].any() and answers["teacher"].confusion.sum() > 0
        plain = replace(runs["plain"], settings=parse_settings(["--method", "none"]))
        shown = dict(only_distilled(plain, runs["distilled"]))
        assert shown["--teacher-classes"] == "map.toml" and "--class-map" not in shown

    def test_latencies_are_of_all_its_classes(self, trained) -> None:
        assert [one.num_class for one in find_subjects(str(trained.folder), 19)] == [5, 7]

    def test_it_is_kept(self, trained) -> None:
        content = {"teacher": None, "classes": {"class0": ["sky"], "class2": ["tall house", 2], "3": ["car", "bus"],
                                                "class4": []}}
        state = torch.load(trained.folder / f"{STEM}_state.pth", weights_only=True)
        result = json.loads(next(trained.results.rglob("*.json")).read_text())
        config = json.loads((trained.folder / f"{STEM}_config.json").read_text())
        for saved in (config["config"], state["config"], result["settings"]):
            assert json.loads(saved["class_map"]) == content and saved["teacher_classes"] == str(trained.map)

    def test_it_repeats_without_the_file(self, trained, tmp_path) -> None:
        argv = ["--config", str(trained.folder), "--save-dir", str(tmp_path)]
        kept = trained.run.settings.networks.class_map
        trained.map.rename(tmp_path / "elsewhere.toml")
        try:
            assert parse_settings(argv).networks.class_map == kept is not None
            assert parse_settings([*argv, "--teacher-classes", "none"]).networks.class_map is None
            with pytest.raises(UserError, match="map.toml: not a TOML file"):
                parse_settings([*argv, "--teacher-classes", str(trained.map)])
        finally:
            (tmp_path / "elsewhere.toml").rename(trained.map)

    def test_a_finished_run_takes_no_other_map(self, trained) -> None:
        before = trained.map.read_text()
        trained.map.write_text(before.replace('["car", "bus"]', '"car"'))
        try:
            with pytest.raises(UserError, match="is finished, .* settings: --teacher-classes: 3: car . bus -> car;"):
                train_kd.main([*trained.argv, "--resume", "auto", "--label", "again"])
            with pytest.raises(UserError, match="a run with other settings .--teacher-classes: 3: car . bus -> car"):
                train_kd.check_result_target(parse_settings(trained.argv))
        finally:
            trained.map.write_text(before)

    def test_it_counts_for_results_and_its_path_does_not(self, trained) -> None:
        made = trained.run.settings.flat()
        assert differences(made, {**made, "teacher_classes": "other.toml"}) == []
        older = {name: value for name, value in made.items() if name not in ("class_map", "teacher_classes")}
        assert differences(older, made) == ["--teacher-classes: no map -> a map"]

    def test_its_teacher_may_be_of_another_data_set(self, trained) -> None:
        """In a comparison, where the map says how the two belong together."""
        distilled = read_run("--distilled", trained.folder)
        networks = distilled.settings.networks
        own = parse_settings(["--method", "none", "--dataset", "citys", "--student-model", networks.teacher_model,
                              "--student-backbone", networks.teacher_backbone])
        teacher = replace(distilled, flag="--teacher", settings=own)
        check_teacher(teacher, distilled)
        unmapped = replace(distilled, settings=replace(distilled.settings, networks=replace(networks, class_map=None)))
        with pytest.raises(UserError, match="a run on citys; the distilled run is on folder"):
            check_teacher(teacher, unmapped)


def test_the_tables_of_methods_and_taps_know_it(material, tmp_path) -> None:
    (tmp_path / "m.toml").write_text(MAP)
    argv = ["--dataset", "folder", "--data", str(material.data), *material.flags, "--student-model", "deeplab_mobile",
            "--student-backbone", STUDENT, "--teacher-classes", str(tmp_path / "m.toml"), "--crop-size", "64"]
    assert re.search(r"teacher: .*, 7 classes", tap_table(parse_settings([*argv, "--list-taps"])))
    table = method_table(parse_settings([*argv, "--list-methods"]), 140)
    assert "maskd" in table and "expected equal numbers" not in table


def test_one_common_class_is_refused_by_the_name_of_the_method(material, tmp_path, capsys) -> None:
    (tmp_path / "m.toml").write_text('[classes]\nclass1 = "dog"')
    argv = train_arguments(material.data, tmp_path / "run", "--method", "kd", *material.flags, "--teacher-classes",
                           str(tmp_path / "m.toml"))
    assert_refused(capsys, train_kd.main, argv, "method 'kd' compares scores of classes", "(--teacher-classes)")
    assert describe_error(UserError("x", settings=["teacher_classes"])) == "x (--teacher-classes)"
