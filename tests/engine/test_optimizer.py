"""Learning rate and optimizer of a run against literal twins."""
from __future__ import annotations

import pytest
from helpers import assert_refused

import train_kd
from utils.schedule import poly_lr


@pytest.mark.parametrize("step", [0, 1, 399, 20000, 39999])
def test_the_learning_rate_decays_to_its_floor_as_released(step) -> None:
    """MasKD and DIST: 1e-4 + (lr - 1e-4)(1 - i/N)^0.9; without a floor bit for bit lr (1 - i/N)^0.9."""
    assert poly_lr(0.02, step, 40000, 0.9, 1e-4) == pytest.approx(1e-4 + (0.02 - 1e-4) * (1 - step / 40000) ** 0.9)
    assert poly_lr(0.02, step, 40000, 0.9) == poly_lr(0.02, step, 40000, 0.9, 0.0) == 0.02 * (1 - step / 40000) ** 0.9


def test_a_floor_above_the_learning_rate_is_refused(capsys) -> None:
    assert_refused(capsys, train_kd.main, ["--method", "none", "--min-lr", "0.1"], "--min-lr 0.1", "--lr 0.02")
    assert_refused(capsys, train_kd.main, ["--method", "dist", "--teacher-pretrained", "t.pth", "--lr", "0.00005"],
                   "--min-lr 0.0001", "--lr 5e-05", "--min-lr 0 ")
