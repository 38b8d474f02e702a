"""The option groups of ``train_kd.py``: every setting with its default, typed. Defaults are those of the reference's
parser. A method's own options stand in its file in ``losses/``.
"""
from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dataset.spec import list_datasets
from engine.recipe import Recipe
from engine.run_folder import weights_file
from engine.tracker import TRACKERS
from losses.core import methods
from models import NetworkChoice, backbone_help, model_help
from models.prepare import HALF_PRECISIONS
from models.published import local
from utils.errors import UserError
from utils.options import OptionGroup, flag, option
from utils.watchdog import timeout_option

BASE_HELP = ("ImageNet weights of its backbone: a file, get:NAME, or a name such as "
             "torchvision:ResNet50_Weights.IMAGENET1K_V2 (for resnet50_original)")
TAPS_HELP = ("maps of a network of another library, as c4=backbone.layer4,head=classifier.4:in (--list-taps prints "
             "what there is)")
HEAD_WIDTH_HELP = "channels of its main head (default: as in its weights, else the usual ones of the backbone)"
CLASSES_HELP = ("TOML file that says which of its classes stand for which of the data set, when it has others "
                "(docs/networks.md)")
PREPROCESS_HELP = "its input: BGR minus mean, or RGB mean/std (default: what its weights say)"
OF_WHOLE_NETWORKS = ("teacher_pretrained", "student_pretrained")
WEIGHT_FILES = (*OF_WHOLE_NETWORKS, "teacher_pretrained_base", "student_pretrained_base")
#: accepted so that old command lines still start; they do nothing in the reference either
DEAD_OPTIONS = ("start_epoch", "save_epoch", "val_epoch")


def without_teacher() -> list[str]:
    """Methods that read no teacher of the run."""
    return [name for name, cls in methods().items() if not cls.needs.teacher]


def _teacher_help() -> str:
    return (f"trained teacher (every method but {', '.join(without_teacher())} needs one): a file, get:NAME as in "
            "tools/get_weights.py --list, or the folder of a run for its best weights")


@dataclass(frozen=True)
class Networks(OptionGroup):
    """Teacher and student."""

    teacher_model: str = option("deeplabv3", lambda: f"{model_help(' of the teacher')} (default: what its weights' "
                                                     "JSON file says, else deeplabv3)")
    teacher_backbone: str = option("resnet101", "backbone of the teacher, one of those of the student (default: what "
                                                "its weights' JSON file says, else resnet101)")
    teacher_pretrained: str | None = option("None", _teacher_help, metavar="FILE")
    teacher_pretrained_base: str | None = option("None", BASE_HELP, metavar="FILE")
    teacher_head_width: int | None = option(None, HEAD_WIDTH_HELP, at_least=1, metavar="N")
    teacher_preprocess: str | None = option(None, PREPROCESS_HELP, choices=("bgr", "rgb"))
    teacher_taps: str | None = option(None, TAPS_HELP, metavar="TAP=PATH,…")
    teacher_classes: str | None = option(None, CLASSES_HELP, metavar="FILE")
    class_map: str | None = option(None, hidden=True)  # what that file says, see engine/class_map.py
    teacher_scores: str | None = option(None, "folder that tools/cache_teacher.py has filled: the teacher's scores in "
                                              "place of its passes", metavar="DIR")
    stored_scores: str | None = option(None, hidden=True)  # how they are stored, see engine/scores.py
    student_model: str = option("deeplabv3", lambda: model_help(" of the student"), aliases=("model",))
    student_backbone: str = option("resnet18", lambda: backbone_help(" of the student"), aliases=("backbone",))
    student_pretrained: str | None = option("None", "segmentation weights to start from: a file, get:NAME, or the "
                                                    "folder of a run for its best weights",
                                            metavar="FILE", aliases=("pretrained",))
    student_pretrained_base: str | None = option("None", BASE_HELP, metavar="FILE", aliases=("pretrained_base",))
    student_head_width: int | None = option(None, HEAD_WIDTH_HELP, at_least=1, metavar="N", aliases=("head_width",))
    student_preprocess: str | None = option(None, PREPROCESS_HELP, choices=("bgr", "rgb"), aliases=("preprocess",))
    student_taps: str | None = option(None, TAPS_HELP, metavar="TAP=PATH,…")
    aux: bool | None = option(None, "auxiliary head on c3 of the student (default: on for resnet, off for mobilenet)")
    aux_weight: float = option(0.4, "weight of the auxiliary cross entropy", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (*WEIGHT_FILES, "teacher_classes", "teacher_scores"):
            if getattr(self, name) in ("", "None", "none"):  # the reference's spelling of nothing
                object.__setattr__(self, name, None)

    def with_files(self, fetch: bool = True) -> Networks:
        """The same with the best weights in place of the folder of a run, and a path in place of every ``get:NAME``,
        which is downloaded when it is not there yet. fetch: whether it is."""
        files = {name: getattr(self, name) for name in WEIGHT_FILES}
        files |= {name: weights_file(files[name], flag(name)) for name in OF_WHOLE_NETWORKS}
        return replace(self, **{name: local(file) if fetch else file for name, file in files.items()})

    @property
    def teacher(self) -> NetworkChoice:
        """The teacher, with its weights."""
        return NetworkChoice(self.teacher_model, self.teacher_backbone, self.teacher_pretrained,
                             self.teacher_pretrained_base, self.teacher_preprocess, taps=self.teacher_taps,
                             head_width=self.teacher_head_width)

    @property
    def student(self) -> NetworkChoice:
        """The student, with the weights that it starts from."""
        return NetworkChoice(self.student_model, self.student_backbone, self.student_pretrained,
                             self.student_pretrained_base, self.student_preprocess, self.aux, self.student_taps,
                             self.student_head_width)


@dataclass(frozen=True)
class Data(OptionGroup):
    """Training and validation images."""

    dataset: str = option("citys", lambda: f"one of {', '.join(list_datasets())}")
    data: str = option("./dataset/cityscapes/", "root folder of the data set", metavar="DIR")
    train_list: str | None = option(None, "list file of the training split", metavar="FILE")
    val_list: str | None = option(None, "list file of the validation split", metavar="FILE")
    cache: str | None = option(None, "folder that keeps the decoded images, 4 bytes per pixel, for all epochs and runs",
                               metavar="DIR")
    unlabelled: str | None = option(None, "folder of images without labels, some of which join every batch; terms that "
                                          "need labels leave them out", metavar="DIR", aliases=("unlabeled",))
    unlabelled_share: float = option(0.5, "share of them in a batch; --batch-size counts the labeled ones", above=0,
                                     at_most=0.95, metavar="R", aliases=("unlabeled_share",))
    crop_size: tuple[int, ...] = option((512, 1024), "training crop: height width, or one number for a square",
                                        at_least=1, metavar="N")
    random_scale: bool = option(True, "scale training images at random, by 0.5 to 2")
    ignore_label: int = option(-1, "label value of pixels that do not count")
    workers: int = option(8, "data-loading processes per training process, at most one per CPU", at_least=0)
    sampling: str = option("reference", "reference: the repeated list shuffled as a whole; epoch: a fresh shuffle of "
                                        "every epoch", choices=("reference", "epoch"))
    selection_split: str | None = option(
        None, "split that picks the best model; reference: the one that the reference used, test for camvid "
              "(default: val)", metavar="SPLIT")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.crop_size) > 2:
            raise UserError(f"argument --crop-size: expected one or two numbers, got {len(self.crop_size)}")
        object.__setattr__(self, "crop_size", self.crop_size * (3 - len(self.crop_size)))
        if self.unlabelled in ("", "None", "none"):  # of a run that --config repeats without them
            object.__setattr__(self, "unlabelled", None)
            object.__setattr__(self, "unlabelled_share", type(self).unlabelled_share)


@dataclass(frozen=True)
class Optimization(OptionGroup):
    """The optimizer (SGD, or what the recipe says) and its schedule."""

    batch_size: int = option(16, "images per step over all processes together", at_least=1)
    max_iterations: int = option(40000, "steps of the whole run", at_least=1)
    lr: float = option(0.02, "learning rate that the decay starts from; --warmup begins below it", above=0)
    min_lr: float = option(0.0, "learning rate that the decay tends to", at_least=0, metavar="LR")
    poly_power: float = option(0.9, "min_lr + (lr - min_lr) * (1 - step / max_iterations) ** power", at_least=0)
    momentum: float = option(0.9, "momentum of SGD", at_least=0, at_most=1)
    nesterov: bool = option(False, "Nesterov's form of the momentum; not in stages before training")
    head_lr_factor: float = option(1.0, "times the learning rate: for what the student has behind its backbone, not "
                                        "for what methods train", above=0, metavar="F")
    weight_decay: float = option(1e-4, "SGD: on every parameter, batch norm included; AdamW: not on norms and biases",
                                 at_least=0)
    seed: int = option(0, "of weights, sample order, augmentation, masks, dropout", at_least=0)
    sync_bn: bool = option(True, "share batch-norm statistics when there are several processes")


@dataclass(frozen=True)
class Distillation(OptionGroup):
    """Which method, and what concerns several of them."""

    method: str | None = option(
        None, "preset of published settings for --dataset and --student-backbone (see --list-methods); none: plain "
              "training, of a baseline or a teacher (default: Af-DCD with the weights listed here)",
        choices=lambda: ("none", *methods()), metavar="NAME")
    group_size: int = option(2, "images whose statistics go together in methods that relate images (the published runs "
                                "had 2 per GPU); 0 = all images of the process", at_least=0, metavar="N")
    compat: str = option("fixed", "methods whose released code has a known defect: corrected, or as released",
                         choices=("fixed", "reference"))


@dataclass(frozen=True)
class Speed(OptionGroup):
    """What makes a run faster or smaller, and changes nothing else but rounding unless its help says so."""

    fast: bool = option(True, "the faster forms of losses, networks and optimizer; off: their plain twins, with the "
                              "same results up to rounding")
    amp: str = option("off", "half precision of both networks, of what methods train, and of validation; weights, "
                             "losses and updates stay in float32, and so do stages before training. fp16 scales the "
                             "loss and skips steps that overflow",
                      choices=("off", "bf16", "fp16"))
    teacher_precision: str | None = option(None, "of the teacher alone (default: that of --amp)",
                                           choices=("float32", "bf16", "fp16"))
    channels_last: bool | None = option(None, "images and weights in the order of memory [B, H, W, C] (default: with "
                                              "--fast); files are written as always")
    compile: bool = option(False, "compile both networks (torch.compile): the first steps take minutes, and numbers "
                                  "differ by rounding and dropout masks")
    grad_accumulation: int = option(
        1, "parts that a process works through one after the other in a step, but not in stages before training: less "
           "memory, the same gradients, but for the statistics of batch norm and dropout masks",
        at_least=1, metavar="N")
    ddp_compression: str = option("none", "what several processes send each other of the gradients; bf16 halves it and "
                                          "rounds them", choices=("none", "bf16"))

    @property
    def amp_dtype(self) -> torch.dtype | None:
        """The half precision of the training step, None in full precision."""
        return HALF_PRECISIONS.get(self.amp)

    @property
    def teacher_dtype(self) -> torch.dtype | None:
        """The half precision of the teacher, None in full precision."""
        return HALF_PRECISIONS.get(self.teacher_precision or self.amp)

    @property
    def uses_channels_last(self) -> bool:
        """Whether images and weights are laid out as [B, H, W, C]."""
        return self.fast if self.channels_last is None else self.channels_last


@dataclass(frozen=True)
class Running(OptionGroup):
    """Files, logging, device."""

    name: str | None = option(None, "the run's folder is runs/NAME (default: made of method, networks and data set)",
                              metavar="NAME")
    save_dir: str | None = option(None, "weights, training state, config (default: the run's folder)", metavar="DIR")
    log_dir: str | None = option(None, "text log, JSON lines, TensorBoard (default: that of the weights)",
                                 metavar="DIR")
    results: str | None = option(None, "write the result of the run below this folder, for tools/report.py",
                                 metavar="DIR")
    protocol: str = option("own", "name of the protocol in --results: runs of one protocol are compared",
                           metavar="NAME")
    label: str | None = option(None, "name of the run's row in --results (default: that of the method)",
                               metavar="NAME")
    resume: str | None = option(None, "go on from a training state; auto: from the one in --save-dir if there is one",
                                metavar="auto|FILE")
    log_iter: int = option(10, "steps between log lines", at_least=1)
    save_per_iters: int = option(800, "steps between training states", at_least=1)
    val_per_iters: int = option(800, "steps between validations", at_least=1)
    skip_nonfinite: int = option(0, "steps in the whole run whose loss or gradient may be NaN or infinite: they change "
                                    "nothing and are counted; one more is an error", at_least=0, metavar="N")
    timeout: int = timeout_option("run")
    diagnose_every: int = option(0, "steps between measurements of every term's gradient, for tools/diagnose.py; one "
                                    "takes about a backward pass per term; 0 = none", at_least=0)
    skip_val: bool = option(False, "no validation, hence no best model and no final report")
    tensorboard: bool = option(True, "write TensorBoard scalars and prediction panels")
    tracker: str | None = option(None, "send the same scalars to Weights & Biases or trackio", choices=TRACKERS)
    tracker_project: str = option("afdcd", "project of --tracker", metavar="NAME")
    panels: int = option(3, "validation images drawn at every validation", at_least=0)
    no_cuda: bool = option(False, "run on the CPU although there is a GPU")
    local_rank: int = option(0, hidden=True)  # torchrun's environment decides
    start_epoch: int | None = option(None, hidden=True)
    save_epoch: int | None = option(None, hidden=True)
    val_epoch: int | None = option(None, hidden=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("save_dir", "log_dir", "results"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, str(Path(getattr(self, name)).expanduser()))
        for name in ("protocol", "label", "name"):
            if not re.fullmatch(r"\w[\w.+=-]*", getattr(self, name) or "x"):
                raise UserError(f"argument {flag(name)}: expected letters, digits, _ and then . + = - too, got "
                                f"{getattr(self, name)!r}")


GROUPS: tuple[tuple[str, type[OptionGroup]], ...] = (
    ("networks", Networks), ("data", Data), ("optimisation", Optimization), ("recipe", Recipe),
    ("distillation", Distillation), ("speed", Speed), ("running", Running))
