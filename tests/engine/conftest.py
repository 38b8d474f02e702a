"""A tiny run that several files interrupt and damage copies of."""
from __future__ import annotations

from pathlib import Path

import pytest
from helpers import four_steps, write_folder_dataset

import train_kd


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
