"""The settings of ``train_kd.py``: every one with its default, typed, and the checks that need no files.

Defaults are those of the reference's parser. A method's own options stand in its file in ``losses/``. The command line
is parsed here and ends here: what goes on is a :class:`Settings`.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from dataset.spec import list_datasets
from engine.presets import preset
from losses.core import methods
from losses.core.distiller import Distiller
from losses.core.objective import active_methods
from models import NetworkChoice, backbone_help, brings_weights, check_described, described_network, model_help
from models.prepare import HALF_PRECISIONS
from models.published import local
from utils.cli import ArgumentParser, read_options
from utils.errors import UserError
from utils.options import Option, OptionGroup, flag, option, options_of

BASE_HELP = ("ImageNet weights of its backbone: a file, get:NAME, or a name such as "
             "torchvision:ResNet50_Weights.IMAGENET1K_V2 (for resnet50_original)")
TAPS_HELP = ("maps of a network of another library, as c4=backbone.layer4,head=classifier.4:in (--list-taps prints "
             "what there is)")
HEAD_WIDTH_HELP = "channels of its main head (default: as in its weights, else the usual ones of the backbone)"
PREPROCESS_HELP = "its input: BGR minus mean, or RGB mean/std (default: what its weights say)"
WEIGHT_FILES = ("teacher_pretrained", "teacher_pretrained_base", "student_pretrained", "student_pretrained_base")
#: accepted so that old command lines still start; they do nothing in the reference either
DEAD_OPTIONS = ("start_epoch", "save_epoch", "val_epoch")


def without_teacher() -> list[str]:
    """Methods that read no teacher of the run."""
    return [name for name, cls in methods().items() if not cls.needs.teacher]


def _teacher_help() -> str:
    return (f"trained teacher (every method but {', '.join(without_teacher())} needs one): a file, or get:NAME as in "
            "tools/get_weights.py --list")


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
    student_model: str = option("deeplabv3", lambda: model_help(" of the student"), aliases=("model",))
    student_backbone: str = option("resnet18", lambda: backbone_help(" of the student"), aliases=("backbone",))
    student_pretrained: str | None = option("None", "segmentation weights to start from: a file, or get:NAME",
                                            metavar="FILE", aliases=("pretrained",))
    student_pretrained_base: str | None = option("None", BASE_HELP, metavar="FILE", aliases=("pretrained_base",))
    student_head_width: int | None = option(None, HEAD_WIDTH_HELP, at_least=1, metavar="N", aliases=("head_width",))
    student_preprocess: str | None = option(None, PREPROCESS_HELP, choices=("bgr", "rgb"), aliases=("preprocess",))
    student_taps: str | None = option(None, TAPS_HELP, metavar="TAP=PATH,…")
    aux: bool | None = option(None, "auxiliary head on c3 of the student (default: on for resnet, off for mobilenet)")
    aux_weight: float = option(0.4, "weight of the auxiliary cross entropy", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in WEIGHT_FILES:
            if getattr(self, name) in ("", "None", "none"):  # the reference's spelling of nothing
                object.__setattr__(self, name, None)

    def with_files(self) -> Networks:
        """The same with a path in place of every ``get:NAME``, which is downloaded when it is not there yet."""
        return replace(self, **{name: local(getattr(self, name)) for name in WEIGHT_FILES})

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
    crop_size: tuple[int, ...] = option((512, 1024), "training crop: height width, or one number for a square",
                                        at_least=1, metavar="N")
    ignore_label: int = option(-1, "label value of pixels that do not count")
    workers: int = option(8, "data-loading processes per training process", at_least=0)
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


@dataclass(frozen=True)
class Optimization(OptionGroup):
    """SGD and its schedule."""

    batch_size: int = option(16, "images per step over all processes together", at_least=1)
    max_iterations: int = option(40000, "steps of the whole run", at_least=1)
    lr: float = option(0.02, "learning rate of the first step", above=0)
    min_lr: float = option(0.0, "learning rate that the decay tends to", at_least=0, metavar="LR")
    poly_power: float = option(0.9, "min_lr + (lr - min_lr) * (1 - step / max_iterations) ** power", at_least=0)
    momentum: float = option(0.9, "momentum of SGD", at_least=0, at_most=1)
    nesterov: bool = option(False, "Nesterov's form of the momentum; not in stages before training")
    head_lr_factor: float = option(1.0, "times the learning rate: for what the student has behind its backbone, not "
                                        "for what methods train", above=0, metavar="F")
    weight_decay: float = option(1e-4, "on every parameter, batch norm included", at_least=0)
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

    save_dir: str = option("~/.torch/models", "weights, training state, config", metavar="DIR")
    log_dir: str = option("../runs/logs/", "text log, JSON lines, TensorBoard", metavar="DIR")
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
    timeout: int = option(1800, "seconds without an answer of a loading process or of another process after which the "
                                "run ends", at_least=1, metavar="SECONDS")
    diagnose_every: int = option(0, "steps between measurements of every term's gradient, for tools/diagnose.py; one "
                                    "takes about a backward pass per term; 0 = none", at_least=0)
    skip_val: bool = option(False, "no validation, hence no best model and no final report")
    tensorboard: bool = option(True, "write TensorBoard scalars and prediction panels")
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
        for name in ("protocol", "label"):
            if not re.fullmatch(r"\w[\w.+=-]*", getattr(self, name) or "x"):
                raise UserError(f"argument {flag(name)}: expected letters, digits, _ and then . + = - too, got "
                                f"{getattr(self, name)!r}")


@dataclass(frozen=True)
class Settings:
    """Everything that a run was asked for.

    weights: {term: lambda} of every term of every method. options: {method: its Options}, of every method.
    list_methods, list_taps: only print the table of methods, or the maps of the networks.
    """

    networks: Networks
    data: Data
    optimization: Optimization
    distillation: Distillation
    speed: Speed
    running: Running
    weights: Mapping[str, float]
    options: Mapping[str, OptionGroup]
    list_methods: bool = False
    list_taps: bool = False

    @property
    def active(self) -> dict[str, float]:
        """{term: weight} of the terms that count."""
        return {name: weight for name, weight in self.weights.items() if weight}

    @property
    def methods(self) -> dict[str, type[Distiller]]:
        """The methods of which a term counts, by name."""
        return active_methods(self.active)

    @property
    def needs_teacher(self) -> bool:
        """Whether a method with a weight reads a teacher."""
        return any(cls.needs.teacher for cls in self.methods.values())

    @property
    def method_options(self) -> dict[str, OptionGroup]:
        """The options that each method is built with: those asked for, but for what its data set fixes."""
        return {name: replace(self.options[name], **cls.dataset_options.get(self.data.dataset, {}))
                for name, cls in methods().items()}

    def flat(self) -> dict[str, object]:
        """{setting: value}, sorted by name: the form of saved configurations and training states."""
        values = {f"lambda_{term}": weight for term, weight in self.weights.items()}
        groups = (self.networks, self.data, self.optimization, self.distillation, self.speed, self.running,
                  *self.options.values())
        for group in groups:
            values.update(asdict(group))
        return dict(sorted(values.items()))

    def with_preset(self, method: str) -> Settings:
        """The same settings with the published ones of another method in their place."""
        values = {**self.flat(), **preset(method, self.data.dataset, self.networks.student_backbone)}
        return from_flat({**values, "method": method})


GROUPS: tuple[tuple[str, type[OptionGroup]], ...] = (
    ("networks", Networks), ("data", Data), ("optimisation", Optimization), ("distillation", Distillation),
    ("speed", Speed), ("running", Running))


def build_parser() -> ArgumentParser:
    """The parser of ``train_kd.py``, with the options of every registered method."""
    parser = ArgumentParser(prog="train_kd.py", description="Train a segmentation network, distilled or plain.")
    for title, group in GROUPS:
        about = "Terms combine freely; a term with weight 0 is not computed." if group is Distillation else None
        section = parser.add_argument_group(title, about)
        parser.add_options(section, group)
        if group is Distillation:
            section.add_argument("--list-methods", action="store_true",
                                 help="print every method with its preset and what it adds to the given networks, and "
                                      "stop")
            section.add_argument("--list-taps", action="store_true",
                                 help="print the maps of both networks and the submodules that could be taps, and stop")
            _add_methods(parser, section)
    return parser


def _add_methods(parser: ArgumentParser, section) -> None:
    """The weight of every term, and a group of flags for every method with options that no other has declared."""
    for cls in methods().values():
        for term in cls.terms:
            parser.add_option(section, Option(term.setting, float, None, term.weight, term.help, at_least=0,
                                              metavar="W"))
    for name, cls in methods().items():
        if any(flag(one.name) not in parser._option_string_actions for one in options_of(cls.Options)):
            parser.add_options(parser.add_argument_group(f"method {name}", cls.title), cls.Options)


def parse_settings(argv: list[str] | None = None) -> Settings:
    """Parse and check a command line. Explicit flags win over the preset of ``--method``, which wins over defaults.

    Exits with code 2 and one line on a malformed command line; raises :class:`UserError` on settings that cannot be.
    """
    parser = build_parser()
    parsed = parser.parse_args(argv)
    if parsed.method is not None:
        parser.set_defaults(**preset(parsed.method, parsed.dataset, parsed.student_backbone))
        parsed = parser.parse_args(argv)
    settings = from_flat(vars(parsed))
    if not (settings.list_methods or settings.list_taps):
        check_settings(settings)
        if settings.needs_teacher and (said := described_network(settings.networks.teacher_pretrained)):
            parser.set_defaults(**{f"teacher_{key}": value for key, value in said.items()})
            settings = from_flat(vars(parser.parse_args(argv)))
            check_described(settings.networks.teacher, said, "teacher_")
        settings = replace(settings, networks=settings.networks.with_files())
    return settings


def from_flat(values: Mapping[str, object]) -> Settings:
    """Settings from {setting: value} of all of them: the inverse of :meth:`Settings.flat`."""
    groups = [read_options(values, group) for _, group in GROUPS]
    weights = {t.name: float(values[t.setting]) for cls in methods().values() for t in cls.terms}
    options = {name: read_options(values, cls.Options) for name, cls in methods().items()}
    return Settings(*groups, weights, options, bool(values.get("list_methods", False)),
                    bool(values.get("list_taps", False)))


def given_teacher_flags(settings: Settings) -> list[str]:
    """Flags of the teacher that the command line or a script has set to something."""
    default, given = asdict(Networks()), asdict(settings.networks)
    return [flag(name) for name, value in given.items()
            if name.startswith("teacher_") and value not in (None, default[name])]


def check_settings(settings: Settings) -> None:
    """Raise UserError for settings that contradict each other."""
    method, distills = settings.distillation.method, bool(settings.methods)
    if method == "none" and distills:
        raise UserError("--method none trains without a teacher: drop "
                        f"{', '.join(flag(f'lambda_{term}') for term in settings.active)}, or choose a method")
    if method != "none" and not distills:
        raise UserError("every --lambda-* is 0, so nothing would be distilled: use --method none for plain training")
    if settings.needs_teacher and settings.networks.teacher_pretrained is None \
            and not brings_weights(settings.networks.teacher_model):
        names = [name for name, cls in settings.methods.items() if cls.needs.teacher]
        raise UserError(f"--teacher-pretrained is missing: a trained teacher (a .pth or .safetensors file) for "
                        f"{', '.join(names)}; "
                        f"without one: {', '.join(f'--method {name}' for name in ('none', *without_teacher()))}")
    o = settings.optimization
    if o.min_lr > o.lr:
        raise UserError(f"--min-lr {o.min_lr:g} is above --lr {o.lr:g}: expected at most that (a method's preset may "
                        "have set it; --min-lr 0 takes it back)")
    if o.nesterov and not o.momentum:
        raise UserError("--nesterov needs a --momentum above 0")
    height, width = settings.data.crop_size
    if min(height, width) < 32:
        raise UserError(f"--crop-size {height} {width}: expected at least 32 pixels a side")
