"""Color masks, overlays, palette files and panels."""
from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from utils.visualize import IGNORE_COLOR, color_mask, comparison, overlay, panel, save_index, save_rgb

PALETTE = np.array([[0, 0, 0], [200, 10, 10], [10, 200, 10], [10, 10, 200]], np.uint8)
INDEX = np.array([[0, 1, 2], [3, -1, 255]], np.int16)


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("index", [INDEX, torch.from_numpy(INDEX), INDEX.astype(np.int64)])
def test_colour_mask(index: np.ndarray | torch.Tensor) -> None:
    mask = color_mask(index, PALETTE)
    assert mask.dtype == np.uint8 and mask.shape == (2, 3, 3)
    assert mask[:1].tolist() == [PALETTE[:3].tolist()]
    assert mask[1].tolist() == [PALETTE[3].tolist(), list(IGNORE_COLOR), list(IGNORE_COLOR)]
    assert color_mask(index, PALETTE, ignore=(1, 2, 3))[1, 1].tolist() == [1, 2, 3]


def test_overlay_mixes_classes_and_leaves_ignored_pixels() -> None:
    image = photo(2, 3)
    mixed = overlay(image, INDEX, PALETTE, alpha=0.25)
    assert mixed.dtype == np.uint8
    assert mixed[1, 1:].tolist() == image[1, 1:].tolist()
    np.testing.assert_array_equal(mixed[0, 1], np.rint(0.75 * image[0, 1] + 0.25 * PALETTE[1]).astype(np.uint8))
    np.testing.assert_array_equal(overlay(image, INDEX, PALETTE, alpha=1.0)[0], PALETTE[:3])


def test_palette_file_reads_as_indices_and_shows_colours(tmp_path: Path) -> None:
    save_index(tmp_path / "new" / "p.png", INDEX, PALETTE)
    save_index(tmp_path / "g.png", torch.from_numpy(INDEX))
    with Image.open(tmp_path / "new" / "p.png") as picture:
        assert picture.mode == "P"
        assert np.asarray(picture).tolist() == [[0, 1, 2], [3, 255, 255]]
        np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), color_mask(INDEX, PALETTE))
    assert cv2.imread(str(tmp_path / "g.png"), cv2.IMREAD_UNCHANGED).tolist() == [[0, 1, 2], [3, 255, 255]]
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["g.png", "p.png"]


def test_save_rgb_keeps_channel_order(tmp_path: Path) -> None:
    image = photo(5, 4)
    save_rgb(tmp_path / "a.png", image)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "a.png"))[..., ::-1], image)


def test_panel_places_every_image() -> None:
    tiles = [np.full((30, 40, 3), value, np.uint8) for value in (10, 90, 170, 250)]
    picture = panel(tiles, ["a", "b\nsecond line"], columns=2, heading="four tiles", tile_width=120)
    assert picture.dtype == np.uint8
    inner = (120 - 2) * (90 - 2)           # a tile less its thin edge
    for value in (10, 90, 170, 250):
        assert (picture == value).all(-1).sum() == pytest.approx(inner, abs=30)
    assert (picture[:, :5] == 255).all() and (picture[-3:] == 255).all()   # margins
    rows, _ = np.nonzero((picture == 10).all(-1))
    assert (picture[:rows.min() - 2].min(-1) < 120).any()                  # the titles are written above


def test_panel_fits_other_shapes_without_distorting_them() -> None:
    picture = panel([np.full((60, 60, 3), 10, np.uint8), np.full((30, 60, 3), 200, np.uint8)], tile_width=100)
    rows, columns = np.nonzero((picture == 200).all(-1))
    assert np.ptp(columns) + 1 == pytest.approx(2 * (np.ptp(rows) + 1), abs=3)


def test_legend_and_titles_change_only_their_places() -> None:
    tiles = [photo(30, 40)] * 3
    names = [f"class {i} with a long name" for i in range(4)]
    plain = panel(tiles, tile_width=120)
    full = panel(tiles, classes=names, palette=PALETTE, tile_width=120)
    assert full.shape[1] == plain.shape[1] and full.shape[0] > plain.shape[0]
    below = full[plain.shape[0]:].reshape(-1, 3).tolist()
    assert all(below.count(colour.tolist()) > 50 for colour in PALETTE[1:])


def test_mask_stays_a_mask_when_resized() -> None:
    mask = color_mask(np.random.default_rng(0).integers(0, 4, (37, 53)), PALETTE)
    picture = panel([mask], tile_width=90)
    colours = {tuple(c) for c in picture.reshape(-1, 3).tolist()}
    assert colours <= {*map(tuple, PALETTE.tolist()), (255, 255, 255), (173, 181, 189)}


def test_comparison_legend_shows_what_occurs() -> None:
    label = np.zeros((20, 30), np.int64)
    label[5:] = 1
    shape = comparison([photo(20, 30)] * 2, [label] * 2, [[label] * 2, [label] * 2], ["teacher\nmIoU 1 %", "student"],
                       palette=PALETTE, classes=["a", "b", "c", "d"], tile_width=120).shape
    alone = comparison([photo(20, 30)], [label], [[label], [label]], ["teacher\nmIoU 1 %", "student"],
                       palette=PALETTE, classes=["a", "b", "c", "d"], tile_width=120)
    assert shape[1] == alone.shape[1] and shape[0] > alone.shape[0]
    assert not (alone == PALETTE[3]).all(-1).any()
    with pytest.raises(ValueError, match="titles"):
        panel([photo(4, 4)] * 3, ["one", "two"])
