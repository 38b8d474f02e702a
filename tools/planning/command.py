"""The command line of a plan's run: its networks, its folders, and what of the plan sets which flag."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from engine.settings import build_parser
from models import is_outside, list_models, network_name, split_backbone
from models.outside.sources import SOURCES
from models.timm_backbone import is_timm
from utils.errors import UserError, did_you_mean

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Places:
    """Folders. results: of result files; work: of weights, states and logs; data: of the data set, None for the plan's.

    Those inside the repository are given relative to it, so that results say nothing of the machine's folders."""

    results: Path = Path("results")
    work: Path = Path("work_dir")
    data: Path | None = None

    @classmethod
    def of(cls, **given: str | None) -> Places:
        """From folders of the command line, relative to where it was given."""
        paths = {name: Path(text).expanduser().resolve() for name, text in given.items() if text is not None}
        return cls(**{name: path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
                      for name, path in paths.items()})


def check_names(model: str, backbone: str, where: str) -> None:
    """UserError for a network that this repository does not have. It is not built; timm knows its own."""
    pairs = list_models()
    backbones = [own for one, own in pairs if one == model]
    if not backbones:
        models = list(dict.fromkeys(one for one, _ in pairs))
        raise UserError(f"{where}: unknown model {model!r}; expected one of {', '.join(models)}"
                        f"{did_you_mean(model, models)}")
    if not is_timm(backbone) and (base := split_backbone(backbone)[0]) not in backbones:
        raise UserError(f"{where}: unknown backbone {backbone!r} for {model}; expected one of {', '.join(backbones)}, "
                        f"optionally with a width such as _w0.5, or timm:NAME{did_you_mean(base, backbones)}")


@dataclass(frozen=True)
class Network:
    """model and backbone, as '--student-model' and '--student-backbone' take them. backbone: "" for a network of
    another library."""

    model: str
    backbone: str = ""

    @classmethod
    def read(cls, text: Any, where: str) -> Network:
        """From 'deeplabv3 resnet18', or 'module:examples.espnet:camvid'. UserError for anything else."""
        words = text.split() if isinstance(text, str) else []
        if len(words) == 2 and not is_outside(words[0]):
            check_names(*words, where)
        elif len(words) != 1 or not is_outside(words[0]):
            raise UserError(f"{where}: expected 'MODEL BACKBONE', such as \"deeplabv3 resnet18\", or one word for a "
                            f"network from elsewhere, such as \"smp:Unet:resnet34\", got {text!r}")
        elif (source := words[0].partition(":")[0]) not in SOURCES:
            raise UserError(f"{where}: unknown source {source!r} of {text!r}; expected one of {', '.join(SOURCES)}"
                            f"{did_you_mean(source, SOURCES)}")
        return cls(*words)

    @property
    def name(self) -> str:
        """In names of folders."""
        return network_name(self.model, self.backbone)

    def flags(self, role: str) -> list[str]:
        """Of the command line. role: teacher or student."""
        return [f"--{role}-model", self.model, *((f"--{role}-backbone", self.backbone) if self.backbone else ())]


def training_flags(data: object, method: str, student: Network,
                   teacher: tuple[Network, Path] | None) -> dict[str, list[str]]:
    """The flags that say what a run trains, by what sets them. data: its folder, None for what common.sh says. teacher:
    with its file."""
    flags = {"the key data": ["--data", str(data)] if data else [],
             "the key method of [runs.NAME]": ["--method", method], "the key student": student.flags("student")}
    if teacher:
        flags |= {"the key network of [teachers.NAME]": teacher[0].flags("teacher"),
                  "the key file of [teachers.NAME]": ["--teacher-pretrained", str(teacher[1])]}
    return flags


def running_flags(places: Places, protocol: str, name: str, label: str, seed: int) -> dict[str, list[str]]:
    """The flags that a plan adds to every run, by what sets them: where its files go, and that it goes on where it
    stopped."""
    folder = str(places.work / name)
    return {"the key seeds": ["--seed", str(seed)],
            "--work of tools/reproduce.py": ["--save-dir", folder, "--log-dir", folder],
            "--results of tools/reproduce.py": ["--results", str(places.results)],
            "the key protocol": ["--protocol", protocol], "the NAME of [runs.NAME]": ["--label", label],
            "tools/reproduce.py itself": ["--resume", "auto"]}


def joined(flags: Mapping[str, list[str]]) -> list[str]:
    """The flags without what sets them."""
    return [word for words in flags.values() for word in words]


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """{'crop-size': [176, 176], 'fast': False} -> ['--crop-size', '176', '176', '--no-fast']."""
    flags: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            flags.append(f"--{'' if value else 'no-'}{name}")
        else:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


@cache
def flags_of_keys() -> dict[str, str]:
    """{flag, without dashes and in any spelling: what sets it}: those that no table of flags may hold. train.sh makes
    --dataset of its first word, and --no-cuda of the number of GPUs."""
    net, parser = Network("model", "backbone"), build_parser()
    flags = {**training_flags("data", "none", net, (net, Path("file"))), **running_flags(Places(), "", "", "", 0),
             "the key dataset": ["--dataset", "name"], "the key gpus": ["--no-cuda"]}
    return {spelling: key for key, words in flags.items() for setting in parser.given(words)
            for spelling in (setting, *parser.options[setting].aliases)}
