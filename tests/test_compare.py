"""tools/compare.py: the page of two tiny runs is whole and needs no server; its parts against cases made by hand."""
from __future__ import annotations

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CLASSES, assert_refused, distil_arguments, train_arguments, write_folder_dataset, write_teacher
from PIL import Image

import train_kd
from engine.settings import from_flat
from tools import compare
from tools.comparison import figures
from tools.comparison.answers import Score, by_change, error_map, row_shares
from tools.comparison.page import Comparison, build_page, duration, goal, percent, points
from tools.comparison.pictures import MOST_WIDTH, source
from tools.comparison.runs import TrainedRun, check_pair, differences, only_distilled, read_run, unfair
from utils.errors import UserError
from utils.options import flag

STUDENT = "deeplab_mobile-mobilenetv2_w0.25"
FIGURES = {"validation", "terms-plain", "terms-distilled", "classes", "confusion-plain", "confusion-distilled",
           "confusion-change"}


class Page(HTMLParser):
    """What a page consists of. attributes: of every element; parts: {element: texts of all of its kind}."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, dict]] = []
        self.parts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.attributes.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data) -> None:
        if self._open:
            self.parts.setdefault(self._open[-1], []).append(data.strip())

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.attributes if name == tag]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    data = write_folder_dataset(folder / "data")
    shutil.copytree(data / "images" / "val", data / "images" / "test")  # without labels
    teacher = write_teacher(folder / "teacher.pth")
    assert train_kd.main(train_arguments(data, folder / "plain", "--method", "none")) == 0
    assert train_kd.main(train_arguments(data, folder / "distilled", "--lr", "0.03", *distil_arguments(teacher))) == 0
    return folder


def arguments(place: Path, **other: object) -> list[str]:
    values = {"plain": place / "plain", "distilled": place / "distilled", "out": place / "page.html", "workers": 0,
              **other}
    return ["--no-cuda", *(word for name, value in values.items() for word in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def page(place) -> Page:
    assert compare.main(arguments(place, images=2)) == 0
    return Page((place / "page.html").read_text(encoding="utf-8"))


def specifications(page: Page) -> dict:
    return next(json.loads(text) for text in page.parts["script"] if text.startswith('{"classes"'))


def test_it_asks_no_server(page, place) -> None:
    for tag, attributes in page.attributes:
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value[:80])
    assert not re.search(r"url\(|@import", " ".join(page.parts["style"]))
    assert any("default-src 'none'" in meta.get("content", "") for meta in page.of("meta"))
    assert sum("plotly.js v" in text for text in page.parts["script"]) == 1
    assert (place / "page.html").stat().st_size < 6e6
    assert str(place) not in (place / "page.html").read_text(encoding="utf-8")


def test_every_figure_has_its_place(page) -> None:
    assert {div["data-figure"] for div in page.of("div") if "data-figure" in div} == FIGURES
    assert set(specifications(page)) == FIGURES
    assert all(div["aria-label"] for div in page.of("div") if "data-figure" in div)


def test_it_holds_every_class_with_the_scores_of_the_log(page, place) -> None:
    cells = page.parts["td"]
    assert [name for name in page.parts["th"] if name.startswith("class")][1:] == [f"class{k}" for k in range(CLASSES)]
    bars = {trace["name"]: trace for trace in specifications(page)["classes"]["data"]}
    assert list(bars) == ["teacher", "plain", "distilled"]
    for role in ("plain", "distilled"):
        logged = read_run(f"--{role}", place / role).digest["scores"]["val"]
        assert bars[role]["x"] == pytest.approx([100 * x for x in logged["iou_per_class"]])
        assert f"{100 * logged['mIoU']:.2f}" in cells
        assert all(f"{100 * x:.2f}" in cells for x in logged["iou_per_class"])


def test_curves_and_terms_are_those_of_the_log(page, place) -> None:
    specs = specifications(page)
    run = read_run("--distilled", place / "distilled")
    assert [trace["name"] for trace in specs["validation"]["data"]] == ["plain", "distilled"]
    assert specs["validation"]["data"][1]["x"] == [3, 6]
    weighted = run.digest["losses"]["weighted"]
    assert {trace["name"]: trace["y"] for trace in specs["terms-distilled"]["data"]} == weighted
    assert set(weighted) == {"task", "fd", "ctr", "kd"}
    assert specs["terms-plain"]["layout"]["yaxis"]["range"] == specs["terms-distilled"]["layout"]["yaxis"]["range"]


def test_every_picture_has_six_views(page) -> None:
    views = [image["data-view"] for image in page.of("img") if "data-view" in image]
    assert views == ["image", "truth", "teacher", "plain", "distilled", "errors"] * 2
    assert all(image["alt"] for image in page.of("img") if "data-view" in image)


def test_a_method_without_a_teacher_has_a_page_of_two(place) -> None:
    options = compare.parse_options(compare.Options, arguments(place), prog="", description="")
    runs = compare.read_runs(options)
    dataset = compare.build_dataset(runs, None, "val")
    answers = compare.evaluate_all(runs, dataset, options)
    page = Page(build_page(Comparison(runs, dataset, {r: answers[r] for r in ("plain", "distilled")}), 1))
    assert [trace["name"] for trace in specifications(page)["classes"]["data"]] == ["plain", "distilled"]
    assert [image["data-view"] for image in page.of("img") if "data-view" in image] == [
        "image", "truth", "plain", "distilled", "errors"]


def test_the_order_is_that_of_the_change() -> None:
    plain = [Score(0.5, 0.5), Score(0.5, 0.5), Score(0.4, 0.5), Score(0.5, 0.9), Score(0.5, 0.5)]
    distilled = [Score(0.6, 0.5), Score(0.1, 0.5), Score(0.4, 0.5), Score(0.5, 0.5), Score(0.6, 0.4)]
    assert by_change(plain, distilled) == [1, 4, 0, 3, 2]


def test_an_error_map_says_who_is_right() -> None:
    label = np.array([[0, 1, 2, 2, -1]], np.int16)
    plain = np.array([[0, 0, 2, 1, 3]], np.uint8)
    distilled = np.array([[0, 1, 1, 0, 3]], np.uint8)
    assert error_map(label, plain, distilled).tolist() == [[0, 1, 2, 3, 4]]


def test_rows_of_a_confusion_matrix_add_up_to_one() -> None:
    shares = row_shares(torch.tensor([[3, 1], [0, 0]]))
    assert shares == [[0.75, 0.25], [None, None]]
    change = figures.as_json(figures.confusion_change(["a", "b"], shares, [[0.5, 0.5], [None, None]]))["data"][0]
    assert change["z"] == [[-25.0, 25.0], [None, None]] and (change["zmin"], change["zmax"]) == (-25, 25)


def test_many_classes_get_bars_where_distillation_changes_most() -> None:
    plain = [0.5] * 50
    distilled = [0.5 + 0.001 * k for k in range(50)]
    assert figures.shown_classes({"plain": plain, "distilled": distilled}) == list(range(10, 50))


@pytest.mark.parametrize(("values", "kind"), [([1.0, 0.1, 0.0], "log"), ([1.0, -0.5], None)])
def test_a_term_below_zero_needs_a_linear_axis(values, kind) -> None:
    losses = {role: {"step": list(range(len(values))), "weighted": {"task": values}} for role in ("plain", "distilled")}
    spec = figures.as_json(figures.terms(losses)["plain"])
    assert spec["layout"]["yaxis"].get("type") == kind
    assert spec["data"][0]["y"] == [v if v > 0 or kind is None else None for v in values]


def test_a_mask_keeps_its_colors_and_a_wide_one_gets_no_new_ones() -> None:
    image = np.random.default_rng(0).integers(0, 2, (20, MOST_WIDTH + 200, 1)).repeat(3, 2).astype(np.uint8) * 200
    for given in (image[:, :50], image):
        data = base64.b64decode(source(given, is_mask=True).partition("base64,")[2])
        got = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert got.shape[1] == min(given.shape[1], MOST_WIDTH) and set(np.unique(got)) == {0, 200}
        assert got.shape != given.shape or (got == given).all()


def test_numbers_are_written_for_people() -> None:
    assert percent(0.2594) == "25.9" and points(-0.0031) == "−0.3" and points(0.054) == "+5.4" and percent(None) == "–"
    assert [duration(x) for x in (46.2, 312, 11160)] == ["46.2 s", "5.2 min", "3.1 h"]


def test_settings_that_differ_are_those_that_count(place) -> None:
    plain, distilled = (read_run(f"--{role}", place / role) for role in ("plain", "distilled"))
    rows = {name: values for name, *values in differences(plain, distilled)}
    assert rows == {"--lr": ["0.02", "0.03"], "--method": ["none", "afdcd"], "--lambda-kd": ["0", "1"],
                    "--lambda-fd": ["0", "1e-05"], "--lambda-ctr": ["0", "0.005"]}
    own = dict(only_distilled(plain, distilled))
    assert own["--teacher-pretrained"] == "teacher.pth" and own["--pool-size"] == "2"
    assert not {"--save-dir", "--crop-size", "--cwd-temperature", "--teacher-pretrained-base"} & set(own)
    assert unfair(plain, distilled) == ["--lr"]


def changed(run: TrainedRun, **settings: object) -> TrainedRun:
    return replace(run, settings=from_flat({**run.settings.flat(), **settings}))


def test_other_images_networks_and_choices_of_the_best_are_said(place) -> None:
    plain, distilled = (read_run(f"--{role}", place / role) for role in ("plain", "distilled"))
    given = {"train_list": "/a/ten.txt", "unlabelled": "/a/more", "aux_weight": 0.1, "val_per_iters": 7,
             "sampling": "epoch", "data": "/a/hats"}
    names = {flag(name) for name in given}
    other = changed(distilled, **given)
    assert names <= set(unfair(plain, other)) and names <= {name for name, *_ in differences(plain, other)}
    moved = changed(distilled, data=f"/elsewhere/{Path(plain.settings.data.data).name}")
    assert unfair(plain, moved) == ["--lr"] and "--data" not in {name for name, *_ in differences(plain, moved)}


def test_the_teacher_that_is_shown_is_the_file_that_was_learned_from(place) -> None:
    """Whichever weights of the students are compared."""
    plain, last = read_run("--teacher", place / "plain", "best"), read_run("--teacher", place / "plain", "last")
    for weights in ("best", "last"):
        for run in (plain, last):
            assert read_run("--teacher", place / "plain", weights, run.weights.name).weights == run.weights
    assert read_run("--teacher", place / "plain", "last", "moved.pth").weights == last.weights != plain.weights


def test_a_teacher_of_other_images_sets_no_goal(place) -> None:
    runs = {role: read_run("--x", place / role) for role in ("plain", "distilled")}
    best = max(point["mIoU"] for point in runs["plain"].digest["curve"])
    assert goal(runs) is None and goal({**runs, "teacher": runs["plain"]}) == best
    moved = changed(runs["plain"], data=f"/elsewhere/{Path(runs['plain'].settings.data.data).name}")
    assert goal({**runs, "teacher": moved}) == best
    for change in ({"dataset": "camvid"}, {"data": "/a/b"}, {"val_list": "/a/b.txt"}, {"selection_split": "train"}):
        assert goal({**runs, "teacher": changed(runs["plain"], **change)}) is None


def test_a_run_that_was_moved_is_read_where_it_is(place, tmp_path) -> None:
    shutil.copytree(place / "plain", tmp_path / "moved")
    run = read_run("--plain", tmp_path / "moved", "last")
    assert run.log.is_relative_to(tmp_path) and run.weights.name == f"kd_{STUDENT.replace('-', '_')}_folder.pth"
    shutil.rmtree(tmp_path / "moved" / "logs")
    assert read_run("--plain", tmp_path / "moved").log.is_relative_to(place)  # where it was written


def test_the_legend_has_the_classes_of_the_pictures(page) -> None:
    names = [name for name in page.parts["li"] if name]
    assert names == [*(f"class{k}" for k in range(CLASSES)), "not labeled", "both right", "only distilled right",
                     "only plain right", "both wrong", "not labeled"]


def test_the_teacher_run_takes_the_place_of_a_file_that_is_gone(place, tmp_path) -> None:
    shutil.copytree(place / "distilled", tmp_path / "distilled")
    (config,) = (tmp_path / "distilled").glob("*_config.json")
    config.write_text(config.read_text().replace("teacher.pth", "gone.pth"))
    with pytest.raises(UserError, match="gone.pth is not there any more; .* --teacher"):
        compare.main(arguments(place, distilled=tmp_path / "distilled"))
    with pytest.raises(UserError, match="learned from deeplab_mobile-mobilenetv2_w0.5"):
        compare.main(arguments(place, distilled=tmp_path / "distilled", teacher=place / "plain"))
    teacher = ["--method", "none", "--model", "deeplab_mobile", "--backbone", "mobilenetv2_w0.5"]
    assert train_kd.main(train_arguments(place / "data", tmp_path / "teacher", *teacher)) == 0
    assert compare.main(arguments(place, distilled=tmp_path / "distilled", teacher=tmp_path / "teacher", images=1,
                                  out=tmp_path / "page.html")) == 0
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert [trace["name"] for trace in specifications(page)["validation"]["data"]] == ["plain", "distilled", "teacher"]


def test_what_does_not_fit_is_refused(place, tmp_path, capsys) -> None:
    def refused(*words: str, **other: object) -> None:
        assert_refused(capsys, compare.main, arguments(place, **other), *words)

    refused("--plain", "no such folder", plain=tmp_path / "nowhere")
    refused("--plain", "_config.json", plain=place / "data")
    refused("--plain", "expected a plain one", plain=place / "distilled")
    refused("--distilled", "expected a distilled run", distilled=place / "plain")
    refused("--split test", "no labels", "train, val", split="test")
    refused("'nothing'", "expected one of", split="nothing")
    refused("no such folder", "--data", data=tmp_path / "nowhere")
    refused("--out", out=place)


def test_runs_of_different_data_sets_are_refused(place, tmp_path, capsys) -> None:
    plain, distilled = (read_run(f"--{role}", place / role) for role in ("plain", "distilled"))
    settings = replace(plain.settings, data=replace(plain.settings.data, dataset="camvid"))
    with pytest.raises(UserError, match="different data sets: camvid and folder"):
        check_pair(replace(plain, settings=settings), distilled)
    data = shutil.copytree(place / "data", tmp_path / "data")
    (data / "classes.txt").write_text("a\nb\nc\nd\ne\n")
    shutil.copytree(place / "plain", tmp_path / "plain")
    (config,) = (tmp_path / "plain").glob("*_config.json")
    config.write_text(config.read_text().replace(str(place / "data"), str(data)))
    assert_refused(capsys, compare.main, arguments(place, plain=tmp_path / "plain"), "--plain", "other classes")


def test_a_plain_run_of_another_network_is_refused(place) -> None:
    plain, distilled = (read_run(f"--{role}", place / role) for role in ("plain", "distilled"))
    with pytest.raises(UserError, match="a run of deeplab_mobile-mobilenetv2_w0.5; the distilled run is of "
                                        f"{STUDENT}, .* expected the plain run of the same network"):
        check_pair(changed(plain, student_backbone="mobilenetv2_w0.5"), distilled)


def longer(place: Path, target: Path, role: str) -> Path:
    """A copy of a run that should have had twice as many iterations."""
    shutil.copytree(place / role, target / role)
    (config,) = (target / role).glob("*_config.json")
    content = json.loads(config.read_text())
    content["config"]["max_iterations"] *= 2
    config.write_text(json.dumps(content))
    return target / role


def without_records(run: Path, kind: str, step: int) -> Path:
    """The run, whose log loses the records of a kind and a step."""
    (log,) = (run / "logs").glob("*.jsonl")
    kept = [line for line in log.read_text().splitlines() if not
            ((record := json.loads(line))["kind"] == kind and record["step"] == step)]
    log.write_text("".join(line + "\n" for line in kept))
    return run


@pytest.mark.parametrize("role", ["plain", "distilled", "teacher"])
def test_an_unfinished_run_is_refused_before_anything_is_evaluated(place, tmp_path, capsys, monkeypatch, role) -> None:
    monkeypatch.setattr(compare, "evaluate_all", None)
    run = longer(place, tmp_path, "plain" if role == "teacher" else role)
    for best in run.glob("*_best_model.pth"):
        best.unlink()  # which a run has after its first validation
    assert_refused(capsys, compare.main, arguments(place, **{role: run}), f"--{role} {run}: an unfinished run, at step "
                   "6 of 12; expected a finished one", "--resume auto")


def test_how_far_a_run_is_says_the_training_state_where_the_log_does_not(place, tmp_path) -> None:
    run = longer(place, tmp_path, "plain")
    for kind in ("train", "val"):
        without_records(run, kind, 6)
    with pytest.raises(UserError, match="at step 6 of 12"):
        read_run("--plain", run)
    for state in run.glob("*_state*.pth"):
        state.write_bytes(b"")
    with pytest.raises(UserError, match="at step 5 of 12"):
        read_run("--plain", run)
    shutil.copytree(place / "distilled", tmp_path / "skipped")  # its last step was not finite
    assert read_run("--distilled", without_records(tmp_path / "skipped", "train", 6)).digest["iterations"] == 5


def test_a_run_whose_last_validation_is_still_to_come_is_unfinished(place, tmp_path) -> None:
    shutil.copytree(place / "plain", tmp_path / "plain")
    with pytest.raises(UserError, match="at step 6 of 6 and before its last validation"):
        read_run("--plain", without_records(tmp_path / "plain", "val", 6))
    assert read_run("--plain", without_records(tmp_path / "plain", "val", 3)).digest["curve"] == []


@pytest.mark.parametrize(("records", "words"), [
    ("", "no trained iteration"), ('{"kind": "train", "step": 1, "raw": {}}\n', "have no 'load'")])
def test_a_log_that_says_too_little_is_refused(place, tmp_path, records, words) -> None:
    shutil.copytree(place / "plain", tmp_path / "plain")
    (log,) = (tmp_path / "plain" / "logs").glob("*.jsonl")
    log.write_text(records)
    with pytest.raises(UserError, match=words):
        compare.main(arguments(place, plain=tmp_path / "plain"))


def test_a_run_without_validation_has_other_weights(place, tmp_path) -> None:
    shutil.copytree(place / "plain", tmp_path / "plain")
    (best,) = (tmp_path / "plain").glob("*_best_model.pth")
    best.unlink()
    with pytest.raises(UserError, match="--weights last"):
        compare.main(arguments(place, plain=tmp_path / "plain"))
