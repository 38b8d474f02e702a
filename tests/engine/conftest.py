"""A tiny run that several files interrupt and damage copies of."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import four_steps, write_folder_dataset

import train_kd
from models.preprocess import Preprocess


@pytest.fixture(scope="module")
def few_images(tmp_path_factory) -> Path:
    """Four images to train on, two to validate on."""
    return write_folder_dataset(tmp_path_factory.mktemp("few") / "set", train=4, val=2)


@pytest.fixture(scope="module")
def whole_run(few_images, tmp_path_factory) -> Path:
    """The folder of a run of four steps that nothing has interrupted."""
    save = tmp_path_factory.mktemp("whole")
    assert train_kd.main(four_steps(few_images, save)) == 0
    return save


@pytest.fixture
def in_float64(monkeypatch):
    """Networks, images and losses are in float64, where rounding stays small."""
    normalize = Preprocess.__call__
    monkeypatch.setattr(Preprocess, "__call__", lambda self, *given: normalize(self, *given).double())
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
