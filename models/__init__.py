"""Segmentation networks by name, their weights and their preprocessing.

    net = get_segmentation_model("deeplabv3", "resnet18", num_class=19)
    out = net(net.preprocess(images))          # SegOutput: logits, aux, c1..c4, head
"""
from __future__ import annotations

from models.class_names import check_classes
from models.output import SegOutput
from models.outside import brings_weights, is_outside
from models.preprocess import CAFFE_BGR, IMAGENET_RGB, Preprocess, get_preprocess
from models.registry import (
    NetworkChoice,
    backbone_help,
    check_described,
    default_aux,
    described_network,
    get_segmentation_model,
    list_models,
    model_help,
    network_name,
    split_backbone,
)
from models.segmentation import SegmentationNet
from models.weight_files import describe, read_info, read_state_dict, save_state_dict
from models.weights import LoadReport, load_weights

__all__ = [
    "CAFFE_BGR", "IMAGENET_RGB", "LoadReport", "NetworkChoice", "Preprocess", "SegOutput", "SegmentationNet",
    "backbone_help", "brings_weights", "check_classes", "check_described", "default_aux", "describe",
    "described_network", "get_preprocess", "get_segmentation_model", "is_outside", "list_models", "load_weights",
    "model_help", "network_name", "read_info", "read_state_dict", "save_state_dict", "split_backbone",
]
