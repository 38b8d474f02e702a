"""Specs and their registry."""
from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dataset import get_dataset_spec, list_datasets, register_dataset
from dataset.palette import bit_palette
from utils.errors import UserError

FIXED = ["ade20k", "camvid", "citys", "coco_stuff_164k", "toy_streets", "voc"]


def test_all_are_listed():
    assert set(FIXED) | {"folder"} <= set(list_datasets())


def test_the_list_needs_no_painters():
    """In a fresh interpreter: toy streets are listed without the program that paints them."""
    code = ("import sys, dataset; assert 'toy_streets' in dataset.list_datasets(); "
            "sys.exit(any(name.startswith('dataset.toy_streets') for name in sys.modules))")
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True, timeout=120)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="unknown data set 'cityscape'; expected one of ade20k, camvid, citys"):
        get_dataset_spec("cityscape")


def test_registering_a_name_twice():
    with pytest.raises(ValueError, match="camvid"):
        register_dataset(get_dataset_spec("camvid"))


@pytest.mark.parametrize("name", FIXED)
class TestSpec:
    """What every spec promises."""

    def test_names_and_colors_are_distinct(self, name):
        spec = get_dataset_spec(name)
        assert len(set(spec.classes)) == spec.num_class and all(spec.classes)
        assert spec.palette.shape == (spec.num_class, 3) and spec.palette.dtype == np.uint8
        assert len({tuple(color) for color in spec.palette.tolist()}) == spec.num_class

    def test_every_class_has_a_stored_value(self, name):
        spec = get_dataset_spec(name)
        assert set(spec.id_to_train.tolist()) == set(range(-1, spec.num_class))
        assert np.array_equal(spec.id_to_train[spec.train_to_id], np.arange(spec.num_class))
        assert spec.known_ids[spec.id_to_train >= 0].all()

    def test_cannot_be_changed_by_accident(self, name):
        spec = get_dataset_spec(name)
        with pytest.raises(dataclasses.FrozenInstanceError):
            spec.name = "other"
        with pytest.raises(ValueError):
            spec.palette[0] = 0

    def test_pickle(self, name):
        spec = get_dataset_spec(name)
        copy = pickle.loads(pickle.dumps(spec))
        assert copy.splits == spec.splits and np.array_equal(copy.id_to_train, spec.id_to_train)

    def test_splits(self, name):
        spec = get_dataset_spec(name)
        for split in (spec.train_split, spec.selection_split, spec.reference_selection_split, *spec.report_splits):
            assert split in spec.eval_splits


def test_camvid_selects_on_val_and_reports_test():
    spec = get_dataset_spec("camvid")
    assert (spec.selection_split, spec.report_splits, spec.reference_selection_split) == ("val", ("test",), "test")


def test_only_two_test_splits_have_no_labels():
    without = {(name, split) for name in FIXED for split in get_dataset_spec(name).splits
               if split not in get_dataset_spec(name).eval_splits}
    assert without == {("citys", "test"), ("ade20k", "test")}


def test_derived_spec():
    """A set in another set's layout is one call of `dataclasses.replace`."""
    spec = dataclasses.replace(get_dataset_spec("camvid"), name="derived", train_crop=(9, 9))
    assert spec.num_class == 11 and spec.train_crop == (9, 9) and spec.allowed_ids() == "0..11"


@pytest.mark.parametrize("change", [{"palette": np.zeros((3, 3))}, {"id_to_train": np.zeros(5)},
                                    {"id_to_train": np.full(256, 11)}])
def test_inconsistent_spec(change):
    with pytest.raises(ValueError, match="camvid"):
        dataclasses.replace(get_dataset_spec("camvid"), **change)


def test_bit_palette_is_that_of_voc():
    assert bit_palette(256)[[0, 1, 2, 3, 15, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [192, 128, 128], [224, 224, 192]]
    assert len(np.unique(bit_palette(256), axis=0)) == 256
    assert bit_palette(2, first=1).tolist() == [[128, 0, 0], [0, 128, 0]]
