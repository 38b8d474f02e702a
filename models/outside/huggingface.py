"""Networks of transformers, by a name of its hub, from a folder, or as a description says."""
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from models.outside.library import library, misfit
from models.outside.net import OtherClasses, Outside
from models.outside.trust import check_hf, without_unsafe
from models.preprocess import IMAGENET_RGB, Preprocess
from utils.errors import UserError
from utils.tensor_files import first_line

#: smallest score of a class, where scores become logits
SMALLEST = 1e-6
COUNTER = "num_batches_tracked"


def hf(name: str, num_class: int, aux: bool) -> Outside:
    """transformers: a name of its hub, or a folder with a config.json and, but for random weights, a weight file."""
    package = library("transformers", "hf")
    config, net = _from_transformers(package, name)
    return _hf(name, num_class, config, net, hf_preprocess(package, name))


def described_hf(name: str, num_class: int, architecture: Mapping[str, Any]) -> Outside:
    """Of what :func:`hf` has said of a network."""
    package = library("transformers", "hf")
    try:
        check_hf(architecture)
        config = package.AutoConfig.for_model(**without_unsafe(architecture))
        net = _kind(package, config, name).from_config(config, trust_remote_code=False)
        return _hf(name, num_class, config, net, IMAGENET_RGB)
    except UserError:
        raise
    except Exception as error:  # of any kind: a library's, of a file that may be a stranger's
        raise misfit(f"hf:{name}", error) from error


def _hf(name: str, num_class: int, config: Any, net: nn.Module, preprocess: Preprocess) -> Outside:
    if config.num_labels != num_class:
        raise OtherClasses(f"hf:{name} ({', '.join(map(str, list(config.id2label.values())[:5]))} …)",
                           config.num_labels, num_class)
    paths = {path for path, _ in net.named_modules()}
    taps = next((taps for taps in HF_TAPS if all(text.partition("[")[0].removesuffix(":in") in paths
                                                  for text in taps.values())), {})
    side = config.image_size if isinstance(getattr(config, "image_size", None), int) and "layernorm" in paths else 128
    universal = "class_predictor" in paths
    said = json.loads(config.to_json_string(use_diff=False))
    return Outside(net.float(), taps, preprocess, side=side,  # files in half precision make a network in half precision
                   logits=class_scores if universal else lambda output: output.logits,
                   architecture=without_unsafe(said))


def _kind(package: Any, config: Any, name: str) -> Any:
    """The class of transformers that makes networks of a configuration. UserError when they do not segment."""
    for kind in (package.AutoModelForSemanticSegmentation, package.AutoModelForUniversalSegmentation):
        if type(config) in kind._model_mapping:
            return kind
    raise UserError(f"hf:{name}: a {config.model_type} is no segmentation network of transformers")


def hf_classes(name: str) -> tuple[str, ...]:
    """The names of the classes that a network of transformers scores, which its configuration says."""
    package = library("transformers", "hf")
    try:
        config = package.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"hf:{name}: {first_line(error)}") from error
    return tuple(str(config.id2label[k]) for k in range(config.num_labels))


def _from_transformers(package: Any, name: str) -> tuple[Any, nn.Module]:
    """(configuration, network) of a name or folder. UserError when a tensor of the network is not in its files."""
    folder = Path(name).expanduser()
    try:
        config = package.AutoConfig.from_pretrained(name)
        kind = _kind(package, config, name)
        if folder.is_dir() and not any([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
            return config, kind.from_config(config)
        net, loading = kind.from_pretrained(name, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"hf:{name}: {first_line(error)}") from error
    lost = sorted(key for key in {*loading["missing_keys"], *(entry[0] for entry in loading["mismatched_keys"])}
                  if not key.endswith(COUNTER))
    if lost:
        raise UserError(f"hf:{name}: {len(lost)} tensors of the network are not in its files, or of another shape: "
                        f"{', '.join(lost[:3])}")
    return config, net


HF_TAPS: tuple[dict[str, str], ...] = (
    {**{f"c{i + 1}": f"segformer.stages.{i}" for i in range(4)}, "head": "decode_head.classifier:in"},
    {**{f"c{i + 1}": f"segformer.encoder.layer_norm.{i}" for i in range(4)}, "head": "decode_head.classifier:in"},
    {**{f"c{i + 1}": f"backbone[{i}]" for i in range(4)}, "head": "decode_head.classifier:in"},
    {**{f"c{i + 1}": f"model.pixel_level_module.encoder[{i}]" for i in range(4)},
     "head": "model.pixel_level_module.decoder[0]"},
    {"c4": "layernorm", "head": "upscale_block"},
)


def class_scores(output: Any) -> Tensor:
    """Logits of each pixel from masks with classes (Cheng et al. 2022, semantic inference): the logarithm of the sum
    over queries of class probability times mask probability. [B, Q, K + 1] and [B, Q, h, w] -> [B, K, h, w]."""
    classes = output.class_queries_logits.softmax(-1)[..., :-1]
    scores = classes.transpose(1, 2) @ output.masks_queries_logits.sigmoid().flatten(2)
    return scores.clamp_min(SMALLEST).log().unflatten(2, output.masks_queries_logits.shape[2:])


def hf_preprocess(package: Any, name: str) -> Preprocess:
    """What its image processor does; ImageNet's mean and standard deviation where there is none."""
    try:
        said = package.AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError):
        return IMAGENET_RGB
    order = "bgr" if getattr(said, "do_flip_channel_order", False) else "rgb"
    scale = 1 / said.rescale_factor if said.do_rescale else 1.0
    if not said.do_normalize:
        return Preprocess(order, (0, 0, 0), (1, 1, 1), scale)
    return Preprocess(order, tuple(said.image_mean), tuple(said.image_std), scale)
