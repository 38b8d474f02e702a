"""Classes of weights against classes of data: order counts, spelling does not."""
from __future__ import annotations

from types import SimpleNamespace

import pytest

from models import check_classes
from utils.errors import UserError

NAMES = ["road", "tall tree", "car"]


def compare(trained: list[str] | None, asked: list[str]) -> str | None:
    net = SimpleNamespace(trained_on=None if trained is None else {"classes": trained})
    return check_classes(net, "a.pth", asked)


@pytest.mark.parametrize("asked", [NAMES, ["Road", "tall  tree", "CAR "]])
def test_the_same_classes(asked):
    assert compare(NAMES, asked) is None


def test_unknown_classes():
    assert compare(None, NAMES) is None


@pytest.mark.parametrize("asked", [["car", "tall tree", "road"], ["Tall Tree", "road", "car"], ["road", "car", "bus"]])
def test_a_class_at_another_place_is_refused(asked):
    with pytest.raises(UserError, match="a.pth: trained for these classes in another order \\(class [01] is '"):
        compare(NAMES, asked)


def test_other_names_are_told():
    assert compare(NAMES, ["road", "tree", "car"]) == (
        "a.pth: trained for classes of other names (class 1 is 'tall tree' there and 'tree' here)")
    assert "and 2 more" in compare(list("abcde"), list("vwxyz"))


def test_another_number_is_refused():
    with pytest.raises(UserError, match="a.pth: its description names 3 classes, the data have 2"):
        compare(NAMES, NAMES[:2])
