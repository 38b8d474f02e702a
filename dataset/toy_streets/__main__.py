"""``python -m dataset.toy_streets --data data/toy_streets``: generate the embedded data set."""
from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass

from dataset.toy_streets.writer import write_toy_streets
from utils.cli import parse_options, run_main
from utils.distributed import available_cpus
from utils.options import OptionGroup, option

PROG = "python -m dataset.toy_streets"


@dataclass(frozen=True)
class Settings(OptionGroup):
    """The command line of the generator."""

    data: str = option("data/toy_streets", "folder to write", metavar="DIR")
    train: int = option(320, "scenes to train on")
    val: int = option(60, "scenes to choose the best weights on")
    test: int = option(100, "scenes to report on")
    height: int = option(120, "height of the images in pixels")
    width: int = option(160, "width of the images in pixels")
    seed: int = option(0, "every seed is another set of streets")
    points: int = option(0, "label the training scenes at so many random points only; 0 = everywhere")
    workers: int = option(available_cpus(), "paint in at most this many processes", at_least=1)
    overwrite: bool = option(False, "replace toy streets made with other parameters")


def main(argv: list[str] | None = None) -> int:
    """Run the generator; returns the exit code. Raises UserError as :func:`write_toy_streets`."""
    settings = parse_options(Settings, argv, prog=PROG, description="Generate toy streets: painted road scenes with "
                             "exact labels, in CamVid's layout and classes.")
    start = time.perf_counter()
    values = asdict(settings)
    wrote = write_toy_streets(values.pop("data"), **values)
    count = f"{settings.train} train, {settings.val} val, {settings.test} test"
    if wrote:
        print(f"{settings.data}: wrote toy streets ({count}; {settings.height} x {settings.width}, seed "
              f"{settings.seed}) in {time.perf_counter() - start:.1f} s")
    else:
        print(f"{settings.data}: the same toy streets are there already ({count}); nothing to do")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, prog=PROG))
