"""What a run says when it has ended: its scores, where its files are, and how to evaluate them."""
from __future__ import annotations

import shlex
from datetime import timedelta

from engine.build import build_dataset, selection_split
from engine.journal import Journal
from engine.layout import INDENT, WIDTH, fold
from engine.log import LOG
from engine.results import best_validation, read_log
from engine.run import Run
from models import is_outside
from utils.errors import UserError


def summarize(run: Run, journal: Journal) -> None:
    """Log the end of a run that has ended, on the main process."""
    if journal.logger is None:
        return
    records = read_log(journal.logger.path)
    seconds = sum(r.get("seconds", 0.0) for r in records if r["kind"] in ("train", "val", "stages"))
    lines = [f"done: {run.step} iterations in {timedelta(seconds=round(seconds))}"]
    validations = [r for r in records if r["kind"] == "val"]
    if validations:
        best, last = (f"{100 * r['mIoU']:.2f} at step {r['step']}" for r in (
            best_validation(validations), validations[-1]))
        lines.append(f"{INDENT}mIoU on {run.val_set.split}: best {best}, last {last}")
    elif run.val_set is None:
        lines.append(f"{INDENT}not validated (--skip-val)")
    weights = (("best weights", run.files.best), ("last weights", run.files.student))
    lines.append(f"{INDENT}files in {run.files.directory}")
    lines += [f"{INDENT}{name}: {path.name}" for name, path in weights if path.is_file()]
    log = journal.logger.path
    lines.append(f"{INDENT}log: {log.name if log.parent == run.files.directory else log}")
    LOG.info("%s", "\n".join([*lines, f"{INDENT}to evaluate:", *evaluation(run)]))


def evaluation(run: Run) -> list[str]:
    """The lines of the command that evaluates the best weights, or the last ones."""
    networks, data = run.settings.networks, run.settings.data
    weights = run.files.best if run.files.best.is_file() else run.files.student
    split, list_file = split_to_evaluate(run)
    more = [["--split", split]] if split != run.spec.selection_split else []
    more += [["--data-list", list_file]] if list_file is not None else []
    more += [["--ignore-label", str(data.ignore_label)]] if data.ignore_label != -1 else []
    more += [["--no-cuda"]] if run.settings.running.no_cuda else []
    own = [] if is_outside(networks.student_model) else [["--backbone", networks.student_backbone]]
    parts = [shlex.split("python eval.py"), ["--model", networks.student_model], *own,
             ["--dataset", data.dataset], ["--data", data.data], ["--pretrained", str(weights)], *more]
    return [INDENT + line for line in fold(
        [shlex.join(part) for part in parts], " \\", " ", WIDTH - len(INDENT)).splitlines()]


def split_to_evaluate(run: Run) -> tuple[str, str | None]:
    """(split, its list file): the one that the run was validated on, else the one for that if it is there, else the
    training images."""
    data, spec, chosen = run.settings.data, run.spec, selection_split(run.settings, run.spec)
    if run.val_set is not None:
        return chosen, data.val_list
    try:
        build_dataset(run.settings, spec, chosen, train=False, list_file=data.val_list)
    except UserError:
        return spec.train_split, data.train_list
    return chosen, data.val_list
