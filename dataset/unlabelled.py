"""Images without labels, and batches that hold some of them behind the labeled ones."""
from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset

from dataset.discovery import Sample
from dataset.folder import IMAGE_SUFFIXES
from dataset.segmentation import SegmentationDataset
from dataset.spec import DatasetSpec, SplitSpec
from utils.errors import UserError

SPLIT = "unlabelled"


def unlabeled_spec(spec: DatasetSpec) -> DatasetSpec:
    """The data set of every image below a folder, without labels, for networks with the classes of ``spec``."""
    return replace(spec, title="the images without labels", train_split=SPLIT,
                   splits={SPLIT: SplitSpec("", None, IMAGE_SUFFIXES, nested=True, same_names=True)})


def unlabeled_images(spec: DatasetSpec, folder: str | os.PathLike, **options: Any) -> SegmentationDataset:
    """A training set of every image below a folder, in whose items no pixel has a label. spec: of the labeled images;
    options: of :class:`SegmentationDataset`. UserError without any image."""
    try:
        return SegmentationDataset(unlabeled_spec(spec), folder, SPLIT, train=True, unlabeled=True, **options)
    except UserError as error:
        raise UserError(str(error), settings=["unlabelled"]) from error


class MixedDataset(Dataset):
    """Training samples of a labeled set and, behind them, of one without labels: ``ds[index, ordinal]``. An item's
    ``index`` counts through both."""

    def __init__(self, labeled: SegmentationDataset, unlabeled: SegmentationDataset) -> None:
        self.labeled, self.unlabeled = labeled, unlabeled

    @property
    def samples(self) -> list[Sample]:
        """The files of both."""
        return [*self.labeled.samples, *self.unlabeled.samples]

    def __len__(self) -> int:
        return len(self.labeled) + len(self.unlabeled)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, ordinal = key
        if index < len(self.labeled):
            return self.labeled[index, ordinal]
        return {**self.unlabeled[index - len(self.labeled), ordinal], "index": index}
