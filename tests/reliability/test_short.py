"""The short form of the faults in numbers, and the page that the table goes to."""
from __future__ import annotations

import pytest
from reliability import run

from utils.errors import UserError


def test_every_fault_is_survived(tmp_path, capsys) -> None:
    assert run.main(["--short", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "| kill -9, Af-DCD, 1 process" in said and "ENOSPC in a save" in said and "| all " in said
    assert len(run.Results(tmp_path / "out" / "results.jsonl").rows) == 5
    assert run.main(["--short", "--out", str(tmp_path / "out")]) == 0, "nothing is done twice"


def test_the_table_replaces_the_one_before(tmp_path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{run.BEGIN}\nold\n{run.END}\nafter\n")
    run.put_into_page("new", page)
    assert page.read_text() == f"before\n{run.BEGIN}\nnew\n{run.END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(UserError, match="marks"):
        run.put_into_page("new", page)
    assert run.BEGIN in run.PAGE.read_text() and run.END in run.PAGE.read_text()
