#!/usr/bin/env python3
"""Is every term of a run's objective alive? Value, gradient on the student beside the cross entropy's, and a verdict.

    python tools/diagnose.py work_dir/student                # RUN: the --save-dir of a run
    python tools/diagnose.py work_dir/student --batches 8 --data data/CamVid --json diagnosis.json

Reads what --diagnose-every has logged in training; without that, it measures now, from the run's training state and on
its own training images.
"""
from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.build import build_run
from engine.checkpoint import resume
from engine.diagnose import diagnose
from engine.log import setup_logging
from engine.ready import get_ready
from engine.results import read_log
from engine.run import Run, build_loader
from engine.run_files import RunFiles
from engine.settings import Settings
from tools.finished import find_log, read_settings
from tools.markdown import table
from utils.cli import ArgumentParser, read_options, run_main
from utils.distributed import cleanup, init_distributed
from utils.errors import UserError
from utils.files import check_target, write_json
from utils.options import OptionGroup, flag, option

DEAD = 0.01
"""Below this share of the cross entropy's gradient a term is nearly dead: the student hardly differs without it."""
DROWNS = 3.0
"""Above so many times the cross entropy's gradient a term drowns it: the labels hardly count any more."""
AGAINST = -0.2
"""Below this cosine a term pulls against the cross entropy: a step that helps the one undoes part of the other."""
PARTS = ("early", "middle", "late")
FIGURES = ("raw", "weighted", "gradient", "cosine")
Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options(OptionGroup):
    """The command line, without the run's folder."""
    batches: int = option(4, "batches to measure now, for a run without records", at_least=1, metavar="N")
    data: str | None = option(None, "root folder of the data set, to measure now (default: that of the run)",
                              metavar="DIR")
    unlabelled: str | None = option(None, "folder of its images without labels, to measure now (default: that of the "
                                          "run)", metavar="DIR")
    teacher_pretrained: str | None = option(None, "the run's teacher, to measure now (default: where the run had it)",
                                            metavar="FILE")
    teacher_scores: str | None = option(None, "folder of the teacher's stored scores, to measure now (default: that of "
                                              "the run)", metavar="DIR")
    log_dir: str | None = option(None, "where the run's log is (default: beside the run, or where it wrote it)",
                                 metavar="DIR")
    no_cuda: bool = option(False, "measure on the CPU although there is a GPU")
    json: str | None = option(None, "write the records and verdicts there too", metavar="FILE")


def settings_of(folder: Path, options: Options) -> Settings:
    """The settings of the run in a folder, with the folders as they are now. UserError for a --log-dir without the
    run's log."""
    settings = read_settings(folder)
    log = find_log(folder, settings)
    log_dir = options.log_dir or (settings.running.log_dir if log is None else str(log.parent))
    settings = replace(settings, running=replace(settings.running, save_dir=str(folder), log_dir=log_dir,
                                                 resume="auto"))
    if options.log_dir is not None and not (wanted := RunFiles(settings).json_log).is_file():
        held = "no log of the run" if wanted.parent.is_dir() else "no such folder"
        raise UserError(f"--log-dir {options.log_dir}: {held}; expected the folder that holds {wanted.name}, the "
                        f"log of the run {folder}")
    return settings


def logged(settings: Settings) -> list[Record]:
    """The diagnoses in the run's log, in the order of their steps; none without a log."""
    path = RunFiles(settings).json_log
    return [r for r in read_log(path) if r["kind"] == "diagnose"] if path.is_file() else []


def restored(settings: Settings, options: Options) -> Run:
    """The run as its training state left it, ready to be measured. Files that only a start needs are not read."""
    files = RunFiles(settings)
    if not files.resume_from:
        raise UserError(f"{files.directory}: nothing to diagnose: no records of --diagnose-every in "
                        f"{files.log_directory} (--log-dir) and no training state {files.state.name}")
    networks = replace(settings.networks, student_pretrained=None, student_pretrained_base=None,
                       teacher_pretrained=options.teacher_pretrained or settings.networks.teacher_pretrained,
                       teacher_scores=options.teacher_scores or settings.networks.teacher_scores)
    data = replace(settings.data, data=options.data or settings.data.data, workers=0,
                   unlabelled=options.unlabelled or settings.data.unlabelled)
    running = replace(settings.running, skip_val=True)
    settings = replace(settings, networks=networks, data=data, running=running,
                       speed=replace(settings.speed, compile=False))
    run = build_run(settings, init_distributed(options.no_cuda))
    resume(run)
    get_ready(run)
    run.model.train()
    return run


def measured(run: Run, batches: int) -> list[Record]:
    """Diagnoses of so many batches in the present state: of the coming steps, or the last ones of a finished run."""
    o = run.settings.optimization
    start = max(min(run.step, o.max_iterations - batches), 0)
    return [{"kind": "diagnose", "step": run.step, "terms": diagnose(run, batch)}
            for batch in build_loader(run, start, min(start + batches, o.max_iterations), o.batch_size)]


def spans(records: Sequence[Record]) -> dict[str, dict[str, dict[str, float | None]]]:
    """{part of the run: {term: {figure: median}}}, with the steps in the part's name. A figure that is never finite is
    None; records of a single step are one part."""
    steps = sorted({r["step"] for r in records})
    names = PARTS if len(steps) >= len(PARTS) else ("early", "late")[-len(steps):]
    bounds = [round(i * len(steps) / len(names)) for i in range(len(names) + 1)]
    result = {}
    for name, a, b in zip(names, bounds, bounds[1:], strict=False):
        first, last = steps[a], steps[b - 1]
        chosen = [r["terms"] for r in records if first <= r["step"] <= last]
        label = f"{name}, step {first}" if first == last else f"{name}, steps {first}-{last}"
        result[label] = {term: {f: _median(x[term][f] for x in chosen if term in x) for f in FIGURES}
                         for term in dict.fromkeys(t for x in chosen for t in x)}
    return result


def _median(values) -> float | None:
    finite = [x for x in values if x is not None]
    return statistics.median(finite) if finite else None


def span_table(parts: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> str:
    """A row for every term in every part of the run."""
    terms = dict.fromkeys(term for values in parts.values() for term in values)
    rows = [[term, part, *(_shown(parts[part][term][f], f) for f in FIGURES)]
            for term in terms for part in parts if term in parts[part]]
    return table(["term", "part of the run", "raw", "weighted", "gradient / task", "cosine"], rows)


def _shown(value: float | None, figure: str) -> str:
    if value is None:
        return "-"
    return format(value, {"cosine": ".2f"}.get(figure, ".3g")) if figure != "gradient" else amount(value)


def amount(share: float) -> str:
    """A share of the cross entropy's gradient: "0.3 %", "35 %", "12 times"."""
    if share > DROWNS:
        return f"{share:.2g} times" if share < 10 else f"{share:.0f} times"
    if 0 < share < 1e-4:
        return "below 0.01 %"
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def state(figures: Mapping[str, float | None]) -> str:
    """What a term does: "unknown", "absent", "dead", "drowns", "against" or "alive", from the thresholds above. One
    that drowns the cross entropy and pulls against it "drowns"."""
    gradient, cosine = figures["gradient"], figures["cosine"]
    if gradient is None or cosine is None:
        return "unknown"
    if gradient == 0:
        return "absent"
    if gradient < DEAD:
        return "dead"
    if gradient > DROWNS:
        return "drowns"
    return "against" if cosine < AGAINST else "alive"


def sentence(term: str, figures: Mapping[str, float | None]) -> str:
    """The state of a term in words and, after a semicolon, what could be done about it."""
    name, weight = state(figures), "--aux-weight" if term == "aux" else flag(f"lambda_{term}")
    if name == "unknown":
        return "cannot be judged: its gradient or the cross entropy's is not finite, or the latter is zero"
    share, cosine = amount(figures["gradient"]), f"cosine {round(figures['cosine'], 1) + 0.0:.1f}"  # no -0.0
    against = ", and pulls against it" if figures["cosine"] < AGAINST else ""
    return {"absent": "dead: no gradient of it reaches the student; check what it compares",
            "dead": f"nearly dead: its gradient is {share} of the cross entropy's; raise {weight} or check what it "
                    "compares",
            "drowns": f"drowns the cross entropy ({share}, {cosine}){against}; lower {weight}",
            "against": f"pulls against the cross entropy ({cosine}, {share}); lower {weight} if the score does not "
                       "gain by it",
            "alive": f"alive ({share}, {cosine})"}[name]


def verdicts(parts: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> dict[str, str]:
    """{term: verdict} of every term but the cross entropy ``task``: of the last part, and of the first one where it is
    known to have been in another state."""
    first, last = next(iter(parts.values())), list(parts.values())[-1]
    result = {}
    for term in last:
        if term == "task":
            continue
        result[term] = sentence(term, last[term])
        if term in first and state(first[term]) not in ("unknown", state(last[term])):
            result[term] += f". Early in the run: {sentence(term, first[term]).split(';')[0]}"
    return result


def report(records: Sequence[Record]) -> str:
    """The table, then a line for every term."""
    parts = spans(records)
    lines = [f"{term}: {text}" for term, text in verdicts(parts).items()]
    return "\n\n".join([span_table(parts), "\n".join(lines or ["only the cross entropy: nothing to compare"])])


def main(argv: list[str] | None = None) -> int:
    """Print the diagnosis of one run. Returns the exit code."""
    parser = ArgumentParser(prog="diagnose.py", description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="RUN", help="folder of the run, its --save-dir")
    parser.add_options(parser, Options)
    given = vars(parser.parse_args(argv))
    options, folder = read_options(given, Options), Path(given["folder"])
    if options.json:
        check_target(Path(options.json), "--json", is_folder=False)
    settings = settings_of(folder, options)
    records, source, is_main = logged(settings), "its log", True
    if not records:
        setup_logging(False)
        run = restored(settings, options)
        records, source, is_main = measured(run, options.batches), "its training state", run.distributed.is_main_process
        del run
    if is_main:
        count = f"{len(records)} record{'s' if len(records) > 1 else ''}"
        print(f"{folder}: {count} from {source}\n\n{report(records)}")
        if options.json:
            write_json(Path(options.json), {"run": str(folder), "source": source, "records": records,
                                            "parts": spans(records), "verdicts": verdicts(spans(records))})
    cleanup()
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
