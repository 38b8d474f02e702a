"""uint8 BGR in, what the network wants out."""
from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from models import CAFFE_BGR, IMAGENET_RGB, Preprocess, get_preprocess
from utils.errors import UserError


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 9, 11), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_caffe_bgr_subtracts_the_mean(images):
    want = images.double() - torch.tensor([104.00698793, 116.66876762, 122.67891434]).double().view(1, 3, 1, 1)
    got = CAFFE_BGR(images)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


def test_imagenet_rgb_swaps_scales_and_normalizes(images):
    got = IMAGENET_RGB(images)
    for out, (channel, mean, std) in enumerate([(2, 0.485, 0.229), (1, 0.456, 0.224), (0, 0.406, 0.225)]):
        want = (images[:, channel].double() / 255 - mean) / std
        torch.testing.assert_close(got[:, out].double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("preprocess", [CAFFE_BGR, IMAGENET_RGB], ids=["bgr", "rgb"])
def test_pixels_outside_the_valid_rectangle_are_zero_after_the_mean(images, preprocess):
    valid = torch.tensor([[0, 9, 0, 11], [2, 5, 3, 10]], dtype=torch.int16)
    plain, got = preprocess(images), preprocess(images, valid)
    assert torch.equal(got[0], plain[0])
    assert torch.equal(got[1, :, 2:5, 3:10], plain[1, :, 2:5, 3:10])
    assert got[1].count_nonzero() == plain[1, :, 2:5, 3:10].count_nonzero() > 0


def test_an_empty_rectangle_leaves_nothing(images):
    assert CAFFE_BGR(images, torch.zeros(2, 4, dtype=torch.int16)).count_nonzero() == 0


def test_the_input_is_not_changed(images):
    before = images.clone()
    IMAGENET_RGB(images, torch.tensor([[0, 1, 0, 1]] * 2))
    assert torch.equal(images, before)


@pytest.mark.parametrize("bad", [torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(1, 1, 4, 4, dtype=torch.uint8),
                                 torch.zeros(1, 3, 4, 4)], ids=["3d", "gray", "float"])
def test_wrong_images(bad):
    with pytest.raises(UserError, match=r"uint8 images \[B, 3, H, W\]"):
        CAFFE_BGR(bad)


@pytest.mark.parametrize("preprocess", [CAFFE_BGR, IMAGENET_RGB, Preprocess("rgb", (1, 2, 3), (4, 5, 6), 2)])
def test_round_trip_through_json(preprocess):
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess


@pytest.mark.parametrize("change", [{"channel_order": "xyz"}, {"mean": [1, 2]}, {"std": [1, 0, 1]}, {"scale": 0},
                                    {"scale": None}, {"mean": 3}, {"mean": [1, 2, float("nan")]}, {"gamma": 1}])
def test_bad_descriptions(change):
    with pytest.raises(ValueError):
        Preprocess.from_dict({**CAFFE_BGR.to_dict(), **change})


def test_names_and_immutability():
    assert get_preprocess("bgr") is CAFFE_BGR and get_preprocess("rgb") is IMAGENET_RGB
    assert get_preprocess(IMAGENET_RGB) is IMAGENET_RGB
    with pytest.raises(UserError, match="'hsv'.*bgr, rgb"):
        get_preprocess("hsv")
    with pytest.raises(dataclasses.FrozenInstanceError):
        CAFFE_BGR.scale = 2
