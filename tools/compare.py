#!/usr/bin/env python3
"""One HTML page that compares a distilled student with a plain one: curves, classes, confusion, pictures, cost.

    python tools/compare.py --plain work_dir/plain --distilled work_dir/afdcd --out page.html

Each folder is the --save-dir of a finished run; networks, data set and the teacher's weights are read from there. The
page needs no other file and no server.
"""
from __future__ import annotations

import sys
from dataclasses import MISSING, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from dataset import DatasetSpec, SegmentationDataset, get_dataset_spec
from engine.teacher import load_teacher
from models.class_map import for_predictions
from tools.comparison.answers import Answers
from tools.comparison.page import Comparison, build_page
from tools.comparison.runs import TrainedRun, check_pair, check_teacher, read_run, teacher_network
from utils.cli import parse_options, run_main
from utils.cpu import prepare_cpu
from utils.errors import UserError
from utils.files import check_target, write_text
from utils.options import OptionGroup, option


@dataclass(frozen=True, kw_only=True)
class Options(OptionGroup):
    """The command line."""
    plain: str = option(MISSING, "--save-dir of the student's plain run", metavar="RUN_DIR")
    distilled: str = option(MISSING, "--save-dir of the student's distilled run", metavar="RUN_DIR")
    teacher: str | None = option(None, "--save-dir of the teacher's run: adds its cost, and says where its weights are "
                                       "(default: where the distilled run found them)", metavar="RUN_DIR")
    data: str | None = option(None, "root folder of the data set (default: that of the distilled run)", metavar="DIR")
    split: str | None = option(None, "labeled split (default: test where the data set has its labels, else val)")
    weights: str = option("best", "those of the students that were best on the validation split, or of the last "
                                  "iteration",
                          choices=("best", "last"))
    images: int = option(12, "pictures, of the images that distillation changes most", at_least=1, metavar="N")
    out: Path = option(MISSING, "the page to write", metavar="FILE")
    workers: int = option(2, "loading processes, at most one per CPU", at_least=0, metavar="N")
    no_cuda: bool = option(False, "run on the CPU although there is a GPU")


def read_runs(options: Options) -> dict[str, TrainedRun]:
    """{role: run} of the folders that were given, checked against each other."""
    plain, distilled = (read_run(f"--{role}", Path(getattr(options, role)).expanduser(), options.weights)
                        for role in ("plain", "distilled"))
    check_pair(plain, distilled)
    if options.teacher is None:
        return {"plain": plain, "distilled": distilled}
    learned_from = distilled.settings.networks.teacher_pretrained
    teacher = read_run("--teacher", Path(options.teacher).expanduser(), options.weights,
                       learned_from and Path(learned_from).name)
    check_teacher(teacher, distilled)
    return {"teacher": teacher, "plain": plain, "distilled": distilled}


def build_dataset(runs: dict[str, TrainedRun], data: str | None, split: str | None) -> SegmentationDataset:
    """The split that is evaluated. UserError for one without labels, and when the runs had other classes."""
    settings = runs["distilled"].settings.data
    root = data if data is not None else settings.data
    if not Path(root).is_dir():
        raise UserError(f"{root}: no such folder; expected the data set of the runs (--data says where it is now)")
    spec = get_dataset_spec(settings.dataset, root)
    if data is None:
        check_classes(spec, root, runs)
    split = split or next(iter(spec.report_splits), spec.selection_split)
    if spec.split(split).label_dir is None:
        raise UserError(f"--split {split}: {spec.title} has no labels of it; expected one of "
                        f"{', '.join(spec.eval_splits)}")
    selection = settings.selection_split or spec.selection_split
    return SegmentationDataset(spec, root, split, train=False,
                               list_file=settings.val_list if split == selection else None)


def check_classes(spec: DatasetSpec, root: str, runs: dict[str, TrainedRun]) -> None:
    """UserError when another run was made with a folder of other classes, and no map of them. A folder that is gone
    cannot say."""
    mapped = runs["distilled"].settings.networks.class_map
    for role, run in runs.items():
        own = run.settings.data.data
        if role == "teacher" and mapped:  # which is checked when it is loaded
            continue
        if Path(own).is_dir() and get_dataset_spec(spec.name, own).classes != spec.classes:
            raise UserError(f"{run.flag} {run.folder}: its data set {own} has other classes than {root}, that of the "
                            "distilled run; expected runs of the same data set")


def evaluate_all(runs: dict[str, TrainedRun], dataset: SegmentationDataset, options: Options) -> dict[str, Answers]:
    """{role: answers} of the teacher, if there is one, the plain and the distilled student."""
    device = torch.device("cuda" if torch.cuda.is_available() and not options.no_cuda else "cpu")
    if device.type == "cpu":
        prepare_cpu()
    networks = {role: runs[role].network.build(dataset.spec.num_class) for role in ("plain", "distilled")}
    if (choice := teacher_network(runs["distilled"], runs.get("teacher"))) is not None:
        teacher = load_teacher(runs["distilled"].settings, dataset.spec, choice)
        networks = {"teacher": for_predictions(teacher), **networks}
    answers = {}
    for role, net in networks.items():
        sys.stderr.write(f"{role}: {net.name} on {len(dataset)} images of {dataset.spec.title}, {dataset.split} ...\n")
        answers[role] = Answers(net.to(device), dataset, device, options.workers)
        sys.stderr.write(f"{role}: mIoU {100 * answers[role].result['mIoU']:.2f} %\n")
    return answers


def main(argv: list[str] | None = None) -> int:
    """Evaluate the networks and write the page. Returns the exit code."""
    options = parse_options(Options, argv, prog="compare.py", description=__doc__.split("\n")[0])
    out = options.out.expanduser()
    check_target(out, "--out", is_folder=False)
    runs = read_runs(options)
    dataset = build_dataset(runs, options.data, options.split)
    page = build_page(Comparison(runs, dataset, evaluate_all(runs, dataset, options)), options.images)
    write_text(out, page)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
