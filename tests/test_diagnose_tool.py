"""tools/diagnose.py: parts of a run, verdicts at the thresholds, real runs with and without records, refused input."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers import (
    assert_refused,
    assert_same,
    distil_arguments,
    records,
    train_arguments,
    write_folder_dataset,
    write_teacher,
)

import train_kd
from tools import diagnose
from tools.diagnose import AGAINST, DEAD, DROWNS, amount, report, sentence, spans, state, verdicts


def figures(gradient: float | None, cosine: float | None = 0.1, raw: float = 1.0) -> dict[str, float | None]:
    return {"raw": raw, "weighted": 2 * raw, "gradient": gradient, "cosine": cosine}


def record(step: int, **terms: tuple[float | None, ...]) -> dict:
    return {"kind": "diagnose", "step": step,
            "terms": {"task": figures(1, 1), **{name: figures(*x) for name, x in terms.items()}}}


@pytest.mark.parametrize(("gradient", "cosine", "expected"), [
    (0.0, 0.0, "absent"), (DEAD - 1e-6, -0.9, "dead"), (DEAD, 0.0, "alive"), (DROWNS, AGAINST, "alive"),
    (DROWNS + 1e-6, 0.5, "drowns"), (0.5, AGAINST - 1e-6, "against"), (None, None, "unknown"), (1.0, None, "unknown")])
def test_states_change_at_the_thresholds(gradient, cosine, expected) -> None:
    assert state(figures(gradient, cosine)) == expected


def test_what_is_said_of_a_term() -> None:
    assert sentence("fd", figures(0.35)) == "alive (35 %, cosine 0.1)"
    assert sentence("fd", figures(0.35, -0.01)) == "alive (35 %, cosine 0.0)"
    assert sentence("ctr", figures(0.003)) == ("nearly dead: its gradient is 0.3 % of the cross entropy's; raise "
                                               "--lambda-ctr or check what it compares")
    assert sentence("aux", figures(0.003)).endswith("raise --aux-weight or check what it compares")
    assert sentence("kd", figures(0.5, -0.4)).startswith("pulls against the cross entropy (cosine -0.4, 50 %); lower "
                                                         "--lambda-kd")
    assert sentence("fd", figures(12.2)) == "drowns the cross entropy (12 times, cosine 0.1); lower --lambda-fd"
    assert "(12 times, cosine -0.5), and pulls against it; lower" in sentence("fd", figures(12.2, -0.5))
    assert sentence("cwd_feat", figures(0.0, 0.0)).startswith("dead: no gradient of it reaches the student")
    assert sentence("kd", figures(None, None)).startswith("cannot be judged")
    assert [amount(x) for x in (4e-8, 0.0123, 0.999, 2.5, 3.5, 250.0)] == [
        "below 0.01 %", "1.2 %", "100 %", "250 %", "3.5 times", "250 times"]


def test_a_run_has_three_parts_with_medians() -> None:
    lines = [record(step, fd=(step / 10, 0.0, float(step))) for step in (1, 2, 3, 4, 5, 6, 7)]
    parts = spans(lines)
    assert list(parts) == ["early, steps 1-2", "middle, steps 3-5", "late, steps 6-7"]
    assert parts["early, steps 1-2"]["fd"] == pytest.approx(figures(0.15, 0.0, 1.5))
    assert parts["late, steps 6-7"]["fd"]["gradient"] == pytest.approx(0.65)
    assert list(spans(lines[:1] * 4)) == ["late, step 1"] and list(spans(lines[:2])) == ["early, step 1",
                                                                                       "late, step 2"]
    assert spans([record(1, kd=(None, None)), record(1, kd=(0.5, 0.25))])["late, step 1"]["kd"] == figures(0.5, 0.25)
    assert spans([record(1, kd=(None, None))])["late, step 1"]["kd"] == figures(None, None)


def test_the_verdict_is_of_the_end_and_names_another_beginning() -> None:
    lines = [record(1, fd=(20.0, 0.3), kd=(0.5, 0.5)), record(2, fd=(1.0, 0.3), kd=(0.5, 0.5)),
             record(3, fd=(0.35, 0.3), kd=(0.4, 0.2))]
    unknown = [record(1, kd=(None, None)), lines[2]]
    assert verdicts(spans(unknown))["kd"] == "alive (40 %, cosine 0.2)"
    assert verdicts(spans(lines)) == {
        "fd": "alive (35 %, cosine 0.3). Early in the run: drowns the cross entropy (20 times, cosine 0.3)",
        "kd": "alive (40 %, cosine 0.2)"}
    text = report(lines)
    header, rule, *rows = text.split("\n\n")[0].splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        "term", "part of the run", "raw", "weighted", "gradient / task", "cosine"]
    assert len(rows) == 9 and [cell.strip() for cell in rows[3].strip("|").split("|")] == [
        "fd", "early, step 1", "1", "2", "20 times", "0.30"]
    assert "only the cross entropy" in report([record(1)])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two runs of the same settings, with records and without."""
    folder = tmp_path_factory.mktemp("diagnose_tool")
    data, teacher = write_folder_dataset(folder / "data"), write_teacher(folder / "teacher.pth")
    for name, every in (("logged", "2"), ("silent", "0")):
        argv = train_arguments(data, folder / name, *distil_arguments(teacher, "--lambda-ctr", "0"), "--max-iterations",
                               "4", "--save-per-iters", "2", "--diagnose-every", every)
        assert train_kd.main(argv) == 0
    return folder


def test_the_log_of_a_run(place, capsys, tmp_path) -> None:
    out = tmp_path / "all.json"
    assert diagnose.main([str(place / "logged"), "--json", str(out)]) == 0
    text, content = " ".join(capsys.readouterr().out.split()), json.loads(out.read_text())
    assert "2 records from its log" in text and "| fd | early, step 2 |" in text and "| kd | late, step 4 |" in text
    assert content["records"] == records(place / "logged", "diagnose")
    assert set(content["verdicts"]) == {"fd", "kd"} and f"kd: {content['verdicts']['kd']}" in text


def test_a_log_that_lies_elsewhere_is_read_where_log_dir_says(place, capsys, tmp_path) -> None:
    """And a folder without it is an error, although the run could be measured."""
    run = shutil.copytree(place / "logged", tmp_path / "run")
    log, = (run / "logs").glob("*.jsonl")
    (tmp_path / "elsewhere").mkdir()
    log.rename(tmp_path / "elsewhere" / log.name)
    capsys.readouterr()
    assert diagnose.main([str(run), "--log-dir", str(tmp_path / "elsewhere")]) == 0
    assert "2 records from its log" in capsys.readouterr().out
    for folder, held in ((tmp_path / "nowhere", "no such folder"), (run, "no log of the run")):
        assert_refused(capsys, diagnose.main, [str(run), "--log-dir", str(folder)],
                       f"--log-dir {folder}: {held}; expected the folder that holds {log.name}, the log of the run")


def test_a_run_without_records_is_measured_now(place, capsys, tmp_path) -> None:
    """Also where its data has moved to, and without changing the run's files."""
    moved, out, run = tmp_path / "data", tmp_path / "all.json", place / "silent"
    shutil.copytree(place / "data", moved)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    argv = [str(run), "--batches", "2", "--data", str(moved), "--no-cuda", "--json", str(out)]
    capsys.readouterr()
    assert diagnose.main(argv) == 0
    text, first = capsys.readouterr().out, json.loads(out.read_text())
    assert text.startswith(f"{run}: 2 records from its training state\n\n| term")
    assert [r["step"] for r in first["records"]] == [4, 4] and first["records"][0] != first["records"][1]
    assert diagnose.main(argv) == 0
    assert_same(json.loads(out.read_text()), first)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_what_is_refused(place, capsys, tmp_path) -> None:
    assert_refused(capsys, diagnose.main, [], "required: RUN")
    assert_refused(capsys, diagnose.main, [str(tmp_path)], str(tmp_path), "expected the --save-dir of one run",
                   "(none)")
    weights = next((place / "logged").glob("*_best_model.pth"))
    assert_refused(capsys, diagnose.main, [str(weights)], "expected the --save-dir of one run",
                   "(no folder, but a file)")
    assert_refused(capsys, diagnose.main, [str(place / "logged"), "--batches", "0"], "--batches", "at least 1")
    (tmp_path / "kd_config.json").write_text('{"config": {"lambda_kd": "much"}}')
    assert_refused(capsys, diagnose.main, [str(tmp_path)], "kd_config.json", "not a configuration of a run")
    (tmp_path / "kd_config.json").write_text('{"config": {"method": "outtap", "lambda_outtap": 1.0}}')
    assert_refused(capsys, diagnose.main, [str(tmp_path)], "kd_config.json: method 'outtap' is not registered here",
                   "docs/package.md")
    (tmp_path / "kd_config.json").write_text('{"config": {"method": "kd", "lambda_outtap": 1.0}}')
    assert_refused(capsys, diagnose.main, [str(tmp_path)], "the method of its term 'outtap' is not registered here")
    (tmp_path / "other_config.json").write_text("{}")
    assert_refused(capsys, diagnose.main, [str(tmp_path)], "kd_config.json, other_config.json")
    empty = tmp_path / "started"
    empty.mkdir()
    shutil.copy(next((place / "silent").glob("*_config.json")), empty)
    assert_refused(capsys, diagnose.main, [str(empty)], "nothing to diagnose", "--diagnose-every", "_state.pth")
