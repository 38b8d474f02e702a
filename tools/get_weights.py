#!/usr/bin/env python3
"""Download published weights and data sets by name.

    python tools/get_weights.py --list
    python tools/get_weights.py cirkdv2_deeplabv3_resnet101_citys resnet18-imagenet

What was interrupted goes on where it ended. ``--teacher-pretrained get:NAME`` fetches likewise.
"""
from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.log import setup_logging
from models.published import fetch, find, published
from tools.markdown import table
from utils.cli import ArgumentParser, read_options, run_main
from utils.errors import UserError
from utils.files import check_target
from utils.options import OptionGroup, option


@dataclass(frozen=True)
class GetWeights(OptionGroup):
    """The command line, without the names."""

    to: str | None = option(None, "folder for the files (default: pretrained_ckpt or $CKPT, for data sets data)",
                            metavar="DIR")
    list: bool = option(False, "print all names")


def parse(argv: list[str] | None) -> tuple[list[str], GetWeights]:
    """(names, options)."""
    parser = ArgumentParser(prog="get_weights.py", description=__doc__.split("\n")[0],
                            usage="%(prog)s NAME [NAME ...] [options]")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a file, see --list")
    parser.add_options(parser, GetWeights)
    parsed = parser.parse_args(argv)
    return parsed.names, read_options(vars(parsed), GetWeights)


def listing() -> str:
    """The table of all files: how it gets here, and how much of its SHA-256 its publisher says."""
    rows = [(one.name, one.about, "by hand" if one.url is None else "yes",
             {0: "unknown", 64: "whole"}.get(len(one.digest), f"{len(one.digest)} digits"))
            for one in published().values()]
    return table(("name", "what", "download", "SHA-256"), rows)


def main(argv: list[str] | None = None) -> int:
    """Download what is named, one after the other. Returns the exit code."""
    names, options = parse(argv)
    setup_logging(True)
    if options.list:
        print(listing())
    elif not names:
        raise UserError("expected the name of a file; --list prints all")
    folder = None if options.to is None else Path(options.to).expanduser()
    if folder is not None:
        check_target(folder, "--to", is_folder=True)
    for one in [find(name) for name in names]:  # a wrong name is said before anything is downloaded
        print(fetch(one.name, folder))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
