"""Networks of other libraries behind the interface of this one: ``SOURCE:NAME`` in place of a model's name.

    smp:ARCHITECTURE:ENCODER   segmentation_models_pytorch, e.g. smp:Unet:resnet34
    smp:FOLDER                 of its save_pretrained, with its weights
    tv:NAME                    torchvision.models.segmentation, e.g. tv:deeplabv3_resnet101
    hf:NAME_OR_FOLDER          transformers: SegFormer, UperNet; Mask2Former, MaskFormer and EoMT by their class scores
    mmseg:NAME                 DeepLabV3, PSPNet and SegFormer of mmsegmentation, e.g. mmseg:deeplabv3_r50-d8
    cirkd:NAME                 SegFormer of CIRKD and CIRKDv2, e.g. cirkd:segformer_MiT_B0
    module:PACKAGE.FILE:NAME   any callable that returns an nn.Module

Each library is imported only when it is asked for. ``timm:NAME`` is a backbone, see ``models/timm_backbone.py``.
"""
from __future__ import annotations

from models.outside.net import OutsideNet
from models.outside.sources import (
    brings_weights,
    build_outside,
    is_outside,
    module_file,
    portable,
    suggestion,
)
from models.outside.taps import candidates, parse_taps
from models.outside.trust import check_said

__all__ = ["OutsideNet", "brings_weights", "build_outside", "candidates", "check_said", "is_outside",
           "module_file", "parse_taps", "portable", "suggestion"]
