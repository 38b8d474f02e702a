"""A window resized by itself has the bytes of the whole picture's."""
from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest
import torch

from dataset import SegmentationDataset, get_dataset_spec, transforms, window


def noise(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(size)
    return rng.integers(0, 256, (*size, 3), dtype=np.uint8), rng.integers(0, 256, size, dtype=np.uint8)


@pytest.mark.parametrize("scale", transforms.SCALES)
@pytest.mark.parametrize(("size", "crop"), [((1024, 2048), (512, 1024)), ((333, 501), (97, 120)), ((75, 45), (40, 33)),
                                            ((30, 6001), (64, 64)), ((4, 3), (2, 2)),
                                            ((70, 4), (3, 40)), ((70, 90), (3, 3))])
def test_the_same_bytes_at_every_border_and_in_between(size, crop, scale):
    image, label = noise(size)
    whole = transforms.scale_pair(image, label, scale)
    last = [max(side - wanted, 0) for side, wanted in zip(whole[1].shape, crop, strict=True)]
    places = [sorted({0, min(1, side), min(19, side), side // 3, max(side - 1, 0), side})
              for side in last]
    for number, offset in enumerate(itertools.product(*places)):
        if len(places[0]) > 3 and number % 2:  # half of them
            continue
        part = tuple(slice(first, first + side) for first, side in zip(offset, crop, strict=True))
        how = transforms.Augmentation(scale, offset, False)
        got = window.windowed_crop(image, label, how, crop)
        assert np.array_equal(got[0], whole[0][part]) and np.array_equal(got[1], whole[1][part])


@pytest.mark.parametrize(("kind", "exceptions"), [(cv2.INTER_LINEAR, {7, 11, 13, 14, 17, 19}),
                                                  (cv2.INTER_NEAREST, {13})])
def test_both_ways_to_begin_a_part_occur(kind, exceptions):
    """Near the origin parts begin at the window; far from it some scales need the origin."""
    near = [window.source_span(kind, 480, scale, slice(100, 110)) for scale in transforms.SCALES]
    assert all(span.start > 0 for span in near)
    far = {round(10 * scale) for scale in transforms.SCALES if window.source_span(
        kind, 2048, scale, slice(round(2040 * scale) - 500, round(2040 * scale))).start == 0}
    assert far == exceptions


@pytest.mark.parametrize("scale", [0.37, 1.234567, 2.9])
def test_scales_that_are_no_tenths_are_exact_too(scale):
    image, label = noise((101, 203))
    whole = transforms.scale_pair(image, label, scale)
    how = transforms.Augmentation(scale, (17, 41), True)
    got = window.windowed_crop(image, label, how, (20, 30))
    assert all(np.array_equal(a, b[17:37, 41:71][:, ::-1]) for a, b in zip(got, whole, strict=True))


class TestTrial:
    """windows_are_exact: the trial on noise that stands before the first window of a process"""

    @pytest.fixture(autouse=True)
    def fresh(self):
        window.windows_are_exact.cache_clear()
        yield
        window.windows_are_exact.cache_clear()

    def test_passes(self):
        assert window.windows_are_exact()

    @pytest.mark.parametrize("kind", [cv2.INTER_LINEAR, cv2.INTER_NEAREST])
    def test_an_opencv_of_other_rules_is_noticed_and_named(self, monkeypatch, camvid_root, kind):
        plain = cv2.resize

        def other(image, size, *, fx, fy, interpolation):
            if interpolation == kind:  # as a library would that takes weights from the place in its own part
                image = image[1:] if image.shape[0] > 300 else image
            return plain(image, size, fx=fx, fy=fy, interpolation=interpolation)

        monkeypatch.setattr(cv2, "resize", other)
        with pytest.warns(UserWarning, match=f"OpenCV {cv2.__version__} resizes a part .* takes longer"):
            data = SegmentationDataset(get_dataset_spec("camvid"), camvid_root, "train", train=True, crop_size=(32, 32))
        twin = SegmentationDataset(get_dataset_spec("camvid"), camvid_root, "train", train=True, crop_size=(32, 32),
                                   fast=False)
        assert all(torch.equal(data[0, n][key], twin[0, n][key]) for n in range(10) for key in ("image", "label"))

    @pytest.mark.parametrize("kind", [cv2.INTER_LINEAR, cv2.INTER_NEAREST])
    def test_rounding_far_from_the_origin_is_part_of_it(self, monkeypatch, kind):
        """Parts that always begin at the window would be noticed."""
        exact = window.source_span

        def short(of, length, scale, part):
            span, (resized, source) = exact(of, length, scale, part), window._period(scale)
            periods = max(part.start - 1, 0) // resized
            return span if of != kind else window.Span(periods * source, span.stop, periods * resized)

        monkeypatch.setattr(window, "source_span", short)
        with pytest.warns(UserWarning, match="resizes a part"):
            assert not window.windows_are_exact()


@pytest.mark.parametrize("crop", [(48, 64), (33, 91), (200, 20), (7, 5)])
def test_training_items_are_those_of_the_plain_twin(camvid_root, crop):
    """Every scale, mirrored and not, padded and not."""
    fast, plain = (SegmentationDataset(get_dataset_spec("camvid"), camvid_root, "train", train=True, crop_size=crop,
                                       ignore_label=250, fast=fast) for fast in (True, False))
    seen = set()
    for ordinal in range(120):
        first, second = fast[ordinal % 2, ordinal], plain[ordinal % 2, ordinal]
        assert all(torch.equal(first[key], second[key]) for key in ("image", "label", "valid"))
        assert first["image"].is_contiguous() and first["label"].is_contiguous()
        seen.add(tuple(first["valid"].tolist()))
    assert len(seen) > 1 or crop == (7, 5)
