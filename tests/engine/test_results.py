"""The result of a run: made of its log, whole after an interruption, refused when it is something else."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_refused, distil_arguments, train_arguments, write_folder_dataset, write_teacher

import train_kd
from engine.results import POINTS, add_weights, digest, read_log, read_result, read_results, revisions
from utils.errors import UserError
from utils.files import sha256, write_json


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    write_folder_dataset(folder / "data")
    write_teacher(folder / "teacher.pth")
    return folder


def arguments(place: Path, save: str, *more: str) -> list[str]:
    return train_arguments(place / "data", place / save, "--results", str(place / save / "results"), "--protocol",
                           "tiny-1", "--seed", "3", *more)


@pytest.fixture(scope="module")
def distilled(place) -> dict:
    assert train_kd.main(arguments(place, "distilled", *distil_arguments(place / "teacher.pth"))) == 0
    pair = "deeplabv3_mobilenetv2_w0.5".replace("deeplabv3", "deeplab_mobile") + "-deeplab_mobile_mobilenetv2_w0.25"
    return read_result(place / "distilled" / "results" / "tiny-1" / "folder" / pair / "afdcd" / "3.json")


def test_it_says_what_was_run(distilled, place) -> None:
    assert (distilled["protocol"], distilled["dataset"], distilled["label"], distilled["seed"]) == ("tiny-1", "folder",
                                                                                                 "afdcd", 3)
    assert distilled["iterations"] == 6 and distilled["settings"]["batch_size"] == 4
    assert distilled["command"]
    assert distilled["teacher"]["sha256"] == sha256(place / "teacher.pth")
    assert set(distilled["active"]) == {"kd", "fd", "ctr"}
    assert distilled["sources"] == {"losses/afdcd.py": sha256(ROOT / "losses/afdcd.py"),
                                    "losses/kd.py": sha256(ROOT / "losses/kd.py")}
    assert distilled["hardware"]["processes"] == 1 and distilled["versions"]["torch"]


def test_its_hashes_are_those_of_the_weights(distilled, place) -> None:
    stem = place / "distilled" / "kd_deeplab_mobile_mobilenetv2_w0.25_folder"
    assert distilled["weights"] == {"last": sha256(Path(f"{stem}.pth")), "best": sha256(Path(f"{stem}_best_model.pth"))}


def test_a_file_made_of_its_weights_is_added(distilled, place, tmp_path) -> None:
    result, made = tmp_path / "0.json", place / "teacher.pth"
    write_json(result, distilled)
    add_weights(result, "half", made)
    assert read_result(result) == {**distilled, "weights": {**distilled["weights"], "half": sha256(made)}}


def test_its_scores_are_those_of_the_best_validation(distilled) -> None:
    best = max(distilled["curve"], key=lambda point: point["mIoU"])
    assert [point["step"] for point in distilled["curve"]] == [3, 6]
    assert distilled["best_step"] == best["step"]
    assert distilled["scores"]["val"]["mIoU"] == pytest.approx(best["mIoU"], abs=1e-6)
    per_class = distilled["scores"]["val"]["iou_per_class"]
    assert len(per_class) == len(distilled["classes"])
    assert sum(per_class) / len(per_class) == pytest.approx(distilled["scores"]["val"]["mIoU"])


def test_time_speed_and_memory_are_measured(distilled) -> None:
    assert distilled["seconds"]["training_cpu"] > 0 and distilled["seconds"]["training"] > 0
    assert distilled["seconds"]["validation"] > 0 and distilled["images_per_second"] > 0
    assert distilled["peak_memory_mb"] > 50


def test_a_plain_run_has_no_teacher_and_a_label_of_its_own(place) -> None:
    assert train_kd.main(arguments(place, "plain", "--method", "none", "--label", "none-long")) == 0
    one, = read_results(place / "plain" / "results", "tiny-1")
    assert one["teacher"] is None and one["label"] == "none-long" and one["method"] == "none"
    path = place / "plain/results/tiny-1/folder/none-deeplab_mobile_mobilenetv2_w0.25/none-long/3.json"
    assert read_result(path) == one


def test_the_revision_is_that_of_the_start(place, monkeypatch) -> None:
    """Commits that are made while a run trains are not its code."""
    monkeypatch.setattr("engine.journal.revision", lambda: {"commit": "at the start", "changed": False})
    assert train_kd.main(arguments(place, "revision", "--method", "none", "--skip-val", "--max-iterations", "1")) == 0
    one, = read_results(place / "revision" / "results")
    assert one["revision"] == {"commit": "at the start", "changed": False}


def interrupted(place: Path, name: str, monkeypatch, now: dict[str, object], *more: str) -> list[str]:
    """Begin a run with this revision, which dies after step 4; its command line."""
    def dying(run, batch):
        if run.step == 4:
            raise KeyboardInterrupt
        return original(run, batch)

    original = train_kd.train_batch
    argv = arguments(place, name, *distil_arguments(place / "teacher.pth"), *more)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_kd, "train_batch", dying)
        patch.setattr("engine.journal.revision", lambda: now)
        train_kd.main(argv)
    return argv


def resume_with(argv: list[str], monkeypatch, now: dict[str, object], code: str = "0" * 64) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("engine.journal.revision", lambda: now)
        patch.setattr("engine.build.sources", lambda settings: {"losses/kd.py": code})
        assert train_kd.main([*argv, "--resume", "auto"]) == 0


FIRST, SECOND, THIRD = ({"commit": letter * 40, "changed": False} for letter in "abc")


def test_an_interrupted_run_has_the_same_curve(place, distilled, monkeypatch) -> None:
    argv, results = interrupted(place, "resumed", monkeypatch, FIRST), place / "resumed" / "results"
    assert not list(results.glob("**/*.json"))
    resume_with(argv, monkeypatch, SECOND)
    one, = read_results(results)
    same = ("curve", "losses", "scores", "last", "weights", "best_step")
    assert {k: one[k] for k in same} == {k: distilled[k] for k in same}
    assert revisions(one) == [FIRST, SECOND] and revisions(distilled) == [distilled["revision"]]
    shutil.rmtree(results)
    resume_with(argv, monkeypatch, THIRD, "1" * 64)  # which makes no step
    again, = read_results(results)
    assert revisions(again) == [FIRST, SECOND] and again["sources"] == one["sources"] == {"losses/kd.py": "0" * 64}


@pytest.mark.parametrize(("config", "before"), [
    (None, FIRST), ("{}", {"commit": None, "changed": None}), ("{cut off", {"commit": None, "changed": None})])
def test_an_earlier_versions_state_has_the_revision_of_its_configuration(place, monkeypatch, config, before) -> None:
    name = f"earlier-{config}"
    argv = interrupted(place, name, monkeypatch, FIRST)
    (state,), (written,) = ((place / name).glob(f"*_{kind}") for kind in ("state.pth", "config.json"))
    held = torch.load(state, weights_only=True)
    assert held.pop("revisions") == [FIRST]
    torch.save(held, state)
    if config is not None:
        written.write_text(config)
    resume_with(argv, monkeypatch, SECOND)
    assert [revisions(one) for one in read_results(place / name / "results")] == [[before, SECOND]]


def test_another_run_does_not_overwrite_it(place, capsys) -> None:
    argv = arguments(place, "kept", "--method", "none", "--max-iterations", "1", "--skip-val")
    assert train_kd.main(argv) == 0
    file, = (place / "kept" / "results").glob("**/*.json")
    before = file.read_bytes()
    assert_refused(capsys, train_kd.main, [*argv, "--lr", "0.5"], "3.json", "lr: 0.02 -> 0.5", "--label")
    assert file.read_bytes() == before
    assert train_kd.main(argv) == 0  # the same run again may


def log_of(place: Path, name: str) -> Path:
    path, = (place / name).glob("**/*.jsonl")
    return path


def test_the_times_of_a_resumed_run_are_of_all_its_iterations(place, monkeypatch) -> None:
    argv = interrupted(place, "times", monkeypatch, FIRST, "--log-iter", "4")  # saved after step 3
    assert train_kd.main([*argv, "--resume", "auto"]) == 0
    train = [r for r in read_log(log_of(place, "times")) if r["kind"] == "train"]
    assert [(r["step"], r["steps"]) for r in train] == [(4, 4), (6, 2)]


@pytest.mark.parametrize("damage", ["removed", "shortened", "renamed", "elsewhere", "shared"])
def test_a_log_that_lacks_iterations_gives_no_result(place, monkeypatch, capsys, damage) -> None:
    argv = [*interrupted(place, damage, monkeypatch, FIRST), "--resume", "auto"]
    log = log_of(place, damage)
    if damage == "removed":
        log.unlink()
    elif damage == "shortened":
        log.write_text("".join(line + "\n" for line in log.read_text().splitlines()[2:]))
    elif damage == "renamed":  # by one bit
        log.write_text(log.read_text().replace('"kind": "train"', '"kine": "train"', 1))
    else:
        state, = (place / damage).glob("*_state.pth")
        argv = [*arguments(place, "other", *distil_arguments(place / "teacher.pth")), "--resume", str(state),
                *(["--log-dir", str(log.parent)] if damage == "shared" else [])]
    before = log.read_text() if log.exists() else None
    assert_refused(capsys, train_kd.main, argv, "--results: the log", "of the run's 3 iterations so far",
                   "start anew, without --resume")
    assert (log.read_text() if log.exists() else None) == before and not list(place.glob(f"{damage}/results/**/*.json"))


def test_a_log_of_a_version_that_counted_no_steps_is_taken(place, monkeypatch) -> None:
    argv = [*interrupted(place, "uncounted", monkeypatch, FIRST), "--resume", "auto"]
    log = log_of(place, "uncounted")
    records = [{k: v for k, v in r.items() if k != "steps"} for r in read_log(log)]
    log.write_text("".join(json.dumps(r) + "\n" for r in records[1:]))
    assert train_kd.main(argv) == 0 and len(read_results(place / "uncounted" / "results")) == 1


def test_it_says_which_images_were_read(distilled) -> None:
    assert distilled["trained_on"]["splits"].keys() == {"train", "val"}
    assert distilled["trained_on"]["splits"]["train"]["images"] > 0


def test_a_log_of_an_earlier_version_gives_no_result_and_no_error(place, monkeypatch, capsys) -> None:
    monkeypatch.setattr("engine.results.read_log", lambda path: [{"kind": "train", "step": 1}])
    assert train_kd.main(arguments(place, "old", "--method", "none", "--max-iterations", "1", "--skip-val")) == 0
    assert "no result is written: the run's log lacks" in capsys.readouterr().out
    assert not list((place / "old" / "results").glob("**/*.json"))


def record(step: int, loss: float, **more: float) -> dict:
    return {"kind": "train", "step": step, "loss": loss, "raw": {"task": loss}, "weighted": {"task": 2 * loss},
            "seconds": 2.0, "cpu_seconds": 1.0, "images_per_second": 4.0, "memory_mb": 10, "load": 1.0, **more}


def test_a_long_log_is_thinned_by_means() -> None:
    records = [record(step, step % 2) for step in range(1, 10 * POINTS + 1)]
    losses = digest(records)["losses"]
    assert len(losses["step"]) == POINTS and losses["step"][-1] == 10 * POINTS
    assert losses["loss"] == [0.5] * POINTS and losses["weighted"]["task"] == [1.0] * POINTS


def test_diagnoses_and_what_methods_log_are_kept() -> None:
    terms = {"task": {"raw": 1.0, "weighted": 1.0, "gradient": 1.0, "cosine": 1.0}}
    got = digest([record(1, 1, diagnostics={"x/rank": 0.5}), {"kind": "diagnose", "step": 1, "terms": terms, "time": 3},
                  record(2, 1, diagnostics={"x/rank": 0.25, "x/new": 1.0})])
    assert got["diagnoses"] == [{"step": 1, "terms": terms}]
    assert got["losses"]["diagnostics"] == {"x/rank": [0.5, 0.25]}  # the other one was not there from the beginning


def test_seconds_add_up_and_memory_is_the_most() -> None:
    got = digest([record(1, 1), record(2, 1, memory_mb=30, load=None)])
    assert got["seconds"] == {"stages": 0, "stages_cpu": 0, "training": 4.0, "training_cpu": 2.0, "validation": 0}
    assert got["peak_memory_mb"] == 30
    assert got["load"] == 1.0 and got["scores"] == {} and got["last"] is None


def test_the_cut_last_line_of_a_log_is_dropped(tmp_path) -> None:
    (tmp_path / "log.jsonl").write_text('{"kind": "val", "step": 1}\n{"kind": "tr')
    assert read_log(tmp_path / "log.jsonl") == [{"kind": "val", "step": 1}]


def test_another_line_that_cannot_be_read_is_told(tmp_path, caplog) -> None:
    for damaged in (b'{"st', b'{"step\xe1": 2', b"5"):
        (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n' + damaged + b'\n{"step": 3}\n')
        assert read_log(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 3}]
    assert caplog.text.count("log.jsonl: line 2 cannot be read and is left out") == 3


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 99}', '{"format": 1}'])
def test_another_file_is_refused_by_name(tmp_path, content) -> None:
    (tmp_path / "0.json").write_text(content)
    with pytest.raises(UserError, match=r"0\.json.*remove it to have the run made again"):
        read_results(tmp_path)


@pytest.mark.parametrize("flags", [["--protocol", "a/b"], ["--label", "../x"], ["--label", ".."]])
def test_names_that_are_no_folder_names_are_refused(place, flags) -> None:
    with pytest.raises(UserError, match=flags[0]):
        train_kd.main(arguments(place, "refused", "--method", "none", *flags))
