"""The short form of the faults in numbers, and the page that the table goes to."""
from __future__ import annotations

import pytest
from reliability import run
from reliability.runs import Fault, content
from reliability.stops import state_after
from reliability.victim import checksum

from utils.errors import UserError


def test_every_fault_is_survived(tmp_path, capsys) -> None:
    assert run.main(["--short", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "| kill -9, Af-DCD, 1 process" in said and "ENOSPC in a save" in said and "| all " in said
    assert len(run.Results(tmp_path / "out" / "results.jsonl").rows) == 5
    killed = tmp_path / "out" / "reliability-runs" / "afdcd-1"
    assert run.main(["--short", "--out", str(tmp_path / "out")]) == 0 and killed.is_dir(), "nothing is done twice"
    state = content(killed)
    step, digest = state["step"], checksum(state)
    assert state_after(killed, {step: (1, digest)}, before=step) == step
    assert state_after(killed, {step: (1, digest)}, before=step + 1) is None, "it went back"
    next(iter(state["model"].values())).view(-1)[0] += 1
    assert state_after(killed, {step: (1, checksum(state))}, before=0) is None, "another state"


def test_a_folder_that_others_have_made_is_left_alone(tmp_path) -> None:
    theirs = tmp_path / "reliability-runs"
    theirs.mkdir()
    (theirs / "student.pth").touch()
    with pytest.raises(UserError, match="reliability-runs: not a folder of these runs"):
        run.main(["--short", "--out", str(tmp_path)])
    assert (theirs / "student.pth").is_file()


def test_the_table_replaces_the_one_before(tmp_path, capsys) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{run.BEGIN}\nold\n{run.END}\nafter\n")
    run.put_into_page("new", page)
    assert page.read_text() == f"before\n{run.BEGIN}\nnew\n{run.END}\nafter\n"
    results = run.Results(tmp_path / "results.jsonl")
    faults = [("saves", Fault("a", None)), ("damage", Fault("b", None))]
    results.add("damage", "b", 2, 2, "")
    run.publish(faults, results, page)
    assert "new" in page.read_text() and "results.jsonl has not all of saves\n" in capsys.readouterr().err
    results.add("saves", "a", 3, 3, "")
    run.publish(faults, results, page)
    assert "new" not in page.read_text() and "| all " in page.read_text()
    page.write_text("no marks")
    with pytest.raises(UserError, match="marks"):
        run.put_into_page("new", page)
    assert run.BEGIN in run.PAGE.read_text() and run.END in run.PAGE.read_text()
