"""tools/latency.py: which networks are measured, in which forms, and what the table and the CSV file say of them."""
from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import assert_refused
from in_process import InThisProcess
from tiny_network import tiny_backbone

from engine.run_files import plain
from engine.settings import parse_settings
from models import get_segmentation_model, save_state_dict
from models.hub import CONFIG, build_config
from tools import latency as program
from tools.bench.measure import call_times
from tools.exporting.check import load_onnx
from tools.exporting.graph import Traced
from tools.latency import Subject, find_subjects, make_row, show
from utils.errors import UserError

QUICK = ["--size", "32", "48", "--calls", "4", "--warm", "0", "--threads", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def here(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(program, "Worker", InThisProcess)
    threads = torch.get_num_threads()
    with tiny_backbone():
        yield
    torch.set_num_threads(threads)


def write_constant(program, form, path: Path) -> None:
    """A graph in ONNX that is written at once: what comes in goes out."""
    import onnx
    from onnx import TensorProto, helper

    image, logits = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 3, "h", "w"])
                     for name in ("image", "logits"))
    graph = helper.make_graph([helper.make_node("Identity", ["image"], ["logits"])], "g", [image], [logits])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))


def test_every_form_of_a_network_has_its_rows(tmp_path, capsys, monkeypatch) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    # tests/test_export.py has the real ones, which take seconds
    monkeypatch.setattr(program, "trace", lambda net, form, divisor: Traced(net, 16))
    monkeypatch.setattr(program, "write_onnx", write_constant)
    monkeypatch.setattr(program, "write_pt2", lambda net, path: torch.save(net, path))
    monkeypatch.setattr("tools.exporting.check.load_pt2", lambda path, device: torch.load(path, weights_only=False))
    target = tmp_path / "new" / "rows.csv"
    assert program.main(["psp-tiny", "psp-tiny", *QUICK, "--batch-sizes", "1", "2", "--num-class", "5", "--csv",
                         str(target)]) == 0
    rows = list(csv.DictReader(target.open()))
    assert [(r["form"], r["batch"]) for r in rows] == [(f, b) for f in program.FORMS for b in "12"]
    net = get_segmentation_model("psp", "tiny", 5, aux=False)
    for row in rows:
        assert int(row["parameters"]) == sum(p.numel() for p in net.parameters()) and row["calls"] == "4"
        assert 0 < float(row["median_ms"]) <= float(row["p95_ms"]) and int(row["memory"]) > 0
        assert float(row["images_per_second"]) == pytest.approx(1000 * int(row["batch"]) / float(row["median_ms"]))
        assert (row["file"] == "") == (row["form"] == "pytorch") and (row["height"], row["threads"]) == ("32", "1")
    assert {row["gflop"] for row in rows} == {rows[0]["gflop"]} and float(rows[0]["gflop"]) > 0
    said = capsys.readouterr().out
    assert "Pictures of 32x48" in said and said.count("| psp-tiny") == 6 and "1 threads" in said


def test_a_network_without_a_graph_for_any_size_has_one_for_this_size_or_a_line(capsys, monkeypatch) -> None:
    def trace_or_not(net, form, divisor):
        if form.size is None or net.name == "psp-tiny":
            raise UserError(f"{net.name}: cannot be traced" + "; try --size H W" * (form.size is None))
        assert form.size == (32, 48)
        return Traced(net, 16)

    monkeypatch.setattr(program, "trace", trace_or_not)
    monkeypatch.setattr(program, "write_pt2", lambda net, path: torch.save(net, path))
    monkeypatch.setattr("tools.exporting.check.load_pt2", lambda path, device: torch.load(path, weights_only=False))
    assert program.main(["psp-tiny", "psp-tiny_w0.5", *QUICK, "--forms", "torch-export", "pytorch"]) == 0
    said = capsys.readouterr().out
    assert "psp-tiny, torch-export: not measured: psp-tiny: cannot be traced\n" in said
    assert "psp-tiny_w0.5, torch-export: of a graph for this size, there is none for any size\n" in said
    assert said.count("| psp-tiny ") == 1 and said.count("| psp-tiny_w0.5 ") == 2


def test_what_cannot_be_measured_is_a_line_below_the_table(capsys, monkeypatch) -> None:
    class Refusing(InThisProcess):
        def ask(self, **request):
            if request["do"] == "calls" and not said:
                said.append(True)
                raise program.Refused("no memory")
            return super().ask(**request)

    said: list[bool] = []
    monkeypatch.setattr(program, "Worker", Refusing)
    assert program.main(["psp-tiny", *QUICK, "--forms", "pytorch", "--batch-sizes", "2", "1"]) == 0
    shown = capsys.readouterr().out
    assert "psp-tiny, pytorch, batch 2: not measured: no memory" in shown and shown.count("| psp-tiny") == 1


def test_a_run_means_its_student_and_its_teacher(tmp_path) -> None:
    net, plain_run, distilled = get_segmentation_model("psp", "tiny", 7), tmp_path / "plain", tmp_path / "distilled"
    for folder, flags in ((plain_run, ["--method", "none"]), (distilled, ["--teacher-pretrained", "t.pth"])):
        save_state_dict(net, folder / "kd_x.pth")
        settings = parse_settings(["--student-model", "psp", "--student-backbone", "tiny", *flags])
        (folder / "kd_x_config.json").write_text(json.dumps({"config": plain(settings)}))
    student, teacher = Subject("psp", "tiny", 7, "student"), Subject("deeplabv3", "resnet101", 7, "teacher")
    assert find_subjects(str(plain_run), 19) == [student]
    assert find_subjects(str(distilled), 19) == [student, teacher] and teacher.title == "teacher deeplabv3-resnet101"
    assert find_subjects(str(distilled / "kd_x.pth"), 19) == [Subject("psp", "tiny", 7)]
    (tmp_path / CONFIG).write_text(json.dumps(build_config(net)))
    assert find_subjects(str(tmp_path), 19) == [Subject("psp", "tiny", 7)]
    (tmp_path / CONFIG).write_text(json.dumps(build_config(net) | {"architecture": {"model_type": "x"}}))
    assert find_subjects(str(tmp_path), 19) == [Subject("psp", "tiny", 7, architecture='{"model_type": "x"}')]
    assert find_subjects("smp:Unet:mit-b0", 19) == [Subject("smp:Unet:mit-b0", "", 19)]
    assert find_subjects("deeplabv3-resnet18_w0.5", 19) == [Subject("deeplabv3", "resnet18_w0.5", 19)]


def test_figures_of_a_row() -> None:
    seconds = [0.010] * 18 + [0.020, 0.030]
    row = make_row(Subject("a", "b", 2), "pytorch", 4, {"seconds": seconds, "peak": 300}, 100, (1_500_000, 2.5), None)
    assert (row.median_ms, row.images_per_second, row.work_memory, row.calls) == (10, 400, 200, 20)
    assert row.p95_ms == pytest.approx(20.5)
    cells = [cell.strip() for cell in show([row]).splitlines()[2].split("|")[1:-1]]
    assert cells == ["a-b", "pytorch", "4", "10", "20.5", "400", "0", "0", "1.50", "2.5", "-"]


def test_calls_end_when_their_time_is_over() -> None:
    done = []
    assert len(call_times(lambda: done.append(1), 50, 2, "cpu", most=0)["seconds"]) == 3 and len(done) == 5
    assert len(call_times(lambda: None, 2, 0, "cpu", most=1e9)["seconds"]) == 2


def test_bad_input_is_named(tmp_path, capsys) -> None:
    bare = tmp_path / "bare.pth"
    bare.write_bytes(b"")
    for argv, words in (([str(bare)], ["no JSON file beside it"]),
                        (["psp"], ["no such file or folder", "MODEL-BACKBONE"]),
                        (["psp-resnet9"], ["unknown backbone"]), ([str(tmp_path)], ["kd_..._config.json"]),
                        (["psp-tiny", "--csv", str(tmp_path)], ["--csv", "expected a file"])):
        assert_refused(capsys, program.main, [*argv, *QUICK], *words)
    if not torch.cuda.is_available():
        assert_refused(capsys, program.main, ["psp-tiny", *QUICK, "--device", "cuda"], "there is none")
        with pytest.raises(Exception, match="onnxruntime has no CUDAExecutionProvider"):
            load_onnx(tmp_path / "x.onnx", "cuda")
