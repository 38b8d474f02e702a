"""Faults of whoever writes a method: what would else train something that nobody asked for is refused, and named."""
from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from losses.core import Distiller, Needs, NetInfo, Term, distiller, register
from losses.core.needs import check_needs
from losses.core.objective import Objective
from models.output import SegOutput
from utils.errors import UserError


class Returns(Distiller):
    """Two terms; returns what it is given."""
    terms = (Term("low", 0.0, "weight of the one"), Term("high", 0.0, "weight of the other"))

    def __init__(self, returned: dict[str, Tensor]) -> None:
        super().__init__()
        self.returned = returned

    def forward(self, batch, generator=None) -> dict[str, Tensor]:
        return self.returned


class Student(nn.Module):
    def forward(self, images: Tensor) -> SegOutput:
        return SegOutput(images, None, None, None, None, None, None)


def step(weights: dict[str, float], **returned: Tensor) -> dict[str, Tensor]:
    objective = Objective(Student(), {"two": Returns(returned)}, weights)
    return objective(torch.zeros(1, 3, 2, 2), None, torch.zeros(1, 2, 2, dtype=torch.long), 0)


ONE = torch.ones(())


class TestTerms:
    def test_one_without_a_weight_is_left_out_whether_it_is_returned_or_not(self) -> None:
        weights = {"low": 1.0, "high": 0.0}
        assert set(step(weights, low=ONE, high=ONE)) == set(step(weights, low=ONE)) == {"task", "low"}

    @pytest.mark.parametrize(("returned", "message"), [
        ({"lo": ONE, "high": ONE}, "'two' returned lo, which is none of its terms: expected high, low"),
        ({"low": ONE}, "'two' did not return high: expected every term with a weight; it returned low"),
        ({}, "'two' did not return high, low: .* returned nothing"),
        ({"low": torch.ones(2, 3), "high": ONE}, r"'two' returned low of shape \[2, 3\]: expected a scalar"),
    ])
    def test_what_is_misspelt_missing_or_no_scalar_is_named(self, returned, message) -> None:
        with pytest.raises(UserError, match=message):
            step({"low": 1.0, "high": 1.0}, **returned)


class TestRegistration:
    @pytest.fixture(autouse=True)
    def registry(self, monkeypatch) -> None:
        monkeypatch.setattr(distiller, "_REGISTRY", {})

    @staticmethod
    def define(module: str, name: str, term: str) -> type[Distiller]:
        return register(name)(type("Mine", (Distiller,), {"__module__": module, "terms": (Term(term, 0.0, "weight"),)}))

    def test_a_copied_file_does_not_replace_the_method(self) -> None:
        self.define("losses.mine", "mine", "m")
        with pytest.raises(UserError, match="'mine' is registered twice, as losses.mine:Mine and as losses.copy:Mine"):
            self.define("losses.copy", "mine", "m")

    def test_a_module_can_be_loaded_again(self) -> None:
        first, again = (self.define("losses.mine", "mine", "m") for _ in range(2))
        assert first is not again and {"mine": again} == distiller._REGISTRY

    def test_a_file_that_is_run_and_then_imported_is_one(self, monkeypatch, tmp_path) -> None:
        for name in ("run", "imported"):
            module = ModuleType(name)
            module.__file__ = str(tmp_path / "mine.py")
            monkeypatch.setitem(sys.modules, name, module)
            last = self.define(name, "mine", "m")
        assert {"mine": last} == distiller._REGISTRY

    def test_a_term_belongs_to_one_method(self) -> None:
        self.define("losses.mine", "mine", "m")
        with pytest.raises(UserError, match="term 'm' of method 'other', losses.other:Mine, already belongs to 'mine'"):
            self.define("losses.other", "other", "m")


def test_a_crop_that_is_too_small_names_the_weights_too() -> None:
    net = NetInfo("small", {"logits": 3}, 3)
    with pytest.raises(UserError, match="crops of 64x64 or more, or leave the method out with weights of 0") as refused:
        check_needs("adv", Needs(smallest_map=(8, 8)), net, None, (32, 32), ["lambda_adv"])
    assert refused.value.settings == ("crop_size", "lambda_adv")


@pytest.mark.parametrize(("takes_taps", "flags"), [(True, ("list_taps", "student_taps")), (False, ())])
def test_a_network_from_elsewhere_can_offer_more_taps(takes_taps, flags) -> None:
    net = NetInfo("net", {"logits": 3}, 3, takes_taps=takes_taps)
    with pytest.raises(UserError, match="needs c4 of the student, but net offers only logits") as refused:
        check_needs("mine", Needs(student=("c4",)), net, None, (64, 64))
    assert refused.value.settings == flags
