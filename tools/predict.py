#!/usr/bin/env python3
"""What a trained network sees: pictures, folders, videos or a camera in; color masks, overlays and class indices out.

    python tools/predict.py work_dir/student street.jpg photos/ drive.mp4 --out predictions
    python tools/predict.py pretrained_ckpt/student.pth 0 --out predictions --write overlay     # camera 0, Ctrl-C ends

The first argument is the folder of a run, a weights file, a folder of tools/export.py or OWNER/NAME on the Hugging Face
hub; the others are files, folders (searched with all folders in them) and numbers of cameras. Exit code 1 when a video
or a camera broke off: what came until then is written.
"""
from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import MISSING, dataclass
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tqdm import tqdm

from dataset.io import read_image
from engine.segmenter import Segmenter
from engine.trained import Known
from models.prepare import HALF_PRECISIONS
from tools.inputs import Input, find_inputs
from tools.video import VideoReader, VideoWriter
from utils.cli import ArgumentParser, read_options, run_main
from utils.errors import UserError
from utils.files import check_target
from utils.options import OptionGroup, option
from utils.visualize import color_mask, overlay, save_index, save_rgb, with_legend

KINDS = ("colors", "overlay", "ids")
#: classes that fit below every frame of a video
MOST_IN_VIDEO = 32


@dataclass(frozen=True, kw_only=True)
class Output(OptionGroup):
    """What is written, and how it is computed."""

    out: str = option(MISSING, "folder that everything is written into", metavar="DIR")
    write: tuple[str, ...] = option(KINDS, "colors: masks; overlay: masks mixed into the picture, with a legend; ids: "
                                           "class indices, 8-bit gray, one PNG per frame", choices=KINDS)
    alpha: float = option(0.5, "share of the mask in an overlay", at_least=0, at_most=1)
    legend: bool = option(True, f"name the classes below an overlay: those that occur; in a video all, if there are at "
                                f"most {MOST_IN_VIDEO}")
    frames: int | None = option(None, "of a video or a camera, stop after so many", at_least=1, metavar="N")
    batch_size: int = option(1, "pictures of one size that go through the network together", at_least=1, metavar="N")
    amp: str = option("off", "half precision of the network", choices=("off", *HALF_PRECISIONS))
    device: str | None = option(None, "cpu, cuda, cuda:1, ... (default: the GPU if there is one)")


class Writer:
    """Writes what was asked for; ``count`` is the number of files by kind."""

    def __init__(self, segmenter: Segmenter, output: Output) -> None:
        self.segmenter, self.output, self.folder = segmenter, output, Path(output.out)
        self.count: Counter[str] = Counter()

    def pictures(self, image: np.ndarray, index: np.ndarray, in_video: bool = False) -> dict[str, np.ndarray]:
        """{kind: RGB} of an image uint8 [H, W, 3] RGB and its classes [H, W]."""
        palette, made = self.segmenter.palette, {}
        if "colors" in self.output.write:
            made["colors"] = color_mask(index, palette)
        if "overlay" in self.output.write:
            made["overlay"] = overlay(image, index, palette, self.output.alpha)
            # a video has frames of one size, and so a legend of always the same classes
            shown = list(range(len(palette))) if in_video else np.unique(index).tolist()
            if self.output.legend and not (in_video and len(shown) > MOST_IN_VIDEO):
                names = [self.segmenter.classes[k] for k in shown]
                made["overlay"] = with_legend(made["overlay"], names, palette[shown])
        return made

    def picture(self, name: str, image: np.ndarray, index: np.ndarray) -> None:
        """Write the files of one picture. name: relative path without an ending."""
        for kind, made in self.pictures(image, index).items():
            save_rgb(self.folder / kind / f"{name}.png", made)
            self.count[kind] += 1
        self.ids(name, index)

    def ids(self, name: str, index: np.ndarray) -> None:
        """Write the class indices of a picture or frame."""
        if "ids" in self.output.write:
            save_index(self.folder / "ids" / f"{name}.png", index)
            self.count["ids"] += 1

    def video(self, name: str, reader: VideoReader) -> int:
        """Write the files of a video or camera; the number of frames. The videos appear when it has ended."""
        files: dict[str, VideoWriter] = {}
        done = 0
        try:
            with suppress(KeyboardInterrupt) if reader.is_camera else nullcontext():
                for image, index in self.predicted(reader):
                    for kind, made in self.pictures(image, index, in_video=True).items():
                        if kind not in files:
                            files[kind] = VideoWriter(self.folder / kind / f"{name}.mp4", reader.rate)
                        files[kind].add(made)
                    self.ids(f"{name}/{done:06d}", index)
                    done += 1
            if not done:
                raise UserError(f"{reader.name}: no frame can be read; expected a video that OpenCV can decode")
            for kind, file in files.items():
                file.finish()
                self.count[f"{kind} of videos"] += 1
        finally:
            for file in files.values():
                file.discard()
        return done

    def predicted(self, reader: VideoReader) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(frame RGB, its classes [H, W]) of every frame; a batch is in memory at a time."""
        frames = reader.frames(self.output.frames)
        while batch := list(islice(frames, self.output.batch_size)):
            yield from zip(batch, self.segmenter(batch, self.output.batch_size), strict=True)


def counted(number: int, what: str) -> str:
    """'1 picture', '2 pictures'."""
    return f"{number} {what}{'s' * (number != 1)}"


def predict_pictures(inputs: list[Input], writer: Writer, batch_size: int) -> None:
    """Predict files of pictures; a batch is in memory at a time."""
    hidden = not sys.stderr.isatty()
    for first in tqdm(range(0, len(inputs), batch_size), desc="predict", unit="batch", disable=hidden, leave=False):
        chunk = inputs[first:first + batch_size]
        images = [np.ascontiguousarray(read_image(one.path)[..., ::-1]) for one in chunk]
        for one, image, index in zip(chunk, images, writer.segmenter(images, batch_size), strict=True):
            writer.picture(one.name, image, index)


def parse(argv: list[str] | None) -> tuple[str, list[str], Output, Known]:
    """(network, inputs, output, what is known of the network)."""
    parser = ArgumentParser(prog="predict.py", description=__doc__.split("\n")[0],
                            usage="%(prog)s CHECKPOINT INPUT... --out DIR [options]")
    parser.add_argument("checkpoint", help="folder of a run, weights file, folder of tools/export.py, or OWNER/NAME on "
                                           "the Hugging Face hub")
    parser.add_argument("inputs", nargs="+", help="pictures, folders of pictures, videos, numbers of cameras")
    parser.add_options(parser.add_argument_group("output"), Output)
    parser.add_options(parser.add_argument_group("network", "What the files of the network do not say."), Known)
    parsed = parser.parse_args(argv)
    return parsed.checkpoint, parsed.inputs, read_options(vars(parsed), Output), read_options(vars(parsed), Known)


def main(argv: list[str] | None = None) -> int:
    """Predict every input and say what was written. Returns the exit code."""
    checkpoint, names, output, known = parse(argv)
    check_target(Path(output.out), "--out", is_folder=True)
    inputs = find_inputs(names, Path(output.out))
    segmenter = Segmenter.from_pretrained(checkpoint, device=output.device, amp=output.amp, known=known)
    if "ids" in output.write and segmenter.num_class > 255:
        raise UserError(f"--write ids: {segmenter.num_class} classes do not fit into 8 bits; leave it out")
    writer = Writer(segmenter, output)
    pictures = [one for one in inputs if not one.moves]
    predict_pictures(pictures, writer, output.batch_size)
    frames, broken, code = 0, [], 0
    for one in inputs:
        if one.moves:
            with VideoReader(one.path if one.camera is None else one.camera) as reader:
                frames += writer.video(one.name, reader)
            if reader.broken_off:
                broken.append(reader.broken_off)
                code = max(code, int(reader.is_sure))
    moving = len(inputs) - len(pictures)
    print(f"{segmenter.net.name}: {counted(len(pictures), 'picture')}"
          + f", {counted(moving, 'video')} of {counted(frames, 'frame')}" * bool(moving))
    for kind in dict.fromkeys(output.write):
        videos = writer.count[f"{kind} of videos"]
        print(f"{Path(output.out) / kind}: {counted(writer.count[kind], 'PNG file')}"
              + f", {counted(videos, 'video')}" * bool(videos))
    for line in broken:
        print(f"{line}; what came until then is written", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(run_main(main))
