"""``tools/report.py``: tables, blocks of pages, files for other programs."""
from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, assert_refused
from result_files import OURS, by_name, cells, example, make_result, runs, write_results

from engine.results import read_results
from tools import report
from tools.markdown import spread
from tools.reporting.figures import Clock, Figures, figures
from tools.reporting.groups import groups
from tools.reporting.pages import render
from utils.errors import UserError


@pytest.fixture(scope="module")
def results() -> list[dict]:
    return example()


# tables

def test_the_table_of_gains_says_all_of_it(results) -> None:
    text = render("gains p-1", results)
    assert by_name(text)["afdcd"] == {
        "run": "afdcd", "n": "3", "mIoU test %": "27.00 ± 2.00", "val %": "50.00 ± 0.00",
        "over `none`": "+5.00 [+5.00, +5.00]",
        "over `kd`": "+5.00 [+4.00, +6.00]", "at equal time": "-4.00 [-5.00, -3.00]", "plain run": "none-long",
        "plain's time": "0.94×", "iterations": "100"}
    assert by_name(text)["kd"]["at equal time"] == "-" and by_name(text)["teacher"]["mIoU test %"] == "60.00"
    brief = by_name(render("gains p-1 brief rows=afdcd,none", results))
    assert list(brief) == ["teacher", "afdcd", "none"] and "over `kd`" not in brief["afdcd"]
    assert brief["afdcd"]["at equal time"] == "-4.00 [-5.00, -3.00]"


def test_gains_of_common_seeds_only_say_their_number(results) -> None:
    more = [*results, make_result("afdcd", 3, 50, 90)]  # no plain run has this seed
    assert by_name(render("gains p-1", more))["afdcd"]["over `none`"] == "+5.00 [+5.00, +5.00] (n 3)"
    less = [run for run in results if (run["label"], run["seed"]) != ("afdcd", 2)]
    assert by_name(render("gains p-1", less))["afdcd"]["over `none`"] == "+5.00"


def test_gains_without_a_common_seed_say_both_numbers(results) -> None:
    other = [run for run in results if run["label"] != "afdcd"] + [make_result("afdcd", 7, 50, 32)]
    assert by_name(render("gains p-1", other))["afdcd"]["over `none`"] == "+10.00 (n 1, 3)"


def test_intervals_of_few_seeds_have_a_note(results) -> None:
    def said(what: str, found: list[dict[str, Any]]) -> str:
        return " ".join(render(what, found).replace("\n  ", " ").split())

    assert "about 75 (3 seeds) of 100 cases, not in 95. Those of three seeds" in said("gains p-1", results)
    assert "too narrow" not in said("gains p-1 brief", results)
    more = [*runs("none", (20.0,) * 24), *runs("afdcd", (20.0, 21.0, 22.0, 23.0, 24.0)), *runs("kd", (20.0, 30.0) * 12)]
    assert "(5 seeds) of 100 cases, not in 95." in said("gains p-1", more)
    assert "three seeds" not in said("gains p-1", more)
    assert "too narrow" not in said("gains p-1", [run for run in more if run["label"] != "afdcd"])


def test_a_title_says_how_large_the_training_was(results) -> None:
    assert "crop 176 × 176, batch 8, 100 iterations" in " ".join(render("gains p-1", results).split())


def test_the_table_of_costs_has_times_speeds_and_the_most_memory(results) -> None:
    assert by_name(render("cost p-1", results))["afdcd"] == {
        "run": "afdcd", "n": "3", "iterations": "100", "s": "160", "× `none`": "3.20", "images/s": "5.0",
        "peak memory MB": "502"}


def test_the_table_of_classes_has_a_column_per_row(results) -> None:
    assert cells(render("classes p-1 rows=none,afdcd", results)) == [
        {"class": "road", "teacher": "55.0", "none": "17.0", "afdcd": "22.0"},
        {"class": "car", "teacher": "65.0", "none": "27.0", "afdcd": "32.0"},
        {"class": "mIoU", "teacher": "60.0", "none": "22.0", "afdcd": "27.0"}]


def scanned(**scores: dict[str, float]) -> list[dict]:
    return [make_result(f"{method}+{value}", 0, val, 99, method=method, weight=float(value), protocol="p-1-scan")
            for method, found in scores.items() for value, val in found.items()]


def test_a_scan_shows_the_split_that_chooses_and_the_best_value_bold() -> None:
    results = scanned(afdcd={"2e-4": 30, "1e-3": 31, "5e-5": 29}, cwd={"50": 20, "3": 20})
    text = render("scan p-1-scan", results)
    assert cells(text) == [
        {"method": "afdcd", "weights of": "fd", "trials": "3", "trial 1": "5e-5: 29.00", "trial 2": "2e-4: 30.00",
         "trial 3": "**1e-3: 31.00**"},
        {"method": "cwd", "weights of": "fd", "trials": "2", "trial 1": "**3: 20.00**", "trial 2": "50: 20.00",
         "trial 3": "-"}]
    assert "mIoU on val" in text and "different numbers of trials" in text
    assert "different" not in render("scan p-1-scan", scanned(afdcd={"1": 30, "2": 31}, cwd={"1": 20, "3": 20}))
    assert cells(render("scan p-1-scan brief", results))[0]["chosen"] == "1e-3: 31.00"


def test_a_scan_needs_values_in_its_labels() -> None:
    with pytest.raises(UserError, match=r"p-1-scan/.*/afdcd/0: expected a label METHOD\+VALUE"):
        render("scan p-1-scan", runs("afdcd", OURS, protocol="p-1-scan"))


# pages

PAGE = """# Page

```
<!-- report: gains of-an-example -->
```
<!-- report: gains p-1 -->
what was here
<!-- end of report -->
Text.
<!-- report: cost p-1 brief -->
<!-- end of report -->
"""


@pytest.fixture
def page(tmp_path, results) -> tuple[Path, list[str]]:
    """A page, and the flags to fill it."""
    write_results(tmp_path / "results", results)
    (tmp_path / "page.md").write_text(PAGE)
    return tmp_path / "page.md", ["--results", str(tmp_path / "results"), "--pages", str(tmp_path / "page.md")]


def test_blocks_are_filled_and_the_rest_stays(page, results, capsys) -> None:
    path, argv = page
    assert report.main([*argv, "--check"]) == 1 and path.read_text() == PAGE
    assert re.findall(r"page\.md:(\d+: .*)", capsys.readouterr().out) == [
        "6: gains p-1: out of date", "10: cost p-1 brief: out of date"]
    assert report.main(argv) == 0
    text = path.read_text()
    assert text == PAGE.replace("what was here", render("gains p-1", results) + "\n").replace(
        "brief -->\n", f"brief -->\n{render('cost p-1 brief', results)}\n\n")
    assert report.main([*argv, "--check"]) == 0 and report.main(argv) == 0 and path.read_text() == text


def test_a_new_result_makes_a_table_stale(page, tmp_path, capsys) -> None:
    path, argv = page
    report.main(argv)
    write_results(tmp_path / "results", [make_result("afdcd", 3, 50, 40)])
    capsys.readouterr()
    assert report.main([*argv, "--check"]) == 1 and "page.md:6: gains p-1" in capsys.readouterr().out


@pytest.mark.parametrize(("line", "words"), [
    ("<!-- report: gains p-9 -->", ["page.md:6: no results of protocol 'p-9'"]),
    ("<!-- report: gains p-1 dataset=voc -->", ["page.md:6: no results", "dataset 'voc'"]),
    ("<!-- report: gains p-1 teacher=swin -->", ["page.md:6: no results", "teacher 'swin'"]),
    ("<!-- report: gains p-1 rows=none,dist -->", ["page.md:6: no row dist", "afdcd, kd, none"]),
    ("<!-- report: gains p-1 split=train -->", ["page.md:6:", "no scores of split 'train'", "val, test"]),
    ("<!-- report: gain p-1 -->", ["page.md:6:", "KIND of gains, classes, scan, cost, terms, curve"]),
    ("<!-- report: gains -->", ["page.md:6:", "KIND PROTOCOL"]),
    ("<!-- report: gains p-1 short -->", ["page.md:6:", "brief"]),
    ("<!-- report: scan p-1 -->", ["page.md:6:", "ends in -scan"]),
    ("<!-- report: gains p-1 -->\n<!-- report: gains p-1 -->", ["page.md:6:", "has no <!-- end of report -->"]),
    ("text", ["page.md:8:", "without a beginning"])])
def test_a_block_that_cannot_be_filled_is_named_with_its_line(page, capsys, line, words) -> None:
    path, argv = page
    text = PAGE.replace("<!-- report: gains p-1 -->", line)
    path.write_text(text)
    assert_refused(capsys, report.main, argv, *words)
    assert path.read_text() == text


def test_a_copied_result_is_refused(page, tmp_path, capsys) -> None:
    shutil.copytree(tmp_path / "results" / "p-1", tmp_path / "results" / "p-1-copy")
    assert_refused(capsys, report.main, page[1], "two result files hold the run p-1/camvid/")


@pytest.mark.parametrize(("argv", "words"), [
    (["--csv", "x.csv"], ["--protocol"]), (["--protocol", "p-1"], ["--csv"]),
    (["--protocol", "p-1", "--csv", "x.csv", "--check"], ["--check"]), (["--split", "val"], ["--split"]),
    (["--results", "no-such-folder"], ["no-such-folder"]), (["--pages", "no-such-page.md"], ["no-such-page.md"])])
def test_flags_that_do_not_fit_are_refused(capsys, argv, words) -> None:
    assert_refused(capsys, report.main, argv, *words)


def test_a_file_that_is_no_result_is_named(page, tmp_path, capsys) -> None:
    (tmp_path / "results" / "other.json").write_text("[]")
    assert_refused(capsys, report.main, page[1], "other.json")


def test_the_pages_of_the_repository_agree_with_its_results() -> None:
    assert report.main(["--check"]) == 0


def test_the_figures_of_the_readme_are_those_of_the_results() -> None:
    def rows(protocol: str, **which: str) -> dict[str, Figures]:
        group, = groups(read_results(ROOT / "results", protocol), protocol, **which)
        return {one.name: one for one in figures(group, Clock.of(group))}

    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    toy, few = rows("toy-5"), rows("camvid-few-3")
    full = rows("camvid-cpu-1", teacher="deeplab_mobile_mobilenetv2")
    names = {"plain": "none", "KD": "kd-tuned", "Af-DCD": "afdcd-tuned", "DIST": "dist"}
    assert ", ".join(f"{name} {spread(toy[row].scores, '.1f')}" for name, row in names.items()) in text
    cwd, afdcd, with_ten, afdcd_with_ten = (f"{row.plain.mean:.1f}" for row in (
        full["cwd"], full["afdcd"], few["cwd"], few["afdcd"]))
    assert f"CWD gains {cwd} points, Af-DCD {afdcd}, with ten labels {with_ten} and {afdcd_with_ten}" in text
    assert f"at equal time only CWD's {few['cwd'].same_time.gain.mean:.1f}" in text


def test_a_table_that_was_changed_by_hand_is_found_among_the_pages_of_the_repository(tmp_path, capsys) -> None:
    if (ROOT / "results").is_dir():
        shutil.copytree(ROOT / "results", tmp_path / "results")
    write_results(tmp_path / "results", [make_result("none", 0, 40, 30, protocol="of-this-test")])
    pages = [Path(shutil.copy(path, tmp_path)) for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    readme = pages[0].read_text()
    pages[0].write_text(f"{readme}<!-- report: gains of-this-test -->\n<!-- end of report -->\n")
    argv = ["--results", str(tmp_path / "results"), "--pages", *map(str, pages)]
    assert report.main(argv) == 0 and report.main([*argv, "--check"]) == 0
    assert pages[0].read_text().startswith(readme)
    pages[0].write_text(pages[0].read_text().replace("30.00", "31.00"))
    capsys.readouterr()
    assert report.main([*argv, "--check"]) == 1
    stale, = capsys.readouterr().out.splitlines()
    assert stale.endswith("gains of-this-test: out of date") and "README.md" in stale


# files for other programs

@pytest.fixture
def exported(tmp_path, results) -> tuple[str, str]:
    """CSV and LaTeX of the protocol."""
    write_results(tmp_path / "results", results)
    paths = tmp_path / "out" / "a.csv", tmp_path / "out" / "a.tex"
    assert report.main(["--results", str(tmp_path / "results"), "--protocol", "p-1", "--csv", str(paths[0]), "--latex",
                        str(paths[1])]) == 0
    return paths[0].read_text(), paths[1].read_text()


def test_the_csv_file_holds_the_figures(exported) -> None:
    lines = {line["label"]: line for line in csv.DictReader(exported[0].splitlines())}
    assert list(lines) == ["teacher", "none", "none-long", "kd", "afdcd"]
    ours = lines["afdcd"]
    wanted = {"miou": 27, "miou_std": 2, "over_none": 5, "over_none_low": 5, "over_kd_low": 4, "over_kd_high": 6,
              "over_equal_time": -4, "equal_time_ratio": 150 / 160, "seconds": 160, "images_per_second": 5}
    assert {key: float(ours[key]) for key in wanted} == pytest.approx(wanted)
    assert (ours["seeds"], ours["equal_time_run"], ours["clock"], ours["published"]) == ("0 1 2", "none-long", "s", "")
    assert ours["teacher"] == "deeplab_mobile_mobilenetv2" and lines["none"]["over_none"] == ""


def test_the_teacher_is_no_plain_run_of_the_student_in_the_csv_file(exported) -> None:
    lines = list(csv.DictReader(exported[0].splitlines()))
    assert [line["label"] for line in lines if line["method"] == "none"] == ["none", "none-long"]
    assert {line["student"] for line in lines if line["label"] != "teacher"} == {"deeplabv3_resnet18_w0.25"}
    teacher, = (line for line in lines if line["label"] == "teacher")
    assert (teacher["student"], teacher["teacher"], teacher["method"], teacher["miou"]) == (
        "deeplab_mobile_mobilenetv2", "", "teacher", "60.0")


def test_the_latex_table_has_the_same_cells_in_every_row(exported) -> None:
    body = exported[1].split("\\midrule\n")[1].split("\\bottomrule")[0]
    rows = [line.removesuffix(r" \\").split(" & ") for line in body.strip().splitlines()]
    head = exported[1].split("\\toprule\n")[1].split(r" \\")[0].split(" & ")
    columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", exported[1])[1]
    assert {len(row) for row in (*rows, head, columns)} == {9}
    assert rows[-1] == ["afdcd", "$3$", r"$27.00 \pm 2.00$", "$+5.00$ $[+5.00, +5.00]$", "$+5.00$ $[+4.00, +6.00]$",
                        "$-4.00$ $[-5.00, -3.00]$", r"none-long ($0.94\times$)", "$160$", "$502$"]
    assert rows[0] == ["teacher", "$1$", "$60.00$", "--", "--", "--", "--", "$50$", "$500$"]


def test_latex_says_the_published_figure_the_difference_and_the_seeds_that_count(tmp_path) -> None:
    networks = {"student": ("deeplabv3", "resnet18"), "teacher": ("deeplabv3", "resnet101"), "protocol": "paper"}
    ours = runs("afdcd", (69.0, 70.0, 70.0), **networks)
    write_results(tmp_path / "r", [*runs("none", (66.0, 67.0), **networks), *ours])
    report.main(["--results", str(tmp_path / "r"), "--protocol", "paper", "--latex", str(tmp_path / "t.tex")])
    body = (tmp_path / "t.tex").read_text().split("\\midrule\n")[1].splitlines()
    line = body[1].removesuffix(r" \\").split(" & ")
    assert line[3] == "$+3.00$ (n 2)" and line[-2:] == ["$69.27$", "$+0.40$"]


def test_names_are_escaped_in_latex(tmp_path) -> None:
    write_results(tmp_path / "r", [make_result("a_b", 0, 40, method="kd")])
    report.main(["--results", str(tmp_path / "r"), "--protocol", "p-1", "--latex", str(tmp_path / "t.tex")])
    assert r"a\_b & " in (tmp_path / "t.tex").read_text()


# terms

def with_terms(seed: int, fd: tuple[float, ...], **more) -> dict:
    """A run of 12 iterations with these raw values of a term in iterations 2, 4, ..."""
    run = make_result("afdcd", seed, 50, 40, iterations=12, weight=0.5)
    steps = [2 * i + 2 for i in range(len(fd))]
    run["losses"] = {"step": steps, "loss": [1.0] * len(fd), "raw": {"task": [1.0] * len(fd), "fd": list(fd)},
                     "weighted": {}}
    return run | more


def test_the_table_of_terms_has_means_of_each_third() -> None:
    results = [with_terms(0, (1, 3, 5, 7, 9, 11)), with_terms(1, (3, 5, 7, 9, 11, 13))]
    task, fd = cells(render("terms p-1 student=deeplabv3_resnet18_w0.25", results))
    assert fd == {"run": "afdcd", "term": "fd", "weight": "0.5", "value, first third": "3", "value, second third": "7",
                  "value, last third": "11"}
    assert (task["term"], task["weight"]) == ("task", "1")
    assert [line["term"] for line in cells(render("terms p-1 brief", results))] == ["fd"]


def test_the_table_of_terms_has_gradients_where_they_were_measured() -> None:
    records = [{"step": step, "terms": {"fd": {"raw": 1, "weighted": 1, "gradient": gradient, "cosine": 0.5}}}
               for step, gradient in ((2, 4.0), (4, 2.0), (6, 9.0), (8, 9.0), (10, 0.3), (12, 0.2))]
    run = with_terms(0, (1, 1, 1, 1, 1, 1), diagnoses=records)
    run["losses"]["diagnostics"] = {"afdcd/positive_rank": [0.4, 0.4, 0.3, 0.3, 0.1, 0.1]}
    _, fd, rank = cells(render("terms p-1", [run]))
    assert [fd[name] for name in ("gradient, first", "gradient, last", "cosine, first", "cosine, last")] == [
        "3.00", "0.25", "0.50", "0.50"]
    assert (rank["term"], rank["weight"], rank["value, last third"], rank["gradient, last"]) == (
        "positive_rank", "-", "0.1", "-")


def test_terms_need_a_distilled_row() -> None:
    with pytest.raises(UserError, match="no distilled row"):
        render("terms p-1", runs("none", OURS))


# curves

def with_curve(seed: int, scores: dict[int, float], iterations: int = 8) -> dict:
    """A run with these scores on val."""
    run = make_result("none", seed, 50, 40, iterations=iterations)
    return run | {"curve": [{"step": step, "mIoU": score} for step, score in scores.items()]}


def test_the_table_of_curves_has_the_score_at_each_quarter() -> None:
    results = [with_curve(0, {1: 0.1, 2: 0.2, 4: 0.3, 6: 0.38, 8: 0.4}),
               with_curve(1, {2: 0.2, 4: 0.3, 6: 0.44, 8: 0.4})]
    line, = cells(render("curve p-1", results))
    assert list(line.values()) == ["none", "2", "8", "20.0 ± 0.0", "30.0 ± 0.0", "41.0 ± 4.2", "40.0 ± 0.0",
                                   "-1.0 ± 4.2"]


def test_a_quarter_between_two_validations_lies_on_their_line() -> None:
    line, = cells(render("curve p-1", [with_curve(0, {3: 0.3, 7: 0.5, 10: 0.8}, 10)]))
    assert list(line.values())[2:] == ["10", "-", "40.0", "55.0", "80.0", "25.0"]


def test_curves_name_runs_of_other_lengths() -> None:
    text = render("curve p-1", [with_curve(0, {8: 0.4}), with_curve(1, {16: 0.4}, 16)])
    assert cells(text)[0]["iterations"] == "8, 16" and "**Warning**" in text
