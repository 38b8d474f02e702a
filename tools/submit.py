#!/usr/bin/env python3
"""The zip file that the test server of Cityscapes or ADE20K takes, checked before it is written.

    python tools/submit.py --out citys.zip --dataset citys --data data/cityscapes --pretrained work_dir/student
    python tools/submit.py --out citys.zip --dataset citys --data data/cityscapes --predictions DIR/ids

Predicts the test split, with the flags of eval.py (torchrun works too), or takes the folder ids/ or index/ that eval.py
--save-ids or --save-pred has written.
"""
from __future__ import annotations

import contextlib
import io
import os
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

import eval as evaluation
from dataset import DatasetSpec, get_dataset_spec
from dataset.discovery import find_samples
from dataset.io import read_label
from engine.eval_settings import GROUPS as EVAL_GROUPS
from engine.eval_settings import Data, EvalSettings, Output, parse_settings
from engine.pictures import pictures_folder
from utils.cli import ArgumentParser, read_options, run_main
from utils.errors import UserError
from utils.files import check_target, sha256, write_atomically
from utils.options import OptionGroup, option

#: data sets with a test server, and what its files hold
SERVERS = {"citys": "label ids, not train ids", "ade20k": "classes 1 to 150"}
KINDS = {"ids": "the data set's own label values", "index": "train ids"}
#: of every file in the zip, so that the same predictions give the same zip: the earliest time that zip knows
TIME = (1980, 1, 1, 0, 0, 0)
#: of a Cityscapes label file, whose name the official evaluation looks its prediction up by
LABEL_ENDING = "_gtFine_labelIds.png"


@dataclass(frozen=True, kw_only=True)
class Submission(OptionGroup):
    """What is written, and from what."""
    out: str = option(MISSING, "the zip file to write", metavar="FILE")
    predictions: str | None = option(
        None, "predictions that are there already: the folder ids/ of eval.py --save-ids or index/ of --save-pred "
              "(default: predict now, into a folder beside --out)", metavar="DIR")
    values: str | None = option(
        None, "what the files of --predictions hold: ids, the data set's own label values; index, train ids (default: "
              "by the name of the folder)", choices=tuple(KINDS))


@dataclass(frozen=True, kw_only=True)
class ServerData(Data):
    """What eval.py reads, but of the split whose labels only the server has."""
    split: str = option("test", "train, val, test, ...")


GROUPS = (("submission", Submission), *((title, ServerData if group is Data else group)
                                        for title, group in EVAL_GROUPS if group is not Output))


@dataclass(frozen=True)
class Expected:
    """One file of the zip: its name there, and the image that it belongs to."""
    name: str
    image: str


def expected_files(spec: DatasetSpec, settings: Data) -> list[Expected]:
    """The files that the server wants, sorted by name: for every image one PNG with its stem, all in one folder."""
    samples = find_samples(spec, settings.data, settings.split, settings.data_list)
    files = [Expected(f"{Path(sample.image).stem}.png", sample.image) for sample in samples]
    names = [one.name for one in files]
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{settings.data}: two images of split '{settings.split}' are called {Path(double).stem}; "
                        "expected different names, since the zip has no folders")
    return sorted(files, key=lambda one: one.name)


def check_names(folder: Path, files: Sequence[Expected]) -> None:
    """Raise UserError, naming the first, when a PNG is missing in the folder or belongs to no image."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of predictions")
    wanted, found = [one.name for one in files], {path.name for path in folder.glob("*.png")}
    missing = [name for name in wanted if name not in found]
    surplus = sorted(found - set(wanted))
    if missing:
        raise UserError(f"{folder / missing[0]}: no prediction ({len(missing)} of {len(wanted)} images have none)")
    if surplus:
        raise UserError(f"{folder / surplus[0]}: belongs to no image of the split ({len(surplus)} such files); "
                        f"expected exactly {len(wanted)} files")


def label_ids(path: Path, image: str, spec: DatasetSpec, kind: str) -> np.ndarray:
    """uint8 [H, W] of one prediction in the data set's own values. UserError for another size than the image's and for
    a value that is no class."""
    values = read_label(path)
    with Image.open(image) as picture:
        width, height = picture.size
    if values.shape != (height, width):
        raise UserError(f"{path}: {values.shape[0]}x{values.shape[1]} pixels; expected {height}x{width} "
                        f"(height x width), the size of {image}")
    ids = spec.train_to_id
    allowed = np.zeros(256, dtype=bool)
    allowed[ids if kind == "ids" else range(len(ids))] = True
    if not allowed[values].all():
        expected = ", ".join(map(str, np.sort(ids))) if kind == "ids" else f"0..{len(ids) - 1}"
        raise UserError(f"{path}: value {values[~allowed[values]][0]} is no class of {spec.title} ({KINDS[kind]}: "
                        f"{expected})")
    return values if kind == "ids" else ids[values]


def write_zip(out: Path, folder: Path, files: Sequence[Expected], spec: DatasetSpec, kind: str) -> None:
    """Check every prediction and put it into the zip, which appears only when all are good. The same predictions give
    the same bytes."""
    def write(target: Path) -> None:
        with zipfile.ZipFile(target, "w") as archive:
            for one in files:
                content = io.BytesIO()
                Image.fromarray(label_ids(folder / one.name, one.image, spec, kind)).save(content, format="PNG")
                info = zipfile.ZipInfo(one.name, TIME)
                info.create_system, info.external_attr = 3, 0o644 << 16  # Unix, on every machine
                archive.writestr(info, content.getvalue(), zipfile.ZIP_STORED)  # PNG is compressed already

    write_atomically(out, write)


def check_officially(files: Sequence[Expected], spec: DatasetSpec) -> str:
    """Ask Cityscapes' own evaluation for the prediction of every image, and its table for every id; a line that says
    so, or that it cannot be imported. UserError when it finds none, or two, or knows no such class."""
    try:
        from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official
        from cityscapesscripts.helpers.labels import id2label
    except ImportError as error:
        return f"cityscapesscripts cannot be imported ({error}): its own check was skipped"
    for train, stored in enumerate(spec.train_to_id.tolist()):
        label = id2label.get(stored)
        if label is None or label.trainId != train or label.ignoreInEval:
            raise UserError(f"{spec.title}: cityscapesscripts does not evaluate id {stored} as class {train}")
    arguments = official.CArgs()
    arguments.predictionPath, arguments.predictionWalk = "zip", [("", [one.name for one in files])]
    found = set()
    for one in files:
        truth = Path(one.image).stem.removesuffix("_leftImg8bit") + LABEL_ENDING
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                found.add(official.getPrediction(arguments, truth))
        except SystemExit:
            raise UserError(f"{one.image}: cityscapesscripts: {said.getvalue().strip()}") from None
    if found != {one.name for one in files}:
        raise UserError(f"{min({one.name for one in files} - found)}: cityscapesscripts finds it for no image")
    return f"cityscapesscripts finds one prediction for each of the {len(files)} images, and knows all ids"


def kind_of(options: Submission) -> str:
    """What the files of ``--predictions`` hold."""
    kind = options.values or Path(options.predictions).resolve().name
    if kind not in KINDS:
        raise UserError(f"--predictions {options.predictions}: expected a folder called ids or index, or --values to "
                        "say what its files hold")
    return kind


def predict(settings: EvalSettings) -> Path:
    """Predict the split with all processes; the folder of the predictions."""
    evaluation.execute(settings)
    return pictures_folder(settings, settings.data.split) / "ids"


def parse(argv: list[str] | None) -> tuple[Submission, EvalSettings]:
    """Parse and check the command line; it ends here. What is left of it when the own flags are taken out is a command
    line of ``eval.py``, and read as such."""
    everything, own = (ArgumentParser(prog="submit.py", description=__doc__.split("\n")[0]) for _ in range(2))
    for title, group in GROUPS:
        everything.add_options(everything.add_argument_group(title), group)
    own.add_options(own, Submission)
    parsed = vars(everything.parse_args(argv))
    options, data = read_options(parsed, Submission), read_options(parsed, ServerData)
    check(options, data)
    settings = parse_settings(own.parse_known_args(argv)[1])
    output = Output(save_ids=True, save_dir=Path(options.out).with_suffix(""))
    return options, replace(settings, data=replace(settings.data, split=data.split), output=output)


def check(options: Submission, data: ServerData) -> None:
    """UserError for flags that do not make a submission."""
    if Path(options.out).suffix != ".zip":
        raise UserError(f"--out: expected the .zip file to write, got {options.out}")
    if data.dataset not in SERVERS:
        raise UserError(f"--dataset {data.dataset}: expected a data set with a test server: {', '.join(SERVERS)}")
    if data.limit is not None:
        raise UserError(f"--limit {data.limit}: expected no limit, the server wants every image")
    if options.values and not options.predictions:
        raise UserError("--values: expected with --predictions, whose files it describes")
    check_target(Path(options.out), "--out", is_folder=False)


def main(argv: list[str] | None = None) -> int:
    """Predict if need be, check, write. Returns the exit code."""
    options, settings = parse(argv)
    spec = get_dataset_spec(settings.data.dataset, settings.data.data)
    files = expected_files(spec, settings.data)
    if options.predictions:
        folder, kind = Path(options.predictions), kind_of(options)
    else:
        folder, kind = predict(settings), "ids"
        if int(os.environ.get("RANK", 0)) > 0:
            return 0
    check_names(folder, files)
    note = check_officially(files, spec) if settings.data.dataset == "citys" else None
    out = Path(options.out)
    write_zip(out, folder, files, spec, kind)
    split = settings.data.split
    published = spec.split(split).published
    short = "" if published in (None, len(files)) else f"; PUBLISHED: {published}, so the server will refuse it"
    print(f"{out}: {len(files)} files of {spec.title}, {split} ({SERVERS[settings.data.dataset]}), "
          f"{out.stat().st_size / 1e6:.1f} MB, SHA-256 {sha256(out)[:16]}…{short}")
    if note:
        print(note)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
