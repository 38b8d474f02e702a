"""Plans: what they mean, running them side by side, stopping in the middle, going on."""
from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT, STUDENT, TEACHER, write_folder_dataset, write_teacher

from engine.results import read_result, read_results
from engine.settings import ineffective_options, parse_settings
from engine.sources import sources
from tools import reproduce
from tools.planning import painting
from tools.planning import plan as plans
from tools.planning.command import Network, as_flags, flags_of_keys
from tools.planning.plan import Expansion, Job, Places, plan_names, read_plan
from tools.planning.published import published_jobs, published_names
from tools.planning.repeats import find_finished
from tools.planning.runner import Runner
from tools.planning.status import BEGUN, DONE, NEW, Status, status
from utils.errors import UserError

PLAN = """
title = "Tiny"
protocol = "tiny-1"
dataset = "folder"
student = "deeplab_mobile {student}"
seeds = [1, 2]
gpus = 0
[flags]
crop-size = [64, 64]
batch-size = 4
max-iterations = 4
workers = 0
log-iter = 1
save-per-iters = 1
val-per-iters = 2
tensorboard = false
[teachers.net]
network = "deeplab_mobile {teacher}"
flags = {{max-iterations = 2}}
[runs.none]
[runs.none-long]
method = "none"
flags = {{max-iterations = 6}}
seeds = [1]
[runs.fd]
method = "afdcd"
flags = {{lambda-fd = 1e-5, lambda-kd = 0, lambda-ctr = 0}}
[scan.lambda-fd]
of = "fd"
values = [1e-6, 1e-4]
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # other numbers of threads add up in another order
    write_folder_dataset(tmp_path / "data")
    (tmp_path / "tiny.toml").write_text(PLAN.format(student=STUDENT, teacher=TEACHER))
    return tmp_path


def arguments(place: Path, *more: str) -> list[str]:
    return [str(place / "tiny.toml"), "--data", str(place / "data"), "--results", str(place / "results"), "--work",
            str(place / "work"), *more]


def expand(place: Path) -> list[plans.Job]:
    return Expansion(read_plan(place / "tiny.toml"), Places(place / "results", place / "work", place / "data")).jobs()


PAIR = f"deeplab_mobile_{TEACHER}-deeplab_mobile_{STUDENT}"
PLAIN, TEACHERS = f"none-deeplab_mobile_{STUDENT}", f"none-deeplab_mobile_{TEACHER}"


def made_with(job: Job, code: dict, revision: dict) -> None:
    """Say in a run's result that it was made with other code."""
    job.result.write_text(json.dumps({**read_result(job.result), "sources": code, "revision": revision}))


class TestMeaning:
    def test_a_plan_means_its_teacher_its_runs_and_its_scans(self, place) -> None:
        assert [job.name for job in expand(place)] == [
            f"tiny-1/folder/{TEACHERS}/none/1", f"tiny-1/folder/{PLAIN}/none/1", f"tiny-1/folder/{PLAIN}/none/2",
            f"tiny-1/folder/{PLAIN}/none-long/1", f"tiny-1/folder/{PAIR}/fd/1", f"tiny-1/folder/{PAIR}/fd/2",
            f"tiny-1-scan/folder/{PAIR}/fd+1e-06/1", f"tiny-1-scan/folder/{PAIR}/fd+0.0001/1"]

    def test_the_settings_of_a_run_are_those_of_the_plan(self, place) -> None:
        jobs = {job.name: job for job in expand(place)}
        fd = jobs[f"tiny-1/folder/{PAIR}/fd/2"]
        assert fd.settings.active == {"fd": 1e-5} and fd.settings.optimization.seed == 2
        assert fd.settings.optimization.max_iterations == 4 and fd.settings.data.crop_size == (64, 64)
        assert fd.needs == (f"tiny-1/folder/{TEACHERS}/none/1",)
        assert fd.settings.networks.teacher_pretrained == str(jobs[fd.needs[0]].best)
        assert jobs[f"tiny-1-scan/folder/{PAIR}/fd+1e-06/1"].settings.active == {"fd": 1e-6}
        assert jobs[f"tiny-1/folder/{PLAIN}/none-long/1"].settings.optimization.max_iterations == 6

    def test_the_result_lies_where_the_run_writes_it(self, place) -> None:
        for job in expand(place):
            assert job.result == place / "results" / f"{job.name}.json"
            assert parse_settings(["--dataset", *job.flags]) == job.settings

    def test_values_become_flags(self) -> None:
        assert as_flags({"crop-size": [1, 2], "fast": False, "aux": True, "amp": "bf16", "lr": 0.1}) == [
            "--crop-size", "1", "2", "--no-fast", "--aux", "--amp", "bf16", "--lr", "0.1"]

    def test_folders_of_the_repository_are_named_from_it(self) -> None:
        assert Places.of(results=str(ROOT / "results"), work="/elsewhere").results == Path("results")

    @pytest.mark.parametrize("old, new, message", [
        ("protocol = \"tiny-1\"", "", "protocol is missing"),
        ("gpus = 0", "gpu = 0", "unknown key 'gpu'; expected some of .*, gpus, .*; did you mean gpus"),
        ("gpus = 0", "paint = {}", "data is missing"),
        ("gpus = 0", "paint = {trains = 1}", r"\[paint\] unknown key 'trains'"),
        ("gpus = 0", "data = \"x\"\npaint = {train = 2}", "expected dataset = \"toy_streets\""),
        ("dataset = \"folder\"", "dataset = \"toy_streets\"\ndata = \"x\"\npaint = {train = \"2\"}",
         r"\[paint\] train: expected an integer"),
        ("gpus = 0", "paint = true", r"\[paint\]: expected a table"),
        ("of = \"fd\"", "", r"\[scan.lambda-fd\] of is missing"), ("[runs.none]", "[runs.none", "not a TOML file"),
        ("values = [1e-6, 1e-4]", "values = [1e-6, 0.000001]", r"\[scan.lambda-fd\] values: 1e-06 is listed twice"),
        ("of = \"fd\"", "of = [\"fd\", \"fd\"]", r"\[scan.lambda-fd\] of: fd is listed twice; expected each once"),
        ("seeds = [1, 2]", "seeds = [0, 1, 0]", "tiny.toml: seeds: 0 is listed twice; expected each once"),
        ("seeds = [1]", "seeds = [1, 1]", r"tiny.toml: \[runs.none-long\] seeds: 1 is listed twice"),
        ("[teachers.net]\n", "[teachers.net]\nlabel = 1\n", r"\[teachers.net\] label: expected a text in quotes"),
        ("[runs.fd]", "[scan.lambda-kd]\nof = [\"fd\"]\nvalues = [1]\n[runs.fd]",
         r"\[scan.lambda-fd\]: fd is in \[scan.lambda-kd\] already"),
        ("of = \"fd\"", "of = \"x\"", r"tiny.toml: \[scan.lambda-fd\]: no run 'x'"),
        ("[runs.fd]", "[runs.fd]\nmetod = \"fd\"", r"\[runs.fd\] unknown key 'metod'.*; did you mean method"),
        (f"deeplab_mobile {TEACHER}", TEACHER, r"\[teachers.net\]: expected 'MODEL BACKBONE'"),
        (f"deeplab_mobile {TEACHER}", f"smp:Unet:resnet18 {TEACHER}", r"\[teachers.net\]: expected 'MODEL BACKBONE'"),
        ("dataset = \"folder\"", "dataset = \"camvidd\"",
         r"tiny.toml: dataset: unknown data set 'camvidd'; expected one of .*; did you mean camvid\?$"),
        (f"deeplab_mobile {TEACHER}", "deeplabv3 resnet19_w0.5",
         r"tiny.toml: \[teachers.net\]: unknown backbone 'resnet19_w0.5' for deeplabv3; .*; did you mean resnet18\?$"),
        (f"deeplab_mobile {STUDENT}", f"deeplabmobile {STUDENT}",
         r"tiny.toml: student: unknown model 'deeplabmobile'; .*; did you mean deeplab_mobile\?$"),
        (f"deeplab_mobile {TEACHER}", "modul:examples.espnet:camvid",
         r"\[teachers.net\]: unknown source 'modul' of .*; did you mean module\?$"),
        ("method = \"afdcd\"", "method = \"afdcd\"\nteacher = \"x\"", "no teacher 'x'"),
        ("seeds = [1, 2]", "seed = [1, 2]", "unknown key 'seed'; .*; did you mean seeds"),
        ("max-iterations = 4", "max-iterations = 0", r"tiny.toml: \[runs.none\]: argument --max-iterations"),
        ("max-iterations = 2", "max-iterations = 0", r"tiny.toml: \[teachers.net\]: argument --max-iterations"),
        ("lambda-kd = 0", "lambda-k = 0",
         r"tiny.toml: \[runs.fd\]: unrecognized arguments: --lambda-k 0 \(did you mean --lambda-kd\?\)$"),
        ("values = [1e-6, 1e-4]", "values = [-1]", r"tiny.toml: \[scan.lambda-fd\]: .*--lambda-fd"),
        ("max-iterations = 4", "max-iterations = 4\nlr = \"high\"", r"\[teachers.net\]: .*--lr: expected a number"),
        ("max-iterations = 4", "max-iterations = 4\nmin-lr = 1", r"tiny.toml: \[teachers.net\]: --min-lr 1 is above")])
    def test_a_plan_that_nobody_can_run_is_refused(self, place, capsys, old, new, message) -> None:
        text = (place / "tiny.toml").read_text()
        assert old in text
        (place / "tiny.toml").write_text(text.replace(old, new))
        with pytest.raises(UserError, match=message):
            reproduce.main(arguments(place, "--dry-run"))
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize("old, new, message", [
        ("seeds = [1, 2]", "seeds = 3", r"tiny.toml: seeds: expected a list of whole numbers, .*, got 3$"),
        ("seeds = [1, 2]", "seeds = []", r"tiny.toml: seeds: expected a list"),
        ("seeds = [1, 2]", "seeds = [true]", r"tiny.toml: seeds: expected a list"),
        ("seeds = [1]", "seeds = 1", r"tiny.toml: \[runs.none-long\] seeds: expected a list"),
        ("values = [1e-6, 1e-4]", "values = 0.5", r"\[scan.lambda-fd\] values: expected a list of numbers"),
        ("values = [1e-6, 1e-4]", "values = [\"a\"]", r"\[scan.lambda-fd\] values: .*, got \['a'\]"),
        ("values = [1e-6, 1e-4]", "values = [[32, 32]]", r"\[scan.lambda-fd\] values: expected"),
        ("of = \"fd\"", "of = 2", r"\[scan.lambda-fd\] of: expected the name of a run"),
        ("[runs.none]", "[runs.none]\nflags = 3", r"\[runs.none\] flags: expected a table, .*, got 3"),
        ("method = \"afdcd\"", "method = 1", r"\[runs.fd\] method: expected a text in quotes, got 1"),
        ("gpus = 0", "gpus = \"all\"", "gpus: expected a whole number, got 'all'"),
        ("gpus = 0", "scan = 1", r"\[scan\]: expected tables, such as \[scan.NAME\], got 1")])
    def test_a_value_of_another_kind_is_refused(self, place, old, new, message) -> None:
        text = (place / "tiny.toml").read_text()
        assert old in text
        text = text[:text.index("[scan.")] if new.startswith("scan") else text
        (place / "tiny.toml").write_text(text.replace(old, new))
        with pytest.raises(UserError, match=message):
            reproduce.main(arguments(place, "--dry-run"))

    @pytest.mark.parametrize("old, new, message", [
        ("[runs.none]", "[runs.none]\nflags = {student-backbone = 'resnet18_w0.5'}",
         r"tiny.toml: \[runs.none\] flags: student-backbone cannot be set here, since the key student sets it$"),
        ("[runs.none]", "[runs.none]\nflags = {backbone = 'resnet18_w0.5'}", "backbone cannot be set here"),
        ("max-iterations = 4", "seed = 7", "toml: flags: seed cannot be set here, since the key seeds sets it"),
        ("max-iterations = 2", "method = 'kd'", r"\[teachers.net\] flags: method cannot .*, since the key method of"),
        ("[flags]", "[student-flags]\nteacher_pretrained = 'x.pth'\n[flags]",
         r"student-flags: teacher_pretrained cannot .*, since the key file of \[teachers.NAME\]"),
        ("max-iterations = 4", "no-cuda = true", "flags: no-cuda cannot .*, since the key gpus sets it"),
        ("max-iterations = 4", "resume = 'never'", "flags: resume cannot .*, since tools/reproduce.py itself sets it"),
        ("of = \"fd\"", "of = \"fd\"\nflags = {label = 'x'}", r"\[scan.lambda-fd\] flags: label cannot be set here"),
        ("[scan.lambda-fd]", "[scan.seed]", r"\[scan.seed\]: seed cannot be set here, since the key seeds sets it")])
    def test_a_flag_that_another_key_sets_is_refused(self, place, old, new, message) -> None:
        text = (place / "tiny.toml").read_text()
        assert old in text
        (place / "tiny.toml").write_text(text.replace(old, new))
        with pytest.raises(UserError, match=message):
            reproduce.main(arguments(place, "--dry-run"))

    def test_every_flag_that_a_plan_adds_is_kept_for_it(self, place) -> None:
        """Nothing but these and the flags of the tables is in a command line."""
        job = next(job for job in expand(place) if "/fd/" in job.name)
        tables = {"crop_size", "batch_size", "max_iterations", "workers", "log_iter", "save_per_iters", "val_per_iters",
                  "tensorboard", "lambda_fd", "lambda_kd", "lambda_ctr"}
        assert job.settings.given - tables == job.settings.given & flags_of_keys().keys()
        assert not tables & flags_of_keys().keys()

    def test_a_plan_without_runs_is_refused(self, place) -> None:
        text = (place / "tiny.toml").read_text()
        (place / "tiny.toml").write_text(f"{text[:text.index('[teachers.net]')]}[runs]")
        with pytest.raises(UserError, match=r"tiny.toml: \[runs\] is empty; expected at least one run"):
            reproduce.main(arguments(place, "--dry-run"))

    @pytest.mark.parametrize("old, new, tables", [
        (TEACHER, STUDENT, r"\[teachers.net\] and \[runs.none\]"),
        ("[runs.none]", f"[teachers.other]\nnetwork = 'deeplab_mobile {TEACHER}'\n[runs.none]",
         r"\[teachers.net\] and \[teachers.other\]")])
    def test_a_teacher_with_the_network_of_another_run_needs_a_label(self, place, old, new, tables) -> None:
        path = place / "tiny.toml"
        path.write_text(path.read_text().replace(old, new).replace("[runs.fd]", "[runs.fd]\nteacher = 'net'"))
        with pytest.raises(UserError, match=rf"tiny.toml: {tables} mean the same run .*/none/1: give .* label = "):
            reproduce.main(arguments(place, "--dry-run"))
        path.write_text(path.read_text().replace("[teachers.net]", "[teachers.net]\nlabel = 'teacher'"))
        jobs = {job.name: job for job in expand(place)}
        teacher = next(name for name in jobs if name.endswith("/teacher/1"))
        fd = next(job for name, job in jobs.items() if name.endswith("/fd/1"))
        assert fd.needs == (teacher,) and fd.settings.networks.teacher_pretrained == str(jobs[teacher].best)
        assert jobs[teacher].result == place / "results" / f"{teacher}.json"

    def test_a_seed_is_given_once(self, place) -> None:
        with pytest.raises(UserError, match="--seeds: 0 is listed twice; expected each once"):
            reproduce.main(arguments(place, "--dry-run", "--seeds", "0", "0"))

    def test_given_seeds_take_the_place_of_those_of_a_row_too(self, place, capsys) -> None:
        assert reproduce.main(arguments(place, "--dry-run", "--seeds", "5", "--only", "/none-long/")) == 0
        assert set(re.findall(r"none-long/(\d)", capsys.readouterr().out)) == {"5"}

    def test_an_unknown_plan_is_refused_with_the_names(self) -> None:
        with pytest.raises(UserError, match="camvid-cpu, .*, cityscapes, .*; did you mean cityscapes"):
            reproduce.main(["cityscape", "--dry-run"])

    @pytest.mark.parametrize("name", plan_names())
    def test_the_plans_of_the_repository_can_be_run(self, name) -> None:
        jobs = Expansion(read_plan(name), Places()).jobs()
        assert jobs and len({job.name for job in jobs}) == len(jobs)
        assert all(job.result.is_relative_to(ROOT / "results") for job in jobs)
        assert not [(job.name, unused) for job in jobs if (unused := ineffective_options(job.settings))]

    def test_a_teacher_from_elsewhere(self) -> None:
        """Its runs lie beside those of the other teacher, in the same protocol and with the same flags."""
        ours, theirs = ({job.name: job.settings for job in Expansion(read_plan(name), Places(), [0]).jobs()}
                        for name in ("camvid-cpu", "camvid-espnet"))
        assert not ours.keys() & theirs.keys()
        there = theirs["camvid-cpu-1/camvid/module-examples.espnet-camvid-deeplabv3_resnet18_w0.25/kd/0"]
        here = ours["camvid-cpu-1/camvid/deeplab_mobile_mobilenetv2-deeplabv3_resnet18_w0.25/kd/0"]
        assert there.networks.teacher_model == "module:examples.espnet:camvid"
        assert (there.data, there.optimization) == (here.data, here.optimization)
        assert there.distillation == here.distillation

    @pytest.mark.parametrize("text", ["module:examples.espnet:camvid", "smp:Unet:resnet34", "hf:some/net",
                                      "deeplabv3 timm:convnext_tiny", "psp resnet50_original_w0.5"])
    def test_networks_that_a_plan_may_name(self, text) -> None:
        assert " ".join(word for word in vars(Network.read(text, "student")).values() if word) == text

    def test_every_published_table_is_a_plan(self) -> None:
        assert set(published_names()) == {"cityscapes", "ade20k", "coco_stuff", "voc", "camvid"}
        jobs = {job.name: job for job in published_jobs("ade20k", Places(), [0, 4])}
        assert len(jobs) == 8
        afdcd = jobs["paper/ade20k/deeplabv3_resnet101-deeplabv3_resnet18/afdcd/4"]
        assert afdcd.settings.optimization.max_iterations == 40000 and afdcd.settings.optimization.seed == 4
        assert afdcd.script == "train_scripts/ade20k/deeplabv3_r101_r18_afdcd.sh"


def shell_job(folder: Path, name: str, script: str) -> SimpleNamespace:
    """What a Runner reads of a job, for a line of shell that leaves no result."""
    return SimpleNamespace(name=name, shown="", command=["sh", "-c", script], folder=folder, needs=(), environment={},
                           result=folder / "none.json")


class TestRunning:
    def test_the_toy_plan_goes_on_where_it_was_interrupted_to_the_same_results(self, place) -> None:
        """The plan of the repository with small images and few steps: stopped in the middle of the second run, then run
        to the end: the first is skipped, the second goes on, and ends as one that was never stopped."""
        plan, places = self.small_toy_plan(place), Places(place / "results", place / "work")
        arguments = [str(plan), "--only", "/dist/", "--seeds", "0", "1"]
        folders = ["--results", str(places.results), "--work", str(places.work)]
        first, second = (job for job in Expansion(read_plan(plan), places, [0, 1]).jobs() if "/dist/" in job.name)
        command = [sys.executable, "tools/reproduce.py", *arguments, *folders]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            deadline = time.monotonic() + 240
            while not second.states and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 130 and "stopped" in said and "the same command goes on" in said
        assert status(first).state == DONE and status(second).state == BEGUN
        made = first.result.stat().st_mtime_ns
        assert reproduce.main([*arguments, *folders, "--jobs", "2"]) == 0
        assert first.result.stat().st_mtime_ns == made and status(second).state == DONE
        told = (second.folder / "output.txt").read_text()
        assert "resumed" in told and re.search(r"stopped by SIGTERM (after step \d|outside of its steps)", told)
        whole = place / "whole"
        assert reproduce.main([*arguments[:3], "--seeds", "1", "--results", str(whole / "results"), "--work",
                               str(whole / "work")]) == 0
        alone, = read_results(whole / "results")
        one = json.loads(second.result.read_text())
        assert (one["weights"], one["curve"]) == (alone["weights"], alone["curve"])

    @staticmethod
    def small_toy_plan(place: Path) -> Path:
        text = (ROOT / "train_scripts/plans/toy.toml").read_text()
        smaller = {"data/toy_streets_240x320_200_points5": str(place / "streets"),
                   "train = 200, val = 40, test = 100": "train = 4, val = 2, test = 2",
                   "height = 240, width = 320": "height = 48, width = 64", "[128, 160]": "[48, 64]",
                   "batch-size = 8": "batch-size = 2", "max-iterations = 640": "max-iterations = 40",
                   "workers = 1": "workers = 0", "log-iter = 25": "log-iter = 1",
                   "val-per-iters = 160": "val-per-iters = 20", "save-per-iters = 160": "save-per-iters = 1"}
        for old, new in smaller.items():
            assert text.count(old) == 1
            text = text.replace(old, new)
        path = place / "toy.toml"
        path.write_text(text)
        return path

    def test_a_plan_without_anything_left_says_how_it_is_run_anew(self, place, capsys) -> None:
        argv = arguments(place, "--only", f"{PLAIN}/none/1")
        assert reproduce.main(argv) == 0 and "nothing is left" not in capsys.readouterr().out
        assert reproduce.main(argv) == 0
        assert f"{place / 'results'} holds the results; to run anew, give another" in capsys.readouterr().out

    def test_minutes_of_the_time_budget_are_counted(self, place, capsys, monkeypatch) -> None:
        class Recorder(Runner):
            def __init__(self, *given) -> None:
                super().__init__(*given)
                budgets.append(given[3])
                self.deadline = 0.0

        budgets = []
        monkeypatch.setattr(reproduce, "Runner", Recorder)
        assert reproduce.main(arguments(place, "--only", f"{PLAIN}/none/", "--time-budget", "1.5")) == 0
        assert budgets == [90] and "0 runs done now, 0 failed, 2 left to do" in capsys.readouterr().out

    def test_a_teacher_is_trained_before_its_student(self, place, capsys) -> None:
        assert reproduce.main(arguments(place, "--only", "/fd/1", "--jobs", "2")) == 0
        said = capsys.readouterr().out
        assert said.index(f"done after {'0.'}") < said.index(f"[2/2] tiny-1/folder/{PAIR}/fd/1")
        teacher, student = (one for one in sorted(read_results(place / "results"), key=lambda r: r["label"] == "fd"))
        assert student["teacher"]["sha256"] == teacher["weights"]["best"]
        jobs = expand(place)
        for path in jobs[0].folder.glob("*.pth"):  # as in a clone, where results are but no weights
            path.unlink()
        states = {job.name: status(job) for job in jobs}
        assert jobs[0] in reproduce.to_run(jobs, states)
        assert jobs[0] not in reproduce.to_run(jobs[:3], states)

    def test_a_trial_with_the_weight_of_its_row_is_not_run_again(self, place, capsys) -> None:
        row, trial, words = self.the_same_twice(place)
        assert reproduce.main([*words, "--dry-run"]) == 0
        said = capsys.readouterr().out
        assert row.shown in said and trial.shown not in said
        assert reproduce.main(words) == 0
        assert f"{trial.name}\n    takes the result of {row.name}" in capsys.readouterr().out
        one, other = (json.loads(job.result.read_text()) for job in (row, trial))
        changed = {key for key in other if other[key] != one.get(key)}
        assert changed == {"protocol", "label", "taken_from"} and other["taken_from"] == row.name
        assert (other["protocol"], other["label"]) == ("tiny-1-scan", "fd+1e-05") and not trial.folder.exists()
        row.result.unlink()  # the other way round, in a clone: nothing is run, nor the teacher trained again
        for path in expand(place)[0].folder.glob("*.pth"):
            path.unlink()
        assert reproduce.main(arguments(place, "--only", "/fd/1")) == 0
        assert f"{row.name} takes the result of {trial.name}" in capsys.readouterr().out
        assert json.loads(row.result.read_text()) == one
        other["settings"]["batch_size"] = 2  # not the plan's: it is not taken
        trial.result.write_text(json.dumps(other))
        assert find_finished([trial]) is None and find_finished([trial, row]) is row

    def test_a_run_is_not_begun_where_the_same_one_has_stopped(self, tmp_path) -> None:
        for code in (75, 2):
            jobs = [shell_job(tmp_path, name, f"exit {code}") for name in ("one", "same")]
            repeats = {"one": [jobs[1]], "same": [jobs[0]]}
            outcome = Runner(jobs, set(), say=lambda line: None, repeats=repeats).run()
            assert (outcome.stopped + outcome.failed, outcome.waiting) == (["one"], ["same"])

    def test_what_has_begun_comes_first(self, place) -> None:
        jobs = expand(place)[1:3]
        states = {jobs[0].name: Status(NEW), jobs[1].name: Status(BEGUN, 2)}
        assert reproduce.to_run(jobs, states) == jobs[::-1]

    def test_a_row_of_another_seed_knows_the_scan_of_the_first(self, place) -> None:
        row, trial, _ = self.the_same_twice(place)
        plan, options = read_plan(place / "tiny.toml"), reproduce.Options(seeds=(2,))
        repeats = reproduce.repeats_of([], plan, options)
        assert [job.name for job in repeats[trial.name]] == [row.name]

    def test_slurm_lists_hold_the_same_run_once(self, place, capsys) -> None:
        row, trial, words = self.the_same_twice(place)
        assert reproduce.main([*words, "--slurm"]) == 0
        assert "1 more have the settings of runs in these lists" in capsys.readouterr().out
        text = "".join(path.read_text() for path in (place / "work").glob("**/slurm-*.txt"))
        assert row.shown in text and trial.shown not in text

    @staticmethod
    def the_same_twice(place: Path) -> tuple[plans.Job, plans.Job, list[str]]:
        """A row and the trial of a scan that has its weight; the words that ask for both."""
        text = (place / "tiny.toml").read_text()
        (place / "tiny.toml").write_text(text.replace("values = [1e-6, 1e-4]", "values = [1e-6, 1e-5]"))
        row, trial = (job for job in expand(place) if job.name.endswith(("/fd/1", "/fd+1e-05/1")))
        return row, trial, arguments(place, "--only", "/fd/1", "fd+1e-05/1", "--jobs", "2")

    def test_a_failed_teacher_leaves_its_students_waiting(self, place, capsys) -> None:
        (place / "data" / "classes.txt").unlink()
        assert reproduce.main(arguments(place, "--only", "/fd/1")) == 1
        assert "1 failed, 2 left to do" in capsys.readouterr().out

    def test_a_run_that_was_stopped_from_outside_has_not_failed(self, tmp_path) -> None:
        jobs = [shell_job(tmp_path, str(code), f"exit {code}") for code in (2, 75, 130)]
        outcome = Runner(jobs, set(), side_by_side=3, say=lambda line: None).run()
        assert (outcome.failed, outcome.stopped, outcome.done) == (["2"], ["75", "130"], [])

    @pytest.mark.parametrize("script, message", [
        ("echo 'train_kd.py: error: process 7 trains here' >&2; echo 'step 9/10 of the other'; exit 2",
         "failed after 0.0 min, with exit code 2: one\n    train_kd.py: error: process 7 trains here"),
        ("echo 'step 3/10'; kill -9 $$", "failed after 0.0 min, killed by signal 9: one\n    its output: "),
        ("echo 'no such thing'; exit 3", "failed after 0.0 min, with exit code 3: one\n    no such thing"),
        ("exit 3", "failed after 0.0 min, with exit code 3: one\n    it said nothing")])
    def test_the_line_of_a_failed_run_is_its_own(self, tmp_path, script, message) -> None:
        """Not that of one that trains in the same folder, nor of an earlier call."""
        (tmp_path / "output.txt").write_text("train_kd.py: error: of yesterday\n")
        said: list[str] = []
        assert Runner([shell_job(tmp_path, "one", script)], set(), say=said.append).run().failed == ["one"]
        assert said[-1].startswith(message)

    def test_a_run_is_told_to_end_when_the_time_is_over(self, tmp_path, monkeypatch) -> None:
        script = f"trap 'echo saved > {tmp_path}/state; exit 75' TERM; touch {tmp_path}/ready; sleep 60 & wait"
        monkeypatch.setattr(Runner, "_is_over", lambda self: (tmp_path / "ready").exists())
        jobs = [shell_job(tmp_path, "long", script), shell_job(tmp_path, "next", "exit 0")]
        outcome = Runner(jobs, set(), say=lambda line: None).run()
        assert (outcome.stopped, outcome.waiting) == (["long"], ["next"])
        assert (tmp_path / "state").read_text() == "saved\n"

    def test_nothing_begins_after_the_time_is_over(self, place) -> None:
        outcome = Runner(expand(place), set(), seconds=0, say=lambda line: None).run()
        assert not outcome.done and len(outcome.waiting) == len(expand(place))

    def test_a_changed_plan_does_not_take_old_results(self, place) -> None:
        assert reproduce.main(arguments(place, "--only", f"{PLAIN}/none/1")) == 0
        text = (place / "tiny.toml").read_text()
        (place / "tiny.toml").write_text(text.replace("batch-size = 4", "batch-size = 2"))
        with pytest.raises(UserError, match=r"1\.json was made .* batch_size: 4 -> 2.* remove 1.json and the folder"):
            reproduce.main(arguments(place, "--dry-run"))
        expand(place)[1].result.unlink()  # what has only begun does not go on with other settings either
        with pytest.raises(UserError, match=r"_state\.pth was made .* batch_size: 4 -> 2"):
            reproduce.main(arguments(place, "--dry-run"))

    @pytest.mark.parametrize("content, message", [
        ('{"format": 1, "settings": []}', r"1\.json: no whole result, .* settings, .*: remove it to have the run made"),
        ("{", r"1\.json: not a result that can be read .*: remove it to have the run made again"),
        (None, r"1\.json: not a result that can be read .*[Ii]s a directory.*: remove it to have the run made again")])
    def test_what_is_no_result_is_to_be_removed(self, place, content, message) -> None:
        path = expand(place)[1].result
        path.parent.mkdir(parents=True)
        if content is None:
            path.mkdir()
        else:
            path.write_text(content)
        with pytest.raises(UserError, match=message):
            reproduce.main(arguments(place, "--dry-run"))

    def test_a_replaced_teacher_file_or_method_does_not_keep_its_students(self, place) -> None:
        teacher = write_teacher(place / "teacher.pth")
        text = (place / "tiny.toml").read_text()
        (place / "tiny.toml").write_text(text.replace("[teachers.net]", f"[teachers.net]\nfile = '{teacher}'"))
        assert reproduce.main(arguments(place, "--only", "/fd/1")) == 0
        job, = (job for job in expand(place) if job.name.endswith("/fd/1") and "scan" not in job.name)
        assert status(job).state == DONE
        again = sources(job.settings)
        assert read_result(job.result)["sources"] == again and list(again) == ["losses/afdcd.py"]
        made_with(job, {"losses/afdcd.py": "5d6e7f8" * 9}, {"commit": "a" * 40, "changed": False})
        assert status(job).state == DONE  # of another revision, which can be had
        made_with(job, {"losses/afdcd.py": "5d6e7f8" * 9}, {"commit": "a" * 40, "changed": True})
        with pytest.raises(UserError, match=r"1.json was made with code .* code of losses/afdcd.py: 5d6e7f8 -> "):
            status(job)
        made_with(job, {"losses/afdcd.py": "5d6e7f8" * 9}, {"commit": None, "changed": None})
        assert status(job).state == DONE  # without git
        made_with(job, again, {"commit": "a" * 40, "changed": True})
        assert status(job).state == DONE
        teacher.write_bytes(teacher.read_bytes() + b" ")
        with pytest.raises(UserError, match=r"has learned from another file than .*teacher\.pth"):
            status(job)

    def test_a_teacher_that_is_not_there_is_missed_before_the_first_run(self, place, capsys) -> None:
        text = (place / "tiny.toml").read_text()
        file = "pretrained_ckpt/of_nobody/resnet18-imagenet.pth"
        (place / "tiny.toml").write_text(text.replace("[teachers.net]", f"[teachers.net]\nfile = '{file}'"))
        missed = f"{file}: no such weights file, which 4 of the runs left need; python tools/get_weights.py "
        for words in (["--dry-run"], ["--slurm"]):
            assert reproduce.main(arguments(place, *words)) == 0
            assert f"missing: {missed}" in capsys.readouterr().out
        with pytest.raises(UserError, match=re.escape(missed)):
            reproduce.main(arguments(place))
        assert not list((place / "work").glob("tiny-1*"))
        assert reproduce.main(arguments(place, "--dry-run", "--only", "/none/")) == 0
        assert "missing: " not in capsys.readouterr().out

    def test_a_dry_run_runs_nothing(self, place, capsys) -> None:
        assert reproduce.main(arguments(place, "--dry-run")) == 0
        said = capsys.readouterr().out
        assert said.startswith("Tiny\n") and "8 runs: 0 done, 0 begun, 8 new" in said
        assert not (place / "work").exists() and {status(job).state for job in expand(place)} == {NEW}

    def test_only_takes_the_teacher_along(self, place, capsys) -> None:
        assert reproduce.main(arguments(place, "--dry-run", "--only", "fd/2")) == 0
        assert f"{TEACHERS}/none/1" in capsys.readouterr().out
        with pytest.raises(UserError, match="--only nothing"):
            reproduce.main(arguments(place, "--only", "nothing"))

    def test_every_text_of_only_has_to_be_in_a_name(self, place) -> None:
        with pytest.raises(UserError, match=r"--only /none-lon/: no run of plan .*; did you mean none-long\?$"):
            reproduce.main(arguments(place, "--dry-run", "--only", "/fd/", "/none-lon/"))


def test_a_plan_paints_its_own_images(place, monkeypatch, capsys) -> None:
    monkeypatch.setattr(painting, "available_cpus", lambda: 1)
    streets, path = place / "streets", place / "tiny.toml"
    path.write_text(path.read_text().replace('dataset = "folder"', 'dataset = "toy_streets"').replace(
        "gpus = 0", f'data = "{streets}"\npaint = {{train = 2, val = 1, test = 1, height = 32, width = 32}}'))
    unasked = [arguments(place, "--slurm"), [str(path), "--work", str(place / "work"), "--dry-run"]]
    for words in unasked:  # other images are named, nothing is to run
        assert reproduce.main(words) == 0 and not streets.exists()
    words = [str(path), "--work", str(place / "work"), "--slurm"]
    assert reproduce.main(words) == 0 and f"painting toy streets into {streets}" in capsys.readouterr().out
    assert len(list(streets.glob("*/*.png"))) == 8
    assert reproduce.main(words) == 0 and "painting" not in capsys.readouterr().out
    path.write_text(path.read_text().replace("train = 2", "train = 3"))
    with pytest.raises(UserError, match="streets"):
        reproduce.main(words)


def test_slurm_lists_are_commands_that_an_array_runs(place, capsys) -> None:
    assert reproduce.main(arguments(place, "--slurm", "--jobs", "3")) == 0
    lists = {path.stem: path for path in (place / "work").glob("**/slurm-*.txt")}
    assert {name: len(path.read_text().splitlines()) for name, path in lists.items()} == {
        "slurm-teachers": 1, "slurm-students": 4, "slurm-others": 3}
    teachers, students, others = capsys.readouterr().out.strip().splitlines()[-3:]
    assert teachers.startswith("teachers=$(sbatch") and "--array=1-1%3" in teachers
    assert "--array=1-4%3 --dependency=afterok:$teachers" in students and "--dependency" not in others
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "2", "DRY_RUN": "1"}
    done = subprocess.run(["bash", "train_scripts/array.sh", str(lists["slurm-students"]), "--log-iter", "7"], cwd=ROOT,
                          env=environment, capture_output=True, text=True, check=True)
    settings = parse_settings(shlex.split(done.stdout)[2:])
    assert settings.running.log_iter == 7 and settings.optimization.seed == 2 and settings.running.label == "fd"
