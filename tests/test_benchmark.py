"""``tools/benchmark.py`` at a size where it takes seconds."""
from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT, assert_refused
from in_process import InThisProcess

from tools import benchmark
from tools.bench import cases, turns
from tools.bench.jobs import train_settings
from tools.bench.measure import count_flops, timed
from tools.bench.options import Step
from tools.bench.report import best_rates, figures, form_table, method_table, variant_table
from tools.bench.turns import Measured, Plan, Refused, Worker, measure
from utils.errors import UserError

QUICK = ["--short", "--device", "cpu", "--threads", "1", "--repeats", "1"]


OTHER_RUN = """
class Samples:
    def __len__(self):
        return 1

    def __getitem__(self, key):
        print("what is printed is no answer")


class OtherRun:
    train_set = Samples()


def build_run(*args):
    return OtherRun()
"""


class Scripted(InThisProcess):
    """Takes no time: every turn of a job has the next of its given seconds."""

    log: list[tuple] = []

    def __init__(self, job: dict) -> None:
        if "refused" in job:
            raise Refused(job["refused"])
        self.job, self.about = job, {"images": 4, "precision": "float32", "facts": {}, "threads": 1, "idle": 100}
        self.log.append(("start", job["name"]))

    def ask(self, do: str, steps: int = 0, warm: int = 0) -> dict:
        self.log.append((do, self.job["name"], steps, warm))
        if do == "flops":
            return {"flops": 6_000_000_000}
        if do == "work":
            return {"float32": self.job["rates"].pop(0)}
        seconds = self.job["seconds"].pop(0)
        return {"seconds": seconds, "cpu_seconds": 2 * seconds, "peak": self.job["peaks"].pop(0)}

    def close(self) -> None:
        self.log.append(("end", self.job["name"]))


@pytest.fixture
def here(monkeypatch) -> None:
    """Without processes, and without the programs' setting of the allocator: it would stay with the other tests."""
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    for module in (turns, benchmark):
        monkeypatch.setattr(module, "Worker", InThisProcess)


@pytest.fixture
def scripted(monkeypatch) -> list[tuple]:
    monkeypatch.setattr(turns, "Worker", Scripted)
    monkeypatch.setattr(Scripted, "log", [])
    return Scripted.log


def measured(tmp_path: Path, *argv: str) -> dict:
    """What ``--json`` wrote."""
    path = tmp_path / "figures.json"
    assert benchmark.main([argv[0], *QUICK, *argv[1:], "--json", str(path)]) == 0
    return json.loads(path.read_text())


def rows_of(text: str) -> dict[str, list[str]]:
    """{first cell: other cells} of the tables of a text."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    assert len({len(line) for line in lines}) == 1
    return {first: cells for first, *cells in lines}


def test_a_step_is_measured_with_its_figures_and_the_machine(here, tmp_path, capsys) -> None:
    found = measured(tmp_path, "step", "--variants", "plain", "fast", "--variant", "kd=--method kd")
    (case,) = found["cases"]
    assert "afdcd, plain projector" in case["title"] and "crop 128x128, batch 2" in case["title"]
    plain, kd = case["variants"]["plain"], case["variants"]["kd"]
    assert plain["flags"][-1] == "--no-fast" and kd["flags"][-2:] == ["--method", "kd"]
    assert kd["flops"] < plain["flops"] and plain["speedup"] == 1
    assert plain["images_per_second"] == pytest.approx(2 / plain["seconds"][0])
    assert plain["share_of_peak"] == pytest.approx(plain["flops"] / plain["median"] / found["peak"]["float32"])
    assert found["peak"]["bf16"] > 0 and found["machine"]["cores"] >= 1 and found["settings"]["crop"] == [128, 128]
    text = capsys.readouterr().out
    assert list(rows_of(text)) == ["variant", "plain", "fast", "kd"] and "machine peak" in text


def test_the_criterion_has_the_operations_of_its_convolutions(here, tmp_path) -> None:
    found = measured(tmp_path, "criterion", "--variants", "plain")
    plain, enhanced = (case["variants"]["plain"]["flops"] for case in found["cases"])
    positions, student, teacher = 2 * 16 * 16, 64, 128
    passes = 3  # forward, and the gradients of input and weight
    align, conv = (passes * 2 * positions * teacher * inputs for inputs in (student, 9 * teacher))
    assert plain == align + 2 * conv and enhanced == align + 4 * conv


def test_contrast_and_loader_have_no_operations_to_count(here, tmp_path, capsys) -> None:
    (contrast,) = measured(tmp_path, "contrast", "--variants", "plain", "fast")["cases"]
    assert contrast["variants"]["fast"]["flops"] is None and "4 patches" in contrast["title"]
    (loader,) = measured(tmp_path, "loader", "--variants", "plain", "fast")["cases"]
    plain = loader["variants"]["plain"]
    assert plain["images_per_second"] == pytest.approx(4 / plain["seconds"][0])
    assert "FLOP" not in capsys.readouterr().out.partition("samples of")[2]


def test_evaluation_is_the_call_that_the_program_makes(here, tmp_path, capsys) -> None:
    found = measured(tmp_path, "eval", "--variants", "once", "--variant", "once=", "--variant", "flip=--flip-eval")
    once, flip = (found["cases"][0]["variants"][name] for name in ("once", "flip"))
    assert flip["flops"] == 2 * once["flops"] > 0
    capsys.readouterr()


def test_methods_are_measured_beside_both_baselines(here, tmp_path, capsys) -> None:
    found = measured(tmp_path, "methods", "--methods", "fitnet", "maskd", "afdcd", "--crop", "64", "64")["methods"]
    assert list(found) == ["none", "teacher", "fitnet", "maskd", "afdcd"]
    assert found["fitnet"]["facts"]["parameters"] == 16 * 32 and found["maskd"]["facts"]["state"] == 4 * 8 * 19
    assert found["none"]["facts"]["parameters"] == found["teacher"]["facts"]["parameters"] == 0
    text = capsys.readouterr().out
    assert list(rows_of(text)) == ["method", *found] and set(rows_of(text)["afdcd"]) == {"-"}
    assert "afdcd: not measured: " in text and "--crop-size" in text


def test_slow_forms_are_measured_beside_ours(here, tmp_path, capsys) -> None:
    found = measured(tmp_path, "slow-forms")["losses"]
    assert list(found) == ["skd", "ifvd", "cirkd", "dsd", "maskd"]
    assert all(len(pair["slow"]["seconds"]) == len(pair["this"]["seconds"]) == 1 for pair in found.values())
    assert list(rows_of(capsys.readouterr().out)) == ["loss", *found]


def test_processes_take_turns(scripted) -> None:
    jobs = {name: {"name": name, "seconds": [9.0, 3.0, 1.0], "peaks": [200, 400, 300]} for name in "AB"}
    peak = Scripted({"name": "peak", "rates": [1e9, 2e9]})
    results, rates = measure(jobs, Plan(2, steps=5, warm=2, first=3), peak)
    assert [entry[:2] for entry in scripted] == [
        ("start", "peak"), ("start", "A"), ("start", "B"), ("work", "peak"), ("turn", "A"), ("turn", "A"),
        ("flops", "A"), ("turn", "B"), ("turn", "B"), ("flops", "B"), ("work", "peak"), ("turn", "A"), ("turn", "B"),
        ("end", "B"), ("end", "A")]
    assert scripted[4][2:] == (3, 0) and scripted[5][2:] == (5, 2)
    assert results["A"].seconds == [3.0, 1.0] and results["A"].peak == 400  # the first steps do not count
    assert best_rates(rates) == {"float32": 2e9}


def test_no_round_begins_after_the_time_is_up(scripted) -> None:
    jobs = {name: {"name": name, "seconds": [9.0, 3.0], "peaks": [200, 400]} for name in "AB"}
    results, _ = measure(jobs, Plan(5, seconds=1e-9))
    assert [one.seconds for one in results.values()] == [[3.0], [3.0]]


def test_fresh_processes_take_turns_and_what_is_refused_is_left_out(scripted) -> None:
    jobs = {"A": {"name": "A", "seconds": [9.0, 3.0, 9.0, 1.0], "peaks": [1, 1, 1, 1]}, "B": {"refused": "no"}}
    results, _ = measure(jobs, Plan(2, fresh=True, flops=False, strict=False))
    assert [entry[0] for entry in scripted][:8] == ["start", "turn", "turn", "end"] * 2
    assert results["A"].seconds == [3.0, 1.0] and str(results["B"]) == "no"
    with pytest.raises(UserError, match="B: no"):
        measure({"B": {"refused": "no"}}, Plan(1))


def test_figures_worked_out_by_hand() -> None:
    base = Measured(images=4, idle=100, seconds=[4.0, 2.0, 9.0], cpu_seconds=[6.0, 6.0, 6.0], peak=500, flops=8)
    one = Measured(images=4, idle=150, seconds=[1.0, 2.0, 1.5], cpu_seconds=[2.0, 1.0, 4.0], peak=250, flops=6)
    found = figures(one, base, {"float32": 16.0})
    assert (found["median"], found["min"], found["max"]) == (1.5, 1.0, 2.0)
    assert found["speedup"] == 4 / 1.5 and found["cpu_speedup"] == 3.0 and found["images_per_second"] == 4 / 1.5
    assert (found["memory"], found["work_memory"], found["work_memory_ratio"]) == (250, 100, 0.25)
    assert found["flops_per_second"] == 4.0 and found["share_of_peak"] == 0.25
    table = variant_table({"base": figures(base, base, {}), "one": found})
    assert rows_of(table)["one"] == ["1.5", "1", "2", "2.67", "3.00", "2.67", "0", "0", "0.25", "6e-09", "4e-09", "25%"]
    assert rows_of(table)["base"][-1] == "-"


def test_ratios_of_methods_and_slow_forms() -> None:
    results = {"none": Measured(seconds=[2.0], peak=int(4e8), facts={"parameters": 0, "state": 0}),
               "teacher": Measured(seconds=[4.0], peak=int(5e8), facts={"parameters": 0, "state": 0}),
               "m": Measured(seconds=[1.0, 5.0, 9.0], peak=int(8e8), facts={"parameters": 3_300_000, "state": 43e6}),
               "n": Refused("too small")}
    rows = rows_of(method_table(results, ("none", "teacher")))
    assert rows["m"] == ["3.30", "43", "800", "400", "300", "5", "2.50", "1.25"] and set(rows["n"]) == {"-"}
    pair = [Measured(seconds=[s], peak=int(peak), idle=int(1e6)) for s, peak in ((3.0, 3e6), (1.5, 2e6))]
    assert rows_of(form_table({"f": pair}))["f"] == ["3", "1.5", "2.0x", "2", "1"]


def test_a_turn_waits_counts_and_forgets_the_warm_up() -> None:
    import torch

    calls, x = [], torch.ones(4, 8)
    costs = timed(lambda: calls.append(1), steps=3, warm=2, device="cpu")
    assert len(calls) == 5 and 0 < costs["seconds"] < 1 and costs["cpu_seconds"] >= 0 and costs["peak"] > 1e7
    assert count_flops(lambda: x @ x.T) == 2 * 4 * 4 * 8


def test_another_checkout_is_measured_in_a_process_of_its_own(tmp_path) -> None:
    for name in ("dataset", "engine", "losses", "models", "utils"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "eval.py", tmp_path)
    with open(tmp_path / "engine" / "build.py", "a") as file:
        file.write(OTHER_RUN)
    job = {"kind": "loader", "code": str(tmp_path), "device": "cpu", "threads": 1, "samples": 2,
           "flags": ["--method", "none", "--dataset", "camvid"]}
    with Worker(job) as worker:  # there are no images: only the changed copy does without
        assert worker.about["images"] == 2 and worker.ask(do="turn", steps=1, warm=0)["seconds"] > 0
    with pytest.raises(Refused, match="KeyError: 'nothing'"):
        Worker({**job, "kind": "nothing"})


def test_a_revision_is_taken_out_of_the_repository(tmp_path, monkeypatch) -> None:
    repository = tmp_path / "repository"
    (repository / "engine").mkdir(parents=True)
    (repository / "engine" / "build.py").write_text("# old\n")
    git = ["git", "-C", str(repository), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "old"]):
        subprocess.run([*git, *command], check=True)
    (repository / "engine" / "build.py").write_text("# new\n")
    monkeypatch.setattr(cases, "ROOT", repository)
    found = Path(cases.checkout("HEAD", tmp_path))
    assert (found / "engine" / "build.py").read_text() == "# old\n"
    with pytest.raises(UserError, match="--against nonsense: expected a folder or a git revision"):
        cases.checkout("nonsense", tmp_path)
    with pytest.raises(UserError, match=r"has engine/build\.py"):
        cases.checkout(str(tmp_path), tmp_path)


@pytest.mark.parametrize(("argv", "words"), [
    (["nothing"], ["invalid choice: 'nothing'", "criterion"]),
    (["step", "--variants", "plain", "quick"], ["--variants quick", "plain, fast, bf16, compile"]),
    (["step", "--variant", "bf16"], ["--variant bf16: expected NAME=FLAGS"]),
    (["step", "--student", "resnet18"], ["'resnet18'", "MODEL-BACKBONE"]),
    (["methods", "--teacher", "psp-nonsense"], ["nonsense"]),
    (["criterion", "--maps", "64"], ["--maps 64: expected HEIGHTxWIDTH"]),
    (["loader", "--json", "/"], ["--json /: expected a file"]),
])
def test_wrong_input_is_one_line(capsys, here, argv, words) -> None:
    assert_refused(capsys, benchmark.main, [argv[0], *QUICK, *argv[1:]], *words)


def test_a_flag_that_does_not_exist_names_the_variant(capsys, here, monkeypatch) -> None:
    monkeypatch.setattr(turns, "say", lambda text: None)
    assert_refused(capsys, benchmark.main, ["contrast", *QUICK, "--variant", "odd=--odd"],
                   "odd: unrecognized arguments: --odd")


def test_a_teacher_from_elsewhere_may_come_with_its_weights(tmp_path) -> None:
    options = Step(teacher="module:examples.espnet:camvid", teacher_pretrained="e.pth", data=str(tmp_path))
    case, = cases.step_cases(options, tmp_path)
    assert train_settings(case.jobs["fast"]["flags"]).networks.teacher_pretrained == str(Path("e.pth").absolute())
    assert train_settings(["--dataset", "camvid"]).networks.teacher_pretrained is None
