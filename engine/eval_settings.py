"""The settings of an evaluation, and the checks of them that need neither data nor weights. The command line of
``eval.py`` is parsed here and ends here."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import dataset as data
from engine.predict import check_options
from engine.run_folder import weights_file
from models import (
    NetworkChoice,
    backbone_help,
    brings_weights,
    check_described,
    described_network,
    model_help,
    network_name,
)
from models.prepare import HALF_PRECISIONS
from models.published import local
from models.weight_files import is_given
from utils.cli import ArgumentParser, read_options
from utils.errors import UserError
from utils.files import check_target
from utils.options import OptionGroup, option
from utils.watchdog import timeout_option


@dataclass(frozen=True)
class Network(OptionGroup):
    """What is evaluated. Defaults are those of the reference where it has the option, here and below."""

    model: str = option("deeplabv3", lambda: f"{model_help()} (default: what the weights' JSON file says, else "
                                             "deeplabv3)")
    backbone: str = option("resnet18", lambda: f"{backbone_help()} (default: what the weights' JSON file says, else "
                                               "resnet18)")
    pretrained: str | None = option(None, "weights of the whole network, a .pth or .safetensors file, get:NAME, or the "
                                          "folder of a run for its best ones (required)", metavar="FILE")
    head_width: int | None = option(None, "channels of its main head (default: as in the weights)", at_least=1,
                                    metavar="N")
    aux: bool = option(False, "load the auxiliary head too; it takes no part in the prediction")
    preprocess: str | None = option(None, "input of the network: BGR minus mean, or RGB mean/std (default: what the "
                                          "weights say)", choices=("bgr", "rgb"))

    @property
    def choice(self) -> NetworkChoice:
        """The network, with its weights."""
        return NetworkChoice(self.model, self.backbone, self.pretrained, preprocess=self.preprocess, aux=self.aux,
                             head_width=self.head_width)


@dataclass(frozen=True)
class Data(OptionGroup):
    """What it is evaluated on."""

    dataset: str = option("citys", lambda: ", ".join(data.list_datasets()))
    data: str = option("./dataset/cityscapes/", "root folder of the data set", metavar="DIR")
    data_list: str | None = option(None, "list file of the split (default: the split's own files)", metavar="FILE")
    cache: str | None = option(None, "folder that keeps the decoded images, as in train_kd.py", metavar="DIR")
    split: str | None = option(None, "train, val, test, ... (default: the data set's validation split)")
    limit: int | None = option(None, "only the first N images", at_least=1, metavar="N")
    ignore_label: int = option(-1, "label value of pixels that do not count")
    workers: int = option(8, "loading processes, at most one per CPU", at_least=0)
    crop_size: tuple[int, ...] = option((1024, 2048), "no effect, as in the reference: images are evaluated whole (see "
                                                      "--window)", at_least=1, metavar="N")


@dataclass(frozen=True)
class Prediction(OptionGroup):
    """How the network is asked."""

    scales: tuple[float, ...] = option((1.0,), "average the logits over the image resized by these factors", above=0,
                                       metavar="S")
    flip_eval: bool = option(False, "average over the image and its mirror image")
    window: tuple[int, int] | None = option(None, "slide a window of this size", at_least=1, metavar=("H", "W"))
    stride: tuple[int, int] | None = option(None, "step of the window (default: two thirds of it)", at_least=1,
                                            metavar=("H", "W"))


@dataclass(frozen=True)
class Speed(OptionGroup):
    """What makes it faster, and changes nothing but rounding unless its help says so."""

    batch_size: int = option(1, "images that go through the network together, as far as neighbors have one size",
                             at_least=1, metavar="N")
    amp: str = option("off", "half precision of the network: figures change in the last digits",
                      choices=("off", *HALF_PRECISIONS))
    fast: bool = option(True, "a prepared copy of the network, no logits at full size and, on a CPU, freed memory is "
                              "kept; off: the plain twin, with the same results up to rounding")
    channels_last: bool | None = option(None, "weights of the prepared copy in the order of memory [H, W, C] (default: "
                                              "with --fast)")


@dataclass(frozen=True)
class Output(OptionGroup):
    """What is written."""

    json: Path | None = option(None, "write all figures, as fractions", metavar="FILE")
    reference_metric: bool = option(False, "also what the reference prints as pixel accuracy: the arg max of logits "
                                           "truncated to integers (takes more time and memory)")
    save_dir: Path = option(Path("runs"), "pictures go to DIR/<path of the weights>/<dataset>_<split>/",
                            metavar="DIR")
    save_pred: bool = option(False, "write predictions: colour/ (palette PNG) and index/ (grey PNG)")
    save_ids: bool = option(False, "write predictions as the data set's own label values: ids/, for submission")
    blend: bool = option(False, "write the image with the predicted colours mixed in: overlay/")

    @property
    def pictures(self) -> bool:
        """Whether any picture is written."""
        return self.save_pred or self.save_ids or self.blend


@dataclass(frozen=True)
class Running(OptionGroup):
    """Where it runs."""

    no_cuda: bool = option(False, "run on the CPU although there is a GPU")
    gpu_id: str = option("0", "GPU of a single process; under torchrun each takes its own")
    timeout: int = timeout_option("evaluation")
    local_rank: int = option(0, hidden=True)  # torchrun's environment decides


@dataclass(frozen=True)
class EvalSettings:
    """Everything that ``eval.py`` was asked for."""

    network: Network
    data: Data
    prediction: Prediction
    speed: Speed
    output: Output
    running: Running


GROUPS = (("network", Network), ("data", Data), ("prediction", Prediction), ("speed", Speed), ("output", Output),
          ("running", Running))


def build_parser() -> ArgumentParser:
    """The parser of ``eval.py``."""
    parser = ArgumentParser(prog="eval.py", description="Evaluate a trained segmentation network on a labelled split.")
    for title, group in GROUPS:
        parser.add_options(parser.add_argument_group(title), group)
    return parser


def parse_settings(argv: Sequence[str] | None) -> EvalSettings:
    """Parse the command line; it ends here. Flags win over what the weights' JSON file says, which wins over defaults;
    UserError when flag and file name different networks, or the file alone names one whose code would be run."""
    parser = build_parser()
    first = parser.parse_args(argv)
    file = weights_file(first.pretrained, "--pretrained")
    said = described_network(file, first.model)
    parser.set_defaults(**said)
    parsed = vars(parser.parse_args(argv))
    settings = EvalSettings(*(read_options({**parsed, "pretrained": file}, group) for _, group in GROUPS))
    check_described(settings.network.choice, said)
    return replace(settings, network=replace(settings.network, pretrained=local(file)))


def check(settings: EvalSettings) -> int:
    """Check settings that need neither data nor weights; returns the number of the GPU of a single process."""
    network, output = settings.network, settings.output
    if not is_given(network.pretrained) and not brings_weights(network.model):
        raise UserError("--pretrained is missing: expected the weights of a trained network, such as "
                        f"kd_{network_name(network.model, network.backbone)}_{settings.data.dataset}_best_model.pth")
    prediction, speed = settings.prediction, settings.speed
    if speed.channels_last and not speed.fast:
        raise UserError("--channels-last: expected with --fast, whose copy of the network it lays out")
    check_options(prediction.scales, prediction.window, prediction.stride)
    if output.json is not None:
        check_target(output.json, "--json", is_folder=False)
    if output.pictures:
        check_target(output.save_dir, "--save-dir", is_folder=True)
    first = settings.running.gpu_id.split(",")[0].strip()
    if not first.isdigit():
        raise UserError(f"--gpu-id: expected the number of a GPU, got {settings.running.gpu_id!r}")
    return int(first)
