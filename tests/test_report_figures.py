"""The figures of ``tools/report.py`` worked out by hand, what it compares, and what it warns of."""
from __future__ import annotations

import numpy as np
import pytest
from result_files import KD, LONG, NONE, OURS, STUDENT, TEACHER, by_name, example, make_result, runs

from tools.reporting.cautions import notes, time_notes, warnings
from tools.reporting.figures import Clock, coverage, equal_time, figures, gain
from tools.reporting.groups import Group, groups
from tools.reporting.pages import render
from utils.errors import UserError

R101, R18 = ("deeplabv3", "resnet101"), ("deeplabv3", "resnet18")


@pytest.fixture(scope="module")
def results() -> list[dict]:
    return example()


def only(results: list[dict], protocol: str = "p-1", **more) -> Group:
    group, = groups(results, protocol, **more)
    return group


def row_of(group: Group, label: str):
    return next(row for row in group.rows if row.label == label)


# figures

def test_means_spreads_and_gains_are_those_worked_out_by_hand(results) -> None:
    group = only(results)
    found = {one.name: one for one in figures(group, Clock.of(group))}
    assert list(found) == ["teacher", "none", "none-long", "kd", "afdcd"]
    ours = found["afdcd"]
    assert (ours.mean, ours.std) == (pytest.approx(27), pytest.approx(2)) and group.split == "test"
    assert ours.plain.mean == pytest.approx(5) and ours.kd.mean == pytest.approx(5)
    assert found["kd"].plain.mean == pytest.approx(0) and found["kd"].kd is None and found["none"].plain is None
    assert found["teacher"].mean == pytest.approx(60) and found["teacher"].std is found["teacher"].plain is None


def test_constant_differences_have_an_interval_without_width() -> None:
    one = gain({0: 25.0, 1: 27.0, 2: 29.0}, {0: 20.0, 1: 22.0, 2: 24.0})
    assert one.paired and one.interval == (5, 5)


def test_three_seeds_reach_from_the_least_to_the_largest_difference() -> None:
    one = gain({0: 21.0, 1: 23.0, 2: 29.0}, {0: 20.0, 1: 20.0, 2: 20.0})
    assert one.interval == (1, 9) and one.mean == pytest.approx(13 / 3)


def test_more_seeds_have_the_percentiles_of_the_binomial() -> None:
    """Twelve differences, six 0 and six 1: twelve times the mean is binomial, with percentiles 3 and 9."""
    one = gain({s: float(s % 2) for s in range(12)}, dict.fromkeys(range(12), 0.0))
    assert one.interval == (pytest.approx(3 / 12), pytest.approx(9 / 12))


@pytest.mark.parametrize(("seeds", "text"), [
    ((1, 1), "n seeds:"), ((3, 3), "n seeds [bootstrap interval, of few seeds]:"),
    ((5, 24), "n seeds [bootstrap interval, of few seeds]:"), ((24, 24), "n seeds [95 % bootstrap interval]:")])
def test_the_title_of_a_table_says_what_its_brackets_are(seeds, text) -> None:
    rows = [make_result(label, seed, 40 + seed) for label, count in zip(("kd", "dist"), seeds, strict=True)
            for seed in range(count)]
    found = render("gains p-1", [*rows, *(make_result("none", seed, 30) for seed in range(max(seeds)))])
    assert text in " ".join(found.split("|")[0].split())


@pytest.mark.parametrize(("seeds", "t"), [(3, 4.303), (5, 2.776), (10, 2.262)])
def test_the_coverage_is_that_of_the_t_distribution(seeds, t) -> None:
    """A bootstrap interval reaches about 1.96 sqrt((n - 1) / n) standard errors, Student's ``t`` in 95 of 100 cases."""
    assert coverage(seeds) < 0.95
    samples = np.random.default_rng(1).standard_normal((100_000, seeds))
    ratio = abs(samples.mean(1)) / samples.std(1, ddof=1) * seeds ** 0.5
    assert (ratio <= t).mean() == pytest.approx(0.95, abs=0.004)
    assert (ratio <= 1.96 * ((seeds - 1) / seeds) ** 0.5).mean() == pytest.approx(coverage(seeds), abs=0.008)


def test_the_coverage_is_about_that_of_the_intervals() -> None:
    held = []
    for values in np.random.default_rng(2).standard_normal((500, 5)):
        low, high = gain(dict(enumerate(values)), dict.fromkeys(range(5), 0.0)).interval
        held.append(low <= 0 <= high)
    assert np.mean(held) == pytest.approx(coverage(5), abs=0.045)  # and not 0.95


def test_only_common_seeds_count() -> None:
    one = gain({0: 10.0, 1: 12.0, 2: 14.0, 3: 99.0}, {2: 12.0, 1: 11.0, 0: 10.0, 4: 0.0})
    assert one.paired and one.seeds == (3, 3) and one.mean == pytest.approx(1) and one.interval == (0, 2)


def test_without_common_seeds_each_side_is_resampled_alone() -> None:
    one = gain({0: 10.0, 1: 12.0, 2: 11.0}, {5: 1.0, 6: 1.0, 7: 1.0})
    assert not one.paired and one.seeds == (3, 3) and one.mean == pytest.approx(10) and one.interval == (9, 11)


def test_an_interval_is_the_same_every_time() -> None:
    ours, theirs = ({seed: 20 + base * seed ** 0.5 for seed in range(9)} for base in (2.0, 1.3))
    assert len({gain(ours, theirs).interval for _ in range(3)}) == 1


def test_below_three_seeds_there_is_no_interval() -> None:
    assert gain({0: 3.0, 1: 4.0}, {0: 1.0, 1: 1.0, 2: 2.0}).interval is None
    assert gain({0: 3.0, 1: 3.0, 2: 3.0}, {3: 1.0, 4: 1.0}).interval is None


def test_the_plain_run_of_equal_time_is_the_closest_one(results) -> None:
    group = only(results)
    same = equal_time(group, row_of(group, "afdcd"), Clock.of(group))
    assert same.plain.label == "none-long" and same.ratio == pytest.approx(150 / 160)
    assert same.gain.mean == pytest.approx(-4)
    assert equal_time(group, row_of(group, "kd"), Clock.of(group)) is None  # 50 against 80 seconds


@pytest.mark.parametrize(("seconds", "is_equal"), [(131, True), (130, False), (176, True), (177, False)])
def test_equal_means_within_fifteen_percent(seconds, is_equal) -> None:
    # 150 is 1.145, 1.154, 0.852 and 0.847 times as long
    group = only([*runs("none", NONE, seconds=150), *runs("afdcd", OURS, seconds=seconds)])
    assert (equal_time(group, row_of(group, "afdcd"), Clock.of(group)) is not None) == is_equal


def test_another_machine_is_not_compared_by_time() -> None:
    group = only([*runs("none", NONE), *runs("afdcd", OURS, hardware={"cpu": "another"})])
    assert equal_time(group, row_of(group, "afdcd"), Clock.of(group)) is None
    assert "Machines differ: a CPU, 1 process of 1 thread in none; another" in " ".join(
        time_notes(group, Clock.of(group)))


def test_times_are_compared_machine_by_machine() -> None:
    other = {"hardware": {"cpu": "another"}}
    group = only([*runs("none", NONE), make_result("none-long", 0, 50, 30, iterations=300, seconds=150),
                  make_result("none-long", 1, 50, 30, iterations=300, seconds=330, **other),
                  make_result("afdcd", 0, 50, 40, seconds=160), make_result("afdcd", 1, 50, 40, seconds=300, **other),
                  make_result("kd", 0, 50, 40, seconds=300, **other)])
    clock, long = Clock.of(group), row_of(group, "none-long")
    same = equal_time(group, row_of(group, "afdcd"), clock)
    assert same.plain is long and same.ratio == pytest.approx((150 / 160 + 330 / 300) / 2)
    assert equal_time(group, row_of(group, "kd"), clock).ratio == pytest.approx(1.1)
    found = {one.name: one.times_plain for one in figures(group, clock)}
    assert (found["afdcd"], found["kd"]) == (pytest.approx(160 / 50), None)


def test_on_a_shared_cpu_times_are_cpu_seconds() -> None:
    # one thread: 1 on its own; what is more may be its loading process or another run
    group = only([*runs("none", NONE, load=1.2), *runs("afdcd", OURS, load=1.3, cpu_seconds=60)])
    clock = Clock.of(group)
    assert clock.cpu and clock.seconds(row_of(group, "none")) == pytest.approx(40)
    assert clock.speed(row_of(group, "none")) == pytest.approx(100 * 8 / 40)
    assert "runs of afdcd may have shared their machine." in " ".join(time_notes(group, clock))
    assert by_name(render("cost p-1", [run for row in group.rows for run in row.runs]))["afdcd"]["× `none`"] == "1.50"


@pytest.mark.parametrize(("load", "others"), [(3.3, 600), (None, 600), (2.0, 4001), (2.0, None)])
def test_on_a_shared_gpu_times_are_not_shown(load, others) -> None:
    gpu = {"hardware": {"gpu": "a GPU", "threads": 16}}  # kept at work by two threads and one loading process
    results = [*runs("none", NONE, load=3.2, others=0, **gpu), *runs("afdcd", OURS, load=load, others=others, **gpu)]
    table = by_name(render("cost p-1", results))
    assert (table["none"]["s"], table["none"]["images/s"]) == ("50", "16.0")
    assert (table["afdcd"]["s"], table["afdcd"]["images/s"], table["afdcd"]["× `none`"]) == ("busy", "-", "-")
    assert by_name(render("gains p-1", results))["afdcd"]["at equal time"] == "-"


def test_times_that_differ_within_a_row_are_told() -> None:
    group = only([*runs("none", NONE), make_result("kd", 0, 50, 30, cpu_seconds=80, load=9),
                  make_result("kd", 1, 50, 30, cpu_seconds=100, load=9)])
    assert "the longest over the shortest: kd 1.25×." in " ".join(time_notes(group, Clock.of(group)))
    even = only([*runs("none", NONE), *(make_result("kd", seed, 50, 30, seconds=50 + 7 * seed) for seed in (0, 1))])
    assert not time_notes(even, Clock.of(even))


def test_stages_before_training_count(results) -> None:
    group = only([*runs("none", NONE, seconds=150), *runs("maskd", OURS, seconds=100, stages=60)])
    assert Clock.of(group).seconds(row_of(group, "maskd")) == pytest.approx(160)


def test_a_teacher_trained_on_a_gpu_has_no_cpu_seconds(results) -> None:
    shared = [run | {"load": 9.0} for run in results]
    shared[-1]["hardware"] = {**shared[-1]["hardware"], "gpu": "a GPU"}
    table = by_name(render("cost p-1", shared))
    assert (table["teacher"]["CPU s"], table["none"]["CPU s"]) == ("-", "40")


def test_published_figures_belong_to_their_networks_method_and_protocol() -> None:
    def found(**more) -> list[float | None]:
        results = [run for label in ("none", "afdcd", "afdcd-fd", "kd") for run in runs(
            label, NONE, method=label.split("-")[0], **{"student": R18, "teacher": R101, "protocol": "paper", **more})]
        group = only(results, results[0]["protocol"])
        return [one.published for one in figures(group, Clock.of(group))]

    assert found() == [66.92, None, 69.27, None]  # the order of rows; KD has no figure on CamVid
    assert found(protocol="paper-2") == found(student=STUDENT) == [None] * 4
    assert found(teacher=TEACHER) == [66.92, None, None, None]


def test_the_difference_to_the_published_figure_is_shown() -> None:
    results = [*runs("none", (66.0, 67.0), student=R18, protocol="paper"),
               make_result("none", 0, 70, 70.84, student=R101, protocol="paper", weights="t0"),
               *runs("afdcd", (69.0, 70.0), student=R18, teacher=R101, protocol="paper")]
    table = by_name(render("gains paper", results))
    assert [table[name]["published"] for name in ("teacher", "none", "afdcd")] == ["69.84", "66.92", "69.27"]
    assert [table[name]["difference"] for name in ("teacher", "none", "afdcd")] == ["+1.00", "-0.42", "+0.23"]


# what is compared

def test_only_one_protocol_data_set_and_student_is_a_table(results) -> None:
    more = [*results, *runs("none", NONE, protocol="p-2"), *runs("none", NONE, dataset="toy"),
            *runs("none", NONE, student=R18)]
    assert [(g.dataset, g.student) for g in groups(more, "p-1")] == [
        ("camvid", "deeplabv3_resnet18"), ("camvid", "deeplabv3_resnet18_w0.25"), ("toy", "deeplabv3_resnet18_w0.25")]
    taught = [*results, *runs("kd", KD, student=TEACHER, teacher=R101)]  # a teacher that is a student too
    assert [g.student for g in groups(taught, "p-1")] == ["deeplab_mobile_mobilenetv2", "deeplabv3_resnet18_w0.25"]
    assert only(more, dataset="toy").rows[0].seeds == (0, 1, 2)
    assert only(more, student="deeplab_mobile_mobilenetv2").rows[0].scores("test") == {0: pytest.approx(60)}


def test_the_teachers_row_is_the_training_of_its_file_in_any_protocol() -> None:
    teachers = [make_result("none", seed, 70, 60 + seed, student=TEACHER, weights=f"t{seed}", protocol="t")
                for seed in range(3)]
    group = only([*runs("kd", KD, teacher_file="t2"), *teachers])
    assert group.exact and not notes(group) and group.teachers[0].scores("test") == {2: pytest.approx(62)}
    teachers[0]["weights"]["half"] = "t0 in half precision"
    group = only([*runs("kd", KD, teacher_file="t0 in half precision"), *teachers])
    assert group.exact and group.teachers[0].seeds == (0,)
    for protocol in ("p-1", "t"):
        group = only([*runs("kd", KD, teacher_file="other", protocol=protocol), *teachers], protocol)
        assert group.teachers[0].seeds == (0, 1, 2) and "not the very file" in notes(group)[0]


def test_of_two_trainings_of_the_same_weights_that_of_the_protocol_is_the_teachers_row() -> None:
    for others in ("a", "z"):
        same = [make_result("none", 0, 70, 60, student=TEACHER, weights="t0", protocol=name, iterations=steps)
                for name, steps in (("p-1", 100), (others, 200))]
        teacher, = only([*runs("kd", KD), *same]).teachers
        assert [run["iterations"] for run in teacher.runs] == [100]


def test_two_teachers_have_rows_of_their_own() -> None:
    results = [*runs("none", NONE), *runs("kd", KD), *runs("afdcd", OURS),
               *runs("kd", (26.0, 28.0, 30.0), teacher=R101), *runs("afdcd", OURS, teacher=R101)]
    table = by_name(render("gains p-1", results))
    assert table["afdcd (deeplabv3_resnet101)"]["over `kd`"].startswith("-1.00")
    assert table["afdcd (deeplab_mobile_mobilenetv2)"]["over `kd`"].startswith("+5.00")
    own = make_result("none", 0, 60, 60, student=TEACHER)  # the training of one teacher is no row of the other's table
    one = by_name(render("gains p-1 teacher=deeplabv3_resnet101", [*results, own]))
    assert set(one) == {"none", "kd", "afdcd"} and one["afdcd"]["over `kd`"].startswith("-1.00")


def test_a_split_that_chose_is_reported_only_where_there_is_no_other() -> None:
    assert only([make_result("none", 0, 40, 30)]).split == "test"
    assert only([make_result("none", 0, 40, 30)], split="val").split == "val"
    assert only([make_result("none", 0, 40)]).split == only([make_result("none", 0, 40, 30), make_result(
        "kd", 0, 40)]).split == "val"


@pytest.mark.parametrize(("change", "message"), [
    ({"scores": {}}, "afdcd/0 has no scores"), ({"classes": ["sky"]}, "differ in their classes"),
    ({"scores": {"other": {}}}, "no split in common")])
def test_results_that_do_not_belong_together_are_refused(change, message) -> None:
    with pytest.raises(UserError, match=message):
        groups([make_result("none", 0, 40), make_result("afdcd", 0, 40) | change], "p-1")


def test_a_label_is_one_method() -> None:
    with pytest.raises(UserError, match="differ in their method"):
        groups([make_result("x", 0, 40, method="kd"), make_result("x", 1, 40, method="dist")], "p-1")


# warnings

def test_rows_of_one_protocol_have_nothing_to_warn_of(results) -> None:
    group = only(results)
    assert not warnings(group) and not notes(group) and not time_notes(group, Clock.of(group))


@pytest.mark.parametrize(("flags", "sentence"), [
    ("--crop-size 200", "`crop_size` differs: 176×176 in none; 200×200 in afdcd"),
    ("--batch-size 4", "`batch_size` differs: 8 in none; 4 in afdcd"),
    ("--weight-decay 5e-4", "`weight_decay` differs: 0.0001 in none; 0.0005 in afdcd"),
    ("--optimizer adamw --lr 0.02 --weight-decay 1e-4", "`optimizer` differs: sgd in none; adamw in afdcd"),
    ("--class-weights auto", "`class_weights` differs: none in none; auto in afdcd"),
    ("--train-list /a/37.txt", "`train_list` differs: none in none; 37.txt in afdcd"),
    ("--no-random-scale", "`random_scale` differs"), ("--aux-weight 0", "`aux_weight` differs"),
    ("--no-aux", "`aux` differs: none in none; false in afdcd"),
    ("--val-per-iters 10", "`val_per_iters` differs"), ("--warmup 5", "`warmup` differs"),
    ("--lr 0.01", "`lr` differs"), ("--poly-power 1", "`poly_power` differs"), ("--amp bf16", "`amp` differs"),
    ("--selection-split test", "`selection_split` differs: none in none; test in afdcd"),
    ("--student-pretrained-base /a/b.pth", "`student_pretrained_base` differs: none in none; b.pth in afdcd")])
def test_a_setting_that_differs_is_named_with_its_rows(flags, sentence) -> None:
    text, = warnings(only([*runs("none", NONE), *runs("afdcd", OURS, flags=tuple(flags.split()))]))
    assert text.startswith("**Warning**, ") and sentence in text


def test_the_same_file_in_another_folder_is_the_same() -> None:
    assert not warnings(only([*runs("none", NONE, flags=("--student-pretrained-base", "/a/b.pth")),
                              *runs("kd", KD, flags=("--student-pretrained-base", "c/b.pth"))]))


def test_own_images_are_told_by_the_name_of_their_folder() -> None:
    def results(*folders: str, dataset: str = "folder") -> list[dict]:
        return [make_result(label, 0, 40, dataset=dataset, flags=("--data", folder))
                for label, folder in zip(("none", "kd"), folders, strict=True)]

    assert not warnings(only(results("/one/shoes", "/two/shoes")))
    assert not warnings(only(results("/one/CamVid", "/two/camvid", dataset="camvid")))
    text, = warnings(only(results("/one/shoes", "/one/hats")))
    assert "`data` differs: shoes in none; hats in kd." in text


def test_iterations_may_differ_in_longer_plain_runs_only() -> None:
    base = runs("none", NONE)
    assert not warnings(only([*base, *runs("none-long", LONG, iterations=101)]))
    for label in ("none-short", "afdcd"):
        text, = warnings(only([*base, *runs(label, LONG, iterations=99)]))
        assert f"iterations differ: 100 in none; 99 in {label}." in text


def test_seeds_of_a_row_that_differ_are_named() -> None:
    text, = warnings(only([make_result("none", 0, 40), make_result("none", 1, 40, flags=("--lr", "0.5"))]))
    assert "0.02 in none; 0.5 in none" in text


def test_settings_that_changed_while_a_run_went_on_are_named() -> None:
    change = {"step": 50, "setting": "lr", "before": 0.02, "after": 0.5}
    text, = warnings(only([*runs("none", NONE), {**make_result("afdcd", 0, 40), "changed": [change, change]}]))
    assert text.endswith("settings or code were changed while a run went on: `lr` in afdcd.")


def test_teachers_may_differ_by_seed_but_not_by_row() -> None:
    def results(*files: str) -> list[dict]:
        return [make_result(label, seed, 40, teacher_file=f"{files[i]}{seed}") for i, label in enumerate(
            ("kd", "afdcd")) for seed in (0, 1)]

    assert not warnings(only(results("t", "t")))
    text, = warnings(only(results("t", "u")))
    assert "teacher's file differs" in text and "t0 in kd" in text and "u0 in afdcd" in text


def test_a_row_whose_runs_have_another_teacher_than_the_one_shown_is_warned_of() -> None:
    def found(*files: str) -> list[str]:
        teacher = [make_result("none", seed, 70, 60, student=TEACHER, weights=f"t{seed}") for seed in (0, 1)]
        rows = [make_result("kd", seed, 40, teacher_file=file) for seed, file in enumerate(files)]
        return warnings(only([*teacher, *runs("none", NONE), *rows]))

    assert not found("t0", "t0", "t0") and not found("t0", "t1", "t0") and not found("u0", "u0")
    text, = found("t0", "t0", "u0")
    assert text.endswith("t0 in kd (seed 0, 1); u0 in kd (seed 2).") and "learned from different files" in text


def images(number: int, **parts: str) -> dict:
    return {"trained_on": {"splits": {"train": {"images": number, "names": "n", "sizes": "s", "pixels": "p", **parts}}}}


@pytest.mark.parametrize(("other", "told"), [
    (images(8), None), (images(8, sizes="s2"), None), (images(8, pixels="p2"), None), ({}, None),
    (images(9), "`train` differ (with the start of a digest): 8 images (n) in none; 9 images (n) in kd."),
    (images(8, names="m"), "8 images (n) in none; 8 images (m) in kd."),
    (images(8, sizes="s2", pixels="p2"), "8 images (p) in none; 8 images (p2) in kd.")])
def test_rows_of_other_images_are_warned_of(other, told) -> None:
    """Files of other sizes, or other pixels, alone may come of another machine."""
    found = warnings(only([*(one | images(8) for one in runs("none", NONE)), *(one | other for one in runs("kd", KD))]))
    assert len(found) == (told is not None) and all(text.endswith(told) for text in found)


def test_revisions_are_listed_where_they_differ() -> None:
    other = runs("kd", KD, commit="b" * 40)
    assert "Revisions: aaaaaaa in none; bbbbbbb in kd." in notes(only([*runs("none", NONE), *other]))
    other[1]["earlier_revisions"] = [{"commit": "c" * 40, "changed": False}]
    assert "ccccccc then bbbbbbb in kd." in " ".join(notes(only([*runs("none", NONE), *other])))
    other[1].pop("earlier_revisions")
    other[0]["revision"]["changed"] = True
    assert "bbbbbbb* in kd; bbbbbbb in kd" in " ".join(notes(only([*runs("none", NONE), *other])))


def test_code_that_was_not_committed_is_marked_in_any_case() -> None:
    rows = runs("none", NONE)
    assert not notes(only(rows))
    for one in rows:
        one["revision"]["changed"], one["sources"] = True, {"losses/mine.py": "1a2b3c4d"}
    first, second = notes(only(rows))
    assert first == "Revision: aaaaaaa* with losses/mine.py 1a2b3c4." and second.startswith("With a star: code of tr")


@pytest.mark.parametrize(("name", "changed", "told"), [
    ("losses/mine.py", False, True), ("losses/mine.py", True, False), ("mine.py", False, False)])
def test_a_row_of_two_versions_of_a_method_is_warned_of(name, changed, told) -> None:
    """Unless each is in a commit: a file outside the repository is in none."""
    row = runs("kd", KD)
    for one, digest in zip(row, ("1a2b3c4d", "5d6e7f8a", "5d6e7f8a"), strict=False):
        one["revision"]["changed"], one["sources"] = changed, {name: digest}
    found = warnings(only([*runs("none", NONE), *row]))
    assert [text.endswith(f"not all of it committed: `{name}` in kd.") for text in found] == [True] * (not told)


def test_a_teacher_of_other_images_is_said() -> None:
    def found(folder: str, dataset: str = "toy_streets") -> list[str]:
        flags = ("--dataset", dataset, "--data")
        teacher = make_result("none", 0, 60, student=TEACHER, weights="t0", flags=(*flags, folder))
        rows = [make_result(label, 0, 40, flags=(*flags, "/here/streets")) for label in ("none", "kd")]
        return notes(only([teacher, *rows]))

    assert found("/there/streets") == [] and found("/here/camvid", "camvid") == []
    text, = found("/here/wide")
    assert text.startswith("The teacher was trained and scored in wide, the rows in streets: its score can be compared")
