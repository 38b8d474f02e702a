"""Data sets: a short spec per set over one dataset class.

Every module of this folder is imported, so that adding a data set is adding a file; packages (painters) are not.
"""
from __future__ import annotations

import importlib
import pkgutil

from dataset.cache import use_cache
from dataset.fingerprint import changes, fingerprint
from dataset.sampler import UNLABELED_STREAM, EvalSampler, MixedSampler, TrainSampler
from dataset.segmentation import SegmentationDataset, collate, worker_init
from dataset.spec import DatasetSpec, SplitSpec, get_dataset_spec, list_datasets, register_builder, register_dataset
from dataset.unlabelled import MixedDataset, unlabeled_images

for _module in pkgutil.iter_modules(__path__):
    if not _module.ispkg:
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "UNLABELED_STREAM", "DatasetSpec", "EvalSampler", "MixedDataset", "MixedSampler", "SegmentationDataset",
    "SplitSpec", "TrainSampler", "changes", "collate", "fingerprint", "get_dataset_spec", "list_datasets",
    "register_builder", "register_dataset", "unlabeled_images", "use_cache", "worker_init",
]
