"""Importing torchvision beside a torch that it was not built for.

PyPI's torchvision is built for CUDA. Beside a CPU-only torch its compiled operators do not load, and the import stops
with "operator torchvision::nms does not exist", although model definitions and weight lists need none of them.
Declaring the operators' signatures (no implementation) lets the import pass.
"""
from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

from utils.errors import UserError
from utils.tensor_files import first_line

_declared: list[torch.library.Library] = []  # the declarations live as long as this object


def import_torchvision() -> ModuleType:
    """The torchvision package. Raises UserError when it is not installed or does not import."""
    try:
        return importlib.import_module("torchvision")
    except ImportError as error:
        raise UserError(f"torchvision is needed here but does not import ({first_line(error)}): "
                        "install the release that belongs to your torch") from error
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise UserError(f"torchvision does not import: {first_line(error)}") from error
    if not _declared:
        _declared.append(torch.library.Library("torchvision", "FRAGMENT"))
        for operator in ("nms", "qnms"):
            _declared[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
        del sys.modules[name]
    try:
        return importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        raise UserError(f"torchvision does not fit this torch {torch.__version__}: {first_line(error)}") from error
