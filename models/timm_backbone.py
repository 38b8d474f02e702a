"""Backbones of timm under the heads of this repository: ``timm:NAME`` as the name of a backbone."""
from __future__ import annotations

from typing import Any

from torch import Tensor

from models.backbone import Backbone, Stages
from models.preprocess import Preprocess
from models.torchvision_compat import import_torchvision
from utils.errors import UserError
from utils.extras import need
from utils.tensor_files import first_line

PREFIX = "timm:"
#: in place of a weight file: the weights that timm itself has for the name
PUBLISHED = "timm"
#: channels of the last stage from which on the heads have their full width
WIDE_FROM = 1024


def is_timm(backbone: str) -> bool:
    """Whether a backbone's name is one of timm's."""
    return backbone.startswith(PREFIX)


class TimmBackbone(Backbone):
    """The last four stages of a timm network, dilated to stride 8, or 16 where it cannot be 8.

    name: as timm spells it. weights: None, a file of timm's full network, or 'timm' for those that timm downloads.
    preprocess: as those weights want it. Raises UserError for an unknown name, a network that cannot be dilated, a
    missing library, or weights that do not fit."""

    key_prefix = "net."

    def __init__(self, name: str, weights: str | None = None) -> None:
        net = create(name, weights)
        strides = net.feature_info.reduction()[-4:]
        super().__init__(tuple(net.feature_info.channels()[-4:]))
        self.net, self.strides = net, tuple(strides)
        said = getattr(net, "pretrained_cfg", None) or {}
        self.preprocess = Preprocess("rgb", tuple(said.get("mean", (0.485, 0.456, 0.406))),
                                     tuple(said.get("std", (0.229, 0.224, 0.225))), 255.0)

    def forward(self, x: Tensor) -> Stages:
        """[B, 3, H, W] -> c1..c4, at ``strides``."""
        return tuple(self.net(x)[-4:])


def create(name: str, weights: str | None) -> Any:
    """timm's feature extractor at stride 8, else 16."""
    import_torchvision()
    timm = need("timm", "timm")
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0][:6]}*")[:4]
        raise UserError(f"{PREFIX}{name}: timm has no such network" + (f" (it has {', '.join(near)})" if near else ""))
    more: dict[str, Any] = {"pretrained": weights is not None}
    if weights not in (None, PUBLISHED):
        more["pretrained_cfg_overlay"] = {"file": weights}
    for stride in (8, 16):
        try:
            net = timm.create_model(name, features_only=True, output_stride=stride, **more)
        except (TypeError, AssertionError, NotImplementedError):  # whatever timm raises for a stride it cannot have
            continue
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{PREFIX}{name}: {first_line(error)}") from error
        if len(net.feature_info.channels()) >= 4 and net.feature_info.reduction()[-1] == stride:
            return net
    raise UserError(f"{PREFIX}{name}: cannot be dilated to stride 8 or 16, so it cannot stand under the heads of this "
                    "repository (whole networks with it: smp:, hf: or module:)")
