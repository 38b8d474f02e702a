"""The method that the README writes out as an example is a method: found by itself, listed, trained, resumed."""
from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_methods
import torch
from helpers import ROOT, distil_arguments, records, train_arguments, write_folder_dataset, write_teacher
from method_cases import STUDENT, TEACHER, build, check_gradients, labels, outputs, run, smallest_crop

import losses
import train_kd
from losses.core import distiller

MARK = "<!-- example: add a method -->"


def example() -> tuple[str, str]:
    """(name, source) of the Python block that follows the mark in the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(re.escape(MARK) + r"\s*```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert found, f"README.md has no Python block after {MARK}"
    (name,) = re.findall(r'^@register\("(\w+)"\)', found[1], re.MULTILINE)
    return name, found[1]


@pytest.fixture
def method(tmp_path, monkeypatch) -> Iterator[str]:
    """Its name, while its file is one of the files of ``losses/``; afterwards it is unknown again."""
    name, source = example()
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / f"{name}.py").write_text(source)
    monkeypatch.setattr(losses, "__path__", [*losses.__path__, str(tmp_path / "package")])
    importlib.invalidate_caches()
    yield name
    del distiller._REGISTRY[name]
    del sys.modules[f"losses.{name}"]
    delattr(losses, name)


def test_the_example_gives_finite_losses_and_gradients(method) -> None:
    crop = smallest_crop(method)
    distiller = build(method, crop)
    student, teacher = outputs(STUDENT, crop), outputs(TEACHER, crop, seed=1)
    check_gradients(method, distiller, student, teacher, run(distiller, student, teacher, labels(crop)))
    for of_teacher in (torch.bfloat16, torch.float32):
        test_methods.TestPrecision().test_autocast_gives_finite_float32(method, crop, of_teacher)
    test_methods.TestRefusals().test_maps_of_another_size_are_refused_or_do_not_matter(method, crop)


def test_the_example_is_found_listed_and_trained(method, tmp_path, capsys) -> None:
    data, teacher = write_folder_dataset(tmp_path / "set", train=2, val=1), write_teacher(tmp_path / "teacher.pth")

    def arguments(save: Path, *more: str) -> list[str]:
        return train_arguments(data, save, *distil_arguments(teacher)[:6], "--method", method, "--max-iterations", "2",
                               "--save-per-iters", "1", "--batch-size", "2", *more)

    assert train_kd.main(["--list-methods"]) == 0
    assert re.search(rf"^{method}\b", capsys.readouterr().out, re.MULTILINE)

    run = tmp_path / "run"
    assert train_kd.main(arguments(run)) == 0
    terms = {t.name for t in distiller.methods()[method].terms}
    assert all(terms <= set(r["weighted"]) and all(r["weighted"][t] > 0 for t in terms) for r in records(run))
    state = torch.load(next(run.glob("*_state.pth")), weights_only=True)
    assert any(name.startswith(f"{method}.") for name in state["distillers"])
    assert train_kd.main(arguments(run, "--resume", "auto")) == 0

    weak = tmp_path / "weak"
    assert train_kd.main(arguments(weak, *(x for t in terms for x in (f"--lambda-{t.replace('_', '-')}", "1e-9")))) == 0
    assert all(r["weighted"][t] < 1e-6 for r in records(weak) for t in terms)
