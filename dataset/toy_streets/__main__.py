"""`python -m dataset.toy_streets --data data/toy_streets`: generate the embedded data set."""

from __future__ import annotations

import sys
import time

from dataset.toy_streets.writer import write_toy_streets
from utils.cli import ArgumentParser, number, run_main
from utils.evaluate import available_cpus

PROG = "python -m dataset.toy_streets"


def build_parser() -> ArgumentParser:
    """The command line of the generator."""
    parser = ArgumentParser(
        prog=PROG,
        description="Generate toy streets: painted road scenes with exact labels, in CamVid's layout and classes.",
    )
    parser.add_argument("--data", default="data/toy_streets", metavar="DIR", help="folder to write")
    parser.add_argument("--train", type=int, default=320, help="scenes to train on")
    parser.add_argument("--val", type=int, default=60, help="scenes to choose the best weights on")
    parser.add_argument("--test", type=int, default=100, help="scenes to report on")
    parser.add_argument("--height", type=int, default=120, help="height of the images in pixels")
    parser.add_argument("--width", type=int, default=160, help="width of the images in pixels")
    parser.add_argument("--seed", type=int, default=0, help="every seed is another set of streets")
    parser.add_argument(
        "--workers", type=number(int, 1), default=available_cpus(), help="paint in at most this many processes"
    )
    parser.boolean(parser, "--overwrite", False, "replace toy streets made with other parameters")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the generator; returns the exit code. Raises UserError as :func:`write_toy_streets`."""
    args = build_parser().parse_args(argv)
    start = time.perf_counter()
    wrote = write_toy_streets(
        args.data,
        train=args.train,
        val=args.val,
        test=args.test,
        height=args.height,
        width=args.width,
        seed=args.seed,
        overwrite=args.overwrite,
        workers=args.workers,
    )
    count = f"{args.train} train, {args.val} val, {args.test} test"
    if wrote:
        print(
            f"{args.data}: wrote toy streets ({count}; {args.height} x {args.width}, seed {args.seed}) "
            f"in {time.perf_counter() - start:.1f} s"
        )
    else:
        print(f"{args.data}: the same toy streets are there already ({count}); nothing to do")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, prog=PROG))
