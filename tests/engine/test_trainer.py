"""Short real runs: the files they leave, what they log, and that a resumed run is the same run."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import (
    STEM,
    assert_refused,
    distil_arguments,
    records,
    train_arguments,
    without_times,
    write_folder_dataset,
    write_teacher,
)

import train_kd
from engine.build import build_run
from engine.checkpoint import load_state
from engine.settings import parse_settings
from models import get_segmentation_model
from utils.distributed import init_distributed


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_folder_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth")


@pytest.fixture(scope="module")
def whole(data, teacher, tmp_path_factory) -> Path:
    """The folder of an uninterrupted Af-DCD run."""
    save = tmp_path_factory.mktemp("whole")
    assert train_kd.main(train_arguments(data, save, *distil_arguments(teacher))) == 0
    return save


def weights(save: Path, suffix: str = "") -> dict[str, torch.Tensor]:
    return torch.load(save / f"{STEM}{suffix}.pth", weights_only=True)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class TestFiles:
    def test_the_student_is_a_plain_state_dict_without_distiller_weights(self, whole) -> None:
        state = weights(whole)
        assert all(isinstance(v, torch.Tensor) for v in state.values())
        net = get_segmentation_model(model="deeplab_mobile", backbone="mobilenetv2_w0.25", num_class=5)
        net.load_state_dict(state, strict=True)
        assert weights(whole, "_best_model").keys() == state.keys()

    def test_the_training_state_holds_everything(self, whole) -> None:
        state = weights(whole, "_state")
        assert state["step"] == 6 and 0 < state["best"] <= 1
        assert any("projetor" in k for k in state["distillers"])
        assert state["optimizer"]["state"] and state["config"]["lambda_fd"] == 1e-5 and "torch" in state["versions"]

    def test_the_effective_configuration_is_saved(self, whole) -> None:
        saved = json.loads((whole / f"{STEM}_config.json").read_text())
        assert saved["config"]["crop_size"] == [64, 64] and saved["config"]["momentum"] == 0.9
        assert saved["processes"] == 1

    def test_nothing_temporary_is_left(self, whole) -> None:
        assert not [p for p in whole.rglob("*") if p.name.endswith(".tmp")]


class TestLog:
    def test_every_term_is_logged_raw_and_weighted(self, whole) -> None:
        lines = records(whole)
        assert [r["step"] for r in lines] == [1, 2, 3, 4, 5, 6]
        for r in lines:
            assert set(r["raw"]) == set(r["weighted"]) == {"task", "kd", "fd", "ctr"}
            assert r["weighted"]["fd"] == pytest.approx(1e-5 * r["raw"]["fd"])
            assert r["loss"] == pytest.approx(sum(r["weighted"].values()), rel=1e-6)
            assert 0 <= r["diagnostics"]["afdcd/positive_rank"] <= 1 and r["grad_norm"]["afdcd"] > 0
        assert [r["lr"] for r in lines] == pytest.approx([0.02 * (1 - i / 6) ** 0.9 for i in range(6)])

    def test_validation_is_logged(self, whole) -> None:
        assert [r["step"] for r in records(whole, "val")] == [3, 6]
        assert max(r["mIoU"] for r in records(whole, "val")) == pytest.approx(weights(whole, "_state")["best"])


class Killed(Exception):
    pass


def interrupted(monkeypatch, argv: list[str], at: int) -> None:
    """Run until just before step ``at`` and die there."""
    train_batch = train_kd.train_batch

    def dying(run, batch):
        if run.step == at:
            raise Killed
        return train_batch(run, batch)

    with monkeypatch.context() as patch:
        patch.setattr(train_kd, "train_batch", dying)
        with pytest.raises(Killed):
            train_kd.main(argv)


class TestResume:
    @pytest.mark.parametrize("workers", ["0", "2"])
    def test_a_resumed_run_ends_with_the_same_weights(self, data, teacher, whole, tmp_path, monkeypatch,
                                                      workers) -> None:
        argv = train_arguments(data, tmp_path, *distil_arguments(teacher))
        interrupted(monkeypatch, argv, at=5)
        assert weights(tmp_path, "_state")["step"] == 3
        assert train_kd.main([*argv, "--resume", "auto", "--workers", workers]) == 0
        assert same(weights(tmp_path), weights(whole))
        assert same(weights(tmp_path, "_best_model"), weights(whole, "_best_model"))
        assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4, 5, 6]
        assert without_times(records(tmp_path)) == without_times(records(whole))

    def test_auto_starts_afresh_when_there_is_nothing(self, data, tmp_path) -> None:
        argv = train_arguments(data, tmp_path, "--method", "none", "--max-iterations", "1", "--resume", "auto")
        assert train_kd.main(argv) == 0
        assert [r["step"] for r in records(tmp_path)] == [1]

    def test_a_finished_run_resumes_to_itself(self, data, tmp_path) -> None:
        argv = train_arguments(data, tmp_path, "--method", "none", "--max-iterations", "2")
        train_kd.main(argv)
        before = weights(tmp_path)
        assert train_kd.main([*argv, "--resume", "auto"]) == 0
        assert same(before, weights(tmp_path))

    def test_a_finished_run_takes_no_other_settings(self, data, tmp_path, capsys, monkeypatch) -> None:
        """Of what no step has used, nothing is written; where results go and what they are called may change."""
        argv = train_arguments(data, tmp_path / "run", "--method", "none", "--max-iterations", "1", "--skip-val")
        again = [*argv, "--resume", "auto", "--results", str(tmp_path / "results"), "--label", "x"]
        train_kd.main(argv)
        before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
        assert_refused(capsys, train_kd.main, [*again, "--lr", "0.5"], "_state.pth: the run is finished, at step 1",
                       "lr: 0.02 -> 0.5")
        assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
        assert not (tmp_path / "results").exists()
        assert train_kd.main(again) == 0
        (path,) = (tmp_path / "results").rglob("0.json")
        assert "changed" not in json.loads(path.read_text())
        monkeypatch.setattr("engine.checkpoint.load_state", lambda path: {**load_state(path), "processes": 2})
        assert train_kd.main([*again, "--label", "y"]) == 0
        (path,) = (tmp_path / "results").rglob("y/0.json")
        assert "changed" not in json.loads(path.read_text())

    def test_settings_that_change_on_the_way_are_written_down(self, data, tmp_path, monkeypatch) -> None:
        argv = train_arguments(data, tmp_path, "--method", "none", "--max-iterations", "3", "--save-per-iters", "1",
                               "--skip-val", "--results", str(tmp_path / "results"))
        interrupted(monkeypatch, argv, at=1)
        interrupted(monkeypatch, [*argv, "--resume", "auto", "--lr", "0.5"], at=2)
        assert train_kd.main([*argv, "--resume", "auto", "--lr", "0.5", "--momentum", "0.5"]) == 0
        expected = [{"step": 1, "setting": "lr", "before": 0.02, "after": 0.5},
                    {"step": 2, "setting": "momentum", "before": 0.9, "after": 0.5}]
        (result,) = (tmp_path / "results").rglob("0.json")
        for path in (result, tmp_path / f"{STEM}_config.json"):
            assert json.loads(path.read_text())["changed"] == expected

    def test_another_teacher_or_other_class_weights_are_a_change(self, data, teacher, tmp_path, capsys,
                                                                 monkeypatch) -> None:
        """Under the same names too; the same under another name are none, and a finished run takes no others."""
        own, classes = tmp_path / "teacher.pth", tmp_path / "classes.json"
        shutil.copy(teacher, own)
        classes.write_text("[1, 1, 1, 1, 1]")

        def arguments(own: Path, classes: Path) -> list[str]:
            return train_arguments(data, tmp_path / "run", *distil_arguments(own), "--class-weights", str(classes),
                                   "--max-iterations", "2", "--save-per-iters", "1", "--skip-val")

        interrupted(monkeypatch, arguments(own, classes), at=1)
        moved = shutil.copy(own, tmp_path / "moved.pth"), shutil.copy(classes, tmp_path / "moved.json")
        interrupted(monkeypatch, [*arguments(*moved), "--resume", "auto"], at=1)
        assert "will differ" not in capsys.readouterr().out
        write_teacher(own)
        classes.write_text("[1, 1, 1, 2, 1]")
        assert train_kd.main([*arguments(own, classes), "--resume", "auto"]) == 0
        said = capsys.readouterr().out
        changed = json.loads((tmp_path / "run" / f"{STEM}_config.json").read_text())["changed"]
        assert [(one["step"], one["setting"]) for one in changed] == [(1, "class_weights"), (1, "teacher_pretrained")]
        assert changed[0]["after"] == [1, 1, 1, 2, 1] and changed[1]["before"] != changed[1]["after"]
        assert all(f"{one['setting']}: {one['before']} -> {one['after']}" in said for one in changed)
        assert_refused(capsys, train_kd.main, [*arguments(*moved), "--resume", "auto"], "the run is finished",
                       "teacher_pretrained: weights")

    def test_a_run_may_end_where_it_is(self, data, tmp_path, monkeypatch) -> None:
        argv = train_arguments(data, tmp_path, "--method", "none", "--skip-val")
        interrupted(monkeypatch, argv, at=4)
        assert train_kd.main([*argv, "--max-iterations", "3", "--resume", "auto"]) == 0
        assert json.loads((tmp_path / f"{STEM}_config.json").read_text())["changed"] == [
            {"step": 3, "setting": "max_iterations", "before": 6, "after": 3}]

    def test_a_state_goes_on_in_another_folder(self, data, teacher, whole, tmp_path, monkeypatch) -> None:
        first, second = tmp_path / "first", tmp_path / "second"
        method = distil_arguments(teacher)
        interrupted(monkeypatch, train_arguments(data, first, *method), at=5)
        state = first / f"{STEM}_state.pth"
        assert train_kd.main(train_arguments(data, second, *method, "--resume", str(state))) == 0
        assert same(weights(second), weights(whole))
        # the best model of the first folder is not here: that of the second is its own
        assert weights(second, "_state")["best"] == pytest.approx(records(second, "val")[-1]["mIoU"])
        assert (second / f"{STEM}_best_model.pth").is_file()

    def test_a_finished_run_without_validation_reports_none(self, data, tmp_path) -> None:
        argv = train_arguments(data, tmp_path, "--method", "none", "--max-iterations", "1")
        train_kd.main([*argv, "--skip-val"])
        assert train_kd.main([*argv, "--resume", "auto"]) == 0
        assert not (tmp_path / f"{STEM}_best_model.pth").exists()

    def test_the_text_log_holds_what_was_said_before_it_existed(self, whole) -> None:
        (text,) = (whole / "logs").glob("*_log.txt")
        assert "tensors matched" in text.read_text() and "configuration" in text.read_text()

    def test_a_fresh_run_in_the_same_folder_moves_the_old_one_aside(self, data, tmp_path) -> None:
        argv = train_arguments(data, tmp_path, "--method", "none", "--max-iterations", "1")
        train_kd.main(argv)
        before = weights(tmp_path)
        train_kd.main([*argv, "--seed", "1"])
        assert same(before, weights(tmp_path / "previous-1"))
        assert not same(before, weights(tmp_path))


def test_the_same_seed_gives_the_same_student_for_every_method(data, teacher, tmp_path) -> None:
    students = [build_run(parse_settings(train_arguments(data, tmp_path, *more)), init_distributed(True)).student
                for more in (["--method", "none"], distil_arguments(teacher))]
    assert same(students[0].state_dict(), students[1].state_dict())


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state(data, tmp_path, capsys, monkeypatch) -> None:
    from helpers import assert_refused

    argv = train_arguments(data, tmp_path, "--method", "none", "--log-iter", "100")
    train_batch = train_kd.train_batch

    def poisoned(run, batch):
        if run.step == 4:
            next(run.student.parameters()).data.fill_(float("nan"))
        return train_batch(run, batch)

    monkeypatch.setattr(train_kd, "train_batch", poisoned)
    assert_refused(capsys, train_kd.main, argv, "NaN or infinite")
    state = weights(tmp_path, "_state")
    assert state["step"] == 3 and all(v.isfinite().all() for v in state["model"].values())
