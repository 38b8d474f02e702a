"""The command line of ``train_kd.py``: every setting, its default, and the checks that need no files.

Defaults are those of the reference's parser. A method's own options come from its file in ``losses/``.
"""
from __future__ import annotations

import argparse
from pathlib import Path

from dataset.spec import list_datasets
from losses.distiller import Distiller, methods
from models.registry import split_backbone
from utils.cli import ArgumentParser, number
from utils.errors import UserError

#: accepted so that old command lines still start; they do nothing in the reference either
DEAD_OPTIONS = ("start_epoch", "save_epoch", "val_epoch")

BASE_HELP = ("ImageNet weights of its backbone: a file, or a name such as torchvision:ResNet50_Weights.IMAGENET1K_V2 "
             "(for resnet50_original)")
positive_int, natural = number(int, 1), number(int, 0)
positive, not_negative = number(float, 0, open_low=True), number(float, 0)


def _networks(parser: ArgumentParser) -> None:
    g = parser.add_argument_group("networks")
    g.add_argument("--teacher-model", default="deeplabv3", help="architecture of the teacher")
    g.add_argument("--teacher-backbone", default="resnet101", help="backbone of the teacher")
    g.add_argument("--teacher-pretrained", default="None", metavar="FILE",
                   help=f"trained teacher (every method but {', '.join(_without_teacher())} needs one)")
    g.add_argument("--teacher-pretrained-base", default="None", metavar="FILE", help=BASE_HELP)
    g.add_argument("--teacher-preprocess", choices=("bgr", "rgb"),
                   help="its input: BGR minus mean, or RGB mean/std (default: what its weights say)")
    g.add_argument("--student-model", "--model", default="deeplabv3", help="architecture of the student")
    g.add_argument("--student-backbone", "--backbone", default="resnet18", help="backbone of the student")
    g.add_argument("--student-pretrained", "--pretrained", default="None", metavar="FILE",
                   help="segmentation weights to start from")
    g.add_argument("--student-pretrained-base", "--pretrained-base", default="None", metavar="FILE",
                   help=BASE_HELP)
    g.add_argument("--student-preprocess", "--preprocess", choices=("bgr", "rgb"),
                   help="its input: BGR minus mean, or RGB mean/std (default: what its weights say)")
    parser.boolean(g, "--aux", None, "auxiliary head on c3 of the student (default: on for resnet, off for mobilenet)")
    g.add_argument("--aux-weight", type=not_negative, default=0.4, help="weight of the auxiliary cross entropy")


def _data(parser: ArgumentParser) -> None:
    g = parser.add_argument_group("data")
    g.add_argument("--dataset", default="citys", help=f"one of {', '.join(list_datasets())}")
    g.add_argument("--data", default="./dataset/cityscapes/", metavar="DIR", help="root folder of the data set")
    g.add_argument("--train-list", default=None, metavar="FILE", help="list file of the training split")
    g.add_argument("--val-list", default=None, metavar="FILE", help="list file of the validation split")
    g.add_argument("--crop-size", type=positive_int, nargs="+", default=[512, 1024], metavar="N",
                   help="training crop: height width, or one number for a square")
    g.add_argument("--ignore-label", type=int, default=-1, help="label value of pixels that do not count")
    g.add_argument("--workers", type=natural, default=8, help="data-loading processes per training process")
    g.add_argument("--sampling", choices=("reference", "epoch"), default="reference",
                   help="reference: the repeated list shuffled as a whole; epoch: a fresh shuffle of every epoch")
    g.add_argument("--selection-split", default=None, metavar="SPLIT",
                   help="split that picks the best model; reference: the one that the reference used, test for camvid "
                        "(default: val)")


def _optimisation(parser: ArgumentParser) -> None:
    g = parser.add_argument_group("optimisation")
    g.add_argument("--batch-size", type=positive_int, default=16, help="images per step over all processes together")
    g.add_argument("--max-iterations", type=positive_int, default=40000, help="steps of the whole run")
    g.add_argument("--lr", type=positive, default=0.02, help="learning rate of the first step")
    g.add_argument("--poly-power", type=not_negative, default=0.9, help="lr * (1 - step / max_iterations) ** power")
    g.add_argument("--momentum", type=number(float, 0, 1), default=0.9, help="momentum of SGD")
    g.add_argument("--weight-decay", type=not_negative, default=1e-4, help="on every parameter, batch norm included")
    g.add_argument("--seed", type=natural, default=0, help="of weights, sample order, augmentation, masks, dropout")
    parser.boolean(g, "--sync-bn", True, "share batch-norm statistics when there are several processes")


def _distillation(parser: ArgumentParser) -> None:
    g = parser.add_argument_group("distillation", "Terms combine freely; a term with weight 0 is not computed.")
    g.add_argument("--method", choices=["none", *methods()], default=None, metavar="NAME",
                   help="preset of published settings for --dataset and --student-backbone (see --list-methods); none: "
                        "plain training, of a baseline or a teacher (default: Af-DCD with the weights listed here)")
    g.add_argument("--list-methods", action="store_true", default=argparse.SUPPRESS,
                   help="print every method with its preset and what it adds to the given networks, and stop")
    g.add_argument("--group-size", type=natural, default=2, metavar="N",
                   help="images whose statistics go together in methods that relate images (the published runs had 2 "
                        "per GPU); 0 = all images of the process")
    g.add_argument("--compat", choices=("fixed", "reference"), default="fixed",
                   help="methods whose released code has a known defect: corrected, or as released")
    for cls in methods().values():
        for term in cls.terms:
            g.add_argument(term.flag, type=not_negative, default=term.weight, metavar="W", help=term.help)
    for name, cls in methods().items():
        if cls.add_arguments.__func__ is not Distiller.add_arguments.__func__:
            cls.add_arguments(parser.add_argument_group(f"method {name}", cls.title))


def _running(parser: ArgumentParser) -> None:
    g = parser.add_argument_group("running")
    g.add_argument("--save-dir", default="~/.torch/models", metavar="DIR", help="weights, training state, config")
    g.add_argument("--log-dir", default="../runs/logs/", metavar="DIR", help="text log, JSON lines, TensorBoard")
    g.add_argument("--resume", default=None, metavar="auto|FILE",
                   help="go on from a training state; auto: from the one in --save-dir if there is one")
    g.add_argument("--log-iter", type=positive_int, default=10, help="steps between log lines")
    g.add_argument("--save-per-iters", type=positive_int, default=800, help="steps between training states")
    g.add_argument("--val-per-iters", type=positive_int, default=800, help="steps between validations")
    parser.boolean(g, "--skip-val", False, "no validation, hence no best model and no final report")
    parser.boolean(g, "--tensorboard", True, "write TensorBoard scalars and prediction panels")
    g.add_argument("--panels", type=natural, default=3, help="validation images drawn at every validation")
    parser.boolean(g, "--no-cuda", False, "run on the CPU although there is a GPU")
    g.add_argument("--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # torchrun's environment decides
    for dead in DEAD_OPTIONS:
        g.add_argument("--" + dead.replace("_", "-"), type=int, default=None, help=argparse.SUPPRESS)


def build_parser() -> ArgumentParser:
    """The parser of ``train_kd.py``, with the options of every registered method."""
    parser = ArgumentParser(prog="train_kd.py", description="Train a segmentation network, distilled or plain.")
    for add in (_networks, _data, _optimisation, _distillation, _running):
        add(parser)
    return parser


def published(method: str, dataset: str, backbone: str) -> dict[str, object]:
    """What the ``preset`` of a method sets for a data set and a student's backbone, whatever its width; {} for 'none'.

    The more specific entry wins: "*", then "*/BACKBONE", "DATASET", "DATASET/BACKBONE".
    """
    entries = methods()[method].preset if method != "none" else {}
    full, _ = split_backbone(backbone)
    keys = ("*", f"*/{full}", dataset, f"{dataset}/{full}")
    return {option: value for key in keys for option, value in entries.get(key, {}).items()}


def preset(method: str, dataset: str, backbone: str) -> dict[str, object]:
    """Option values that ``--method`` stands for: all weights 0, then what is :func:`published`."""
    weights: dict[str, object] = {t.dest: 0.0 for cls in methods().values() for t in cls.terms}
    return {**weights, **published(method, dataset, backbone)}


def parse_config(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check a command line. Explicit flags win over the preset of ``--method``, which wins over defaults.

    Exits with code 2 and one line on a malformed command line, and with code 0 after the table of ``--list-methods``;
    raises :class:`UserError` on settings that cannot be.
    """
    parser = build_parser()
    config = parser.parse_args(argv)
    if config.method is not None:
        parser.set_defaults(**preset(config.method, config.dataset, config.student_backbone))
        config = parser.parse_args(argv)
    for name in ("teacher_pretrained", "teacher_pretrained_base", "student_pretrained", "student_pretrained_base"):
        if getattr(config, name) in ("", "None", "none"):
            setattr(config, name, None)
    if len(config.crop_size) > 2:
        parser.error(f"argument --crop-size: expected one or two numbers, got {len(config.crop_size)}")
    config.crop_size = tuple(config.crop_size * 2 if len(config.crop_size) == 1 else config.crop_size)
    if hasattr(config, "list_methods"):
        from utils.method_list import method_table  # it needs this module

        print(method_table(config))
        parser.exit()
    config.save_dir, config.log_dir = (str(Path(p).expanduser()) for p in (config.save_dir, config.log_dir))
    _check(config)
    return config


def distils(config: argparse.Namespace) -> bool:
    """True when any distillation term has a weight."""
    return bool(_active_methods(config))


def needs_teacher(config: argparse.Namespace) -> bool:
    """True when a method with a weight reads a teacher."""
    return any(cls.teacher_taps for cls in _active_methods(config))


def teacher_options(config: argparse.Namespace) -> list[str]:
    """Flags of the teacher that the command line or a script has set to something."""
    parser = build_parser()
    names = ("teacher_model", "teacher_backbone", "teacher_pretrained", "teacher_pretrained_base", "teacher_preprocess")
    return ["--" + name.replace("_", "-") for name in names
            if getattr(config, name) not in (None, parser.get_default(name))]


def _without_teacher() -> list[str]:
    return [name for name, cls in methods().items() if not cls.teacher_taps]


def _active_methods(config: argparse.Namespace) -> list[type[Distiller]]:
    return [cls for cls in methods().values() if any(getattr(config, t.dest) for t in cls.terms)]


def _check(config: argparse.Namespace) -> None:
    if config.method == "none" and distils(config):
        wanted = [t.flag for cls in methods().values() for t in cls.terms if getattr(config, t.dest)]
        raise UserError(f"--method none trains without a teacher: drop {', '.join(wanted)}, or choose a method")
    if config.method != "none" and not distils(config):
        raise UserError("every --lambda-* is 0, so nothing would be distilled: use --method none for plain training")
    if needs_teacher(config) and config.teacher_pretrained is None:
        names = [cls.method for cls in _active_methods(config) if cls.teacher_taps]
        raise UserError(f"--teacher-pretrained is missing: a trained teacher (a .pth file) for {', '.join(names)}; "
                        f"without one: {', '.join(f'--method {name}' for name in ('none', *_without_teacher()))}")
    if min(config.crop_size) < 32:
        raise UserError(f"--crop-size {config.crop_size[0]} {config.crop_size[1]}: expected at least 32 pixels a side")
