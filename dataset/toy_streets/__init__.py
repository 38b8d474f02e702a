"""The painters of toy streets, the embedded data set: our own road scenes in CamVid's layout, classes and colors.

`python -m dataset.toy_streets --data FOLDER` writes them (see `writer.py`); `scene.py` plans and paints one street.
What the set is for training stands in `dataset/toy.py`, which imports nothing of this.
"""
from __future__ import annotations

from dataset.toy_streets.scene import paint_scene
from dataset.toy_streets.writer import toy_street, write_toy_streets

__all__ = ["paint_scene", "toy_street", "write_toy_streets"]
