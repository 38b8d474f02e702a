"""A tiny CamVid folder that tests may damage."""
from __future__ import annotations

from pathlib import Path

import pytest
from reference import tiny_data


@pytest.fixture
def camvid_root(tmp_path: Path) -> Path:
    """Two images (60 x 80 and 45 x 50) in train and in val."""
    tiny_data.write(str(tmp_path), "camvid")
    return tmp_path
