"""``tools/benchmark_methods.py`` at a size where it takes seconds."""
from __future__ import annotations

import importlib.util
import json
import sys

import pytest
from helpers import ROOT, assert_refused

from utils.cli import describe_error
from utils.errors import UserError

SMALL = ["--student", "psp-resnet18_w0.125", "--teacher", "psp-resnet18_w0.25", "--dataset", "camvid", "--crop", "64",
         "64", "--steps", "1", "--repeats", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_methods", ROOT / "tools" / "benchmark_methods.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def here(benchmark, monkeypatch) -> list[list]:
    """Measurements in this process instead of one each; the jobs that were asked for, in order."""
    jobs = []

    def measure(job: list, argv: list[str]) -> dict:
        jobs.append(job)
        try:
            return benchmark.measure_job(job, benchmark.parse(argv))
        except UserError as error:
            return {"refused": describe_error(error)}

    monkeypatch.setattr(benchmark, "in_own_process", measure)
    return jobs


def test_methods_are_measured_in_rounds_beside_both_baselines(benchmark, here, tmp_path, capsys) -> None:
    path = tmp_path / "costs.json"
    argv = [*SMALL, "--dataset", "citys", "--methods", "fitnet", "maskd", "afdcd", "--json", str(path)]
    assert benchmark.main(argv) == 0
    names = ["none", "teacher", "fitnet", "maskd", "afdcd"]
    assert [j[1] for j in here] == names + names[:-1]  # what was refused is not tried again
    results = json.loads(path.read_text())["results"]
    assert results["fitnet"]["parameters"] == 16 * 32 and results["maskd"]["state"] == 4 * 8 * 19
    assert results["none"]["parameters"] == results["teacher"]["parameters"] == 0
    assert all(r["seconds"] > 0 and r["peak"] > 1e7 for n, r in results.items() if n != "afdcd")
    text = capsys.readouterr().out
    rows = {x.split("|")[1].strip(): x for x in text.splitlines() if x.startswith("| ")}
    assert list(rows) == ["method", *names]
    assert len({x.count("|") for x in rows.values()}) == 1
    assert "afdcd: not measured: " in text and "--crop-size" in text


def test_slow_forms_are_measured_beside_ours(benchmark, here, capsys) -> None:
    assert benchmark.main([*SMALL, "--slow-forms"]) == 0
    text = capsys.readouterr().out
    for name in ("skd", "ifvd", "cirkd", "dsd", "maskd"):
        assert here.count(["form", name, 0]) == here.count(["form", name, 1]) == 2
        assert f"| {name} " in text


def test_a_measurement_in_its_own_process(benchmark) -> None:
    found = benchmark.in_own_process(["form", "maskd", 1], SMALL)
    assert found["seconds"] > 0 and found["peak"] >= 0
    refused = benchmark.in_own_process(["method", "none"], [*SMALL, "--student", "x"])
    assert refused == {"refused": "network 'x': expected MODEL-BACKBONE, for example deeplabv3-resnet18"}


def test_unknown_networks_are_refused_in_one_line(benchmark, capsys) -> None:
    assert_refused(capsys, benchmark.main, [*SMALL, "--student", "psp-nonsense"], "nonsense")


def test_ratios(benchmark) -> None:
    results = {"none": {"seconds": 2.0, "peak": 4e8, "parameters": 0, "state": 0},
               "teacher": {"seconds": 4.0, "peak": 5e8, "parameters": 0, "state": 0},
               "m": {"seconds": 5.0, "peak": 8e8, "parameters": 3_300_000, "state": 43e6}}
    header, rows = benchmark.method_rows(results)
    assert rows[2] == ["m", "3.30", "43", "800", "400", "300", "5", "2.50", "1.25"]
    assert len(header) == len(rows[2])
    _, (row,) = benchmark.form_rows({"f": [{"seconds": 3.0, "peak": 2e6}, {"seconds": 1.5, "peak": 1e6}]})
    assert row == ["f", "3", "1.5", "2.0x", "2", "1"]
