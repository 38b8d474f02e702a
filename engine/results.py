"""The result of a run: one small JSON file, made of the run's own log, that reports are built from.

``--results DIR --protocol NAME`` writes ``DIR/<protocol>/<data set>/<teacher>-<student>/<label>/<seed>.json`` when the
run has ended. Nothing in it is written by hand.
"""
from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from engine.log import LOG, log_lines
from engine.options import Data, Distillation, Networks, Optimization, Running, Speed
from engine.recipe import Recipe, without_recipe
from engine.run import Run
from engine.run_files import RunFiles, changed, plain
from engine.settings import Settings, default_settings
from engine.sources import is_own_code
from models import network_name
from utils.errors import UserError
from utils.files import sha256, write_json
from utils.machine import machine

FORMAT = 1
#: points that a curve of a loss term keeps
POINTS = 60
#: what every result has
PARTS = {**dict.fromkeys(("protocol", "dataset", "method", "label"), str), "seed": int, "iterations": int,
         "teacher": (dict, type(None)), "classes": list, "curve": list, **dict.fromkeys((
             "student", "seconds", "losses", "scores", "settings", "revision", "hardware", "weights"), dict)}
REMEDY = "remove it to have the run made again"
SCORES = ("mIoU", "mIoU_present", "pixAcc", "mAcc")
#: settings that change no figure but time and memory, or say where things lie
UNIMPORTANT = frozenset((
    "resume", "workers", "data", "cache", "save_dir", "log_dir", "log_iter", "save_per_iters", "diagnose_every",
    "timeout", "results", "protocol", "label", "name", "tensorboard", "tracker", "tracker_project", "panels",
    "local_rank", "no_cuda", "fast", "channels_last", "teacher_classes"))
#: settings that the network, weight files, or stored scores say where they are left open
LEFT_OPEN = frozenset(("aux", "student_head_width", "teacher_head_width", "stored_scores"))
#: files and folders, of which the name counts, not where they lie
FILES = frozenset(("data", "teacher_pretrained", "teacher_pretrained_base", "student_pretrained",
                   "student_pretrained_base", "train_list", "val_list", "class_weights", "unlabelled",
                   "teacher_scores"))


#: settings that runs share where they are compared, with the defaults for results that are older than they are. More
#: validations mean more models to choose from.
SHARED = {name: default for group in (Networks, Data, Optimization, Recipe, Speed)
          for name, default in asdict(group()).items()
          if name not in UNIMPORTANT | {"seed", "epochs", "scale_weights", "class_map", "stored_scores", "student_taps"}
          and not name.startswith("teacher_")}
SHARED |= {"val_per_iters": Running().val_per_iters, "group_size": Distillation().group_size}
#: data sets whose folder says which images they are
FOLDERS = frozenset(("folder", "toy_streets"))


def unimportant(dataset: str) -> frozenset[str]:
    """:data:`UNIMPORTANT` on a data set."""
    return UNIMPORTANT - {"data"} if dataset in FOLDERS else UNIMPORTANT


def shared_settings(dataset: str) -> dict[str, Any]:
    """:data:`SHARED` on a data set."""
    return SHARED if "data" in unimportant(dataset) else {**SHARED, "data": None}


def result_path(settings: Settings) -> Path:
    """Where the result of a run with these settings goes. The teacher's part is 'none' when nothing reads one."""
    n, r = settings.networks, settings.running
    teacher = network_name(n.teacher_model, n.teacher_backbone) if settings.needs_teacher else "none"
    pair = f"{teacher}-{network_name(n.student_model, n.student_backbone)}"
    label = r.label or settings.distillation.method or "afdcd"
    return Path(r.results) / r.protocol / settings.data.dataset / pair / label / f"{settings.optimization.seed}.json"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a run's JSON lines that can be read (:func:`engine.log.log_lines`)."""
    return [record for _, record in log_lines(path)]


def digest(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a log says of a run: time, speed, memory, curves, scores.

    ``scores`` are fractions with the IoU of every class: of the best model on the split that chose it and on those that
    are only reported; ``last``: of the weights after the last iteration, on the split that chooses.
    """
    train = [r for r in records if r["kind"] == "train"]
    val = [r for r in records if r["kind"] == "val"]
    stages = [r for r in records if r["kind"] == "stages"]  # before the first iteration
    best = best_validation(val)
    chosen = {best["split"]: _scores(best)} if best else {}
    reported = {r["split"]: _scores(r) for r in records if r["kind"] == "report"}
    loads = [r["load"] for r in train if r["load"] is not None]
    others = [r["others_mb"] for r in train if r.get("others_mb") is not None]
    return {
        "seconds": {"stages": round(sum(r["seconds"] for r in stages), 2),
                    "stages_cpu": round(sum(r["cpu_seconds"] for r in stages), 2),
                    "training": round(sum(r["seconds"] for r in train), 2),
                    "training_cpu": round(sum(r["cpu_seconds"] for r in train), 2),
                    "validation": round(sum(r["seconds"] for r in val), 2)},
        "images_per_second": round(statistics.median(r["images_per_second"] for r in train), 3) if train else None,
        "peak_memory_mb": max((r["memory_mb"] for r in train), default=None),
        "load": statistics.median(loads) if loads else None,
        "others_mb": statistics.median(others) if others else None,
        "curve": [{"step": r["step"], **{k: round(r[k], 6) for k in SCORES}} for r in val],
        "losses": _losses(train),
        "diagnoses": [{key: r[key] for key in ("step", "terms")} for r in records if r["kind"] == "diagnose"],
        "best_step": best["step"] if best else None,
        "scores": {**chosen, **reported}, "last": _scores(val[-1]) if val else None}


def best_validation(validations: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The record of the best model: the last that says so, since one before it can have got lost when a run went back
    to an older state; of the logs of earlier versions the best score."""
    kept = [record for record in validations if record.get("best")]
    return kept[-1] if kept else max(validations, key=lambda record: record["mIoU"], default=None)


def _scores(record: Mapping[str, Any]) -> dict[str, Any]:
    return {**{k: record[k] for k in SCORES}, "iou_per_class": record["iou_per_class"]}


def _losses(train: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over at most POINTS spans of the run: of the loss, of every term raw and weighted, and of what else methods
    log."""
    bounds = sorted({round(i * len(train) / POINTS) for i in range(POINTS + 1)})
    spans = [train[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]

    def means(values: Iterable[Iterable[float]]) -> list[float]:
        return [float(f"{statistics.fmean(span):.5g}") for span in values]

    terms = train[-1]["raw"] if train else {}
    others = [name for name in (train[-1].get("diagnostics", {}) if train else {})
              if all(r.get("diagnostics", {}).get(name) is not None for r in train)]
    return {"step": [span[-1]["step"] for span in spans], "loss": means([r["loss"] for r in s] for s in spans),
            "raw": {t: means([r["raw"][t] for r in s] for s in spans) for t in terms},
            "weighted": {t: means([r["weighted"][t] for r in s] for s in spans) for t in terms},
            "diagnostics": {d: means([r["diagnostics"][d] for r in s] for s in spans) for d in others}}


def build_result(run: Run, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that the file of a run holds."""
    settings, files = run.settings, run.files
    n, r = settings.networks, settings.running
    teacher = None
    if settings.needs_teacher:
        source = Path(n.teacher_pretrained).expanduser()
        teacher = _network(n, "teacher") | {"sha256": sha256(source) if source.is_file() else None}
    config = json.loads(files.config.read_text(encoding="utf-8"))
    *earlier, last = run.revisions
    return {
        "format": FORMAT, "protocol": r.protocol, "dataset": settings.data.dataset, "teacher": teacher,
        "student": _network(n, "student") | {"parameters": sum(p.numel() for p in run.student.parameters())},
        "method": settings.distillation.method or "afdcd", "label": result_path(settings).parent.name,
        "seed": settings.optimization.seed, "iterations": run.step, "active": settings.active,
        "classes": list(run.spec.classes), **digest(records), "command": config["command"],
        "settings": plain(settings), "revision": last, "sources": config.get("sources", {}),
        "versions": config["versions"],
        "hardware": machine(run.distributed.device.type) | {
            "processes": run.distributed.world_size, "threads": torch.get_num_threads()},
        "weights": _hashes(files), "trained_on": run.student.trained_on,
        **({"changed": run.changed} if run.changed else {}),
        **({"earlier_revisions": earlier} if earlier else {})}


def _network(networks: Networks, role: str) -> dict[str, str]:
    return {key: getattr(networks, f"{role}_{key}") for key in ("model", "backbone")}


def _hashes(files: RunFiles) -> dict[str, str]:
    """SHA-256 of the weights that the run leaves."""
    return {name: sha256(path) for name, path in (("last", files.student), ("best", files.best)) if path.is_file()}


def check_result_target(settings: Settings) -> None:
    """UserError when the file that ``--results`` means holds the result of other settings: it is not overwritten."""
    if settings.running.results is None or not (path := result_path(settings)).exists():
        return
    if changes := differences(read_result(path)["settings"], plain(settings)):
        raise UserError(f"--results: {path} is of a run with other settings ({'; '.join(changes)}): choose another "
                        "--label or --protocol, or remove it")


def check_log(run: Run) -> None:
    """UserError where ``--results`` asks for a result of a resumed run whose log does not tell of all its iterations
    so far: times and curves would be those of a part of it. Logs of earlier versions do not say."""
    if run.settings.running.results is None or not run.distributed.is_main_process:
        return
    path, is_kept = run.files.json_log, run.files.goes_on_here
    records = read_log(path) if is_kept and path.is_file() else []
    told = [r.get("steps") for r in records if r.get("kind") == "train" and r.get("step", 0) <= run.step]
    told.append(run.clock.held()["steps"])
    if None in told or sum(told) == run.step:
        return
    before = run.files.previous_state
    ways = ["go on without --results", "start anew, without --resume"]
    if before in run.files.resume_from[1:]:
        ways.insert(0, f"go on from the state before it, if the log reaches as far (--resume {before})")
    raise UserError(f"--results: the log {path} tells of {sum(told)} of the run's {run.step} iterations so far, so the "
                    f"result would be wrong: put the whole log back, {', or '.join(ways)}")


def write_result(run: Run) -> None:
    """Write the result of a run that has ended, on the main process, where ``--results`` asks for one."""
    if run.settings.running.results is None or not run.distributed.is_main_process:
        return
    path = result_path(run.settings)
    try:
        result = build_result(run, read_log(run.files.json_log))
    except KeyError as error:  # begun by a version of this program that wrote down less
        LOG.warning("no result is written: the run's log lacks %s", error)
        return
    write_json(path, result, indent=None)
    LOG.info("result: %s", path)


def add_weights(path: Path, name: str, file: Path) -> None:
    """Write down in a result one more file that was made of the run's weights, so that runs which learn from it are
    known to learn from this training."""
    result = read_result(path)
    result["weights"][name] = sha256(file)
    write_json(path, result, indent=None)


def read_result(path: Path) -> dict[str, Any]:
    """One result file; UserError when it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a result that can be read ({error}): {REMEDY}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: expected a result of format {FORMAT}, as train_kd.py --results writes it: {REMEDY}")
    if bad := [key for key, kind in PARTS.items() if not isinstance(content.get(key, ...), kind)]:
        raise UserError(f"{path}: no whole result, {', '.join(bad)} missing or of another kind: {REMEDY}")
    # the first ones were written before stages were timed; none of them had any
    content["seconds"] = {"stages": 0.0, "stages_cpu": 0.0, **content["seconds"]}
    return content


def revisions(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those that a run was trained with, in order: more than one where it was resumed with another."""
    return [*result.get("earlier_revisions", ()), result["revision"]]


def uncommitted(result: Mapping[str, Any]) -> dict[str, str]:
    """{file: SHA-256} of the run's own code that its revision does not tell: changed, or from elsewhere."""
    files = result.get("sources", {})
    told = result["revision"]["commit"] is not None and not result["revision"]["changed"]
    return {name: digest for name, digest in files.items() if not (told and is_own_code(name))}


def folder_of_images(settings: Mapping[str, Any]) -> str | None:
    """The name of the folder that decides which images a run is scored on; None for a published data set."""
    return Path(settings["data"]).name if settings["dataset"] in FOLDERS else None


def read_results(folder: Path, protocol: str | None = None) -> list[dict[str, Any]]:
    """Every result below a folder, of one protocol or of all, in the order of their paths."""
    root = folder / protocol if protocol else folder
    return [read_result(path) for path in sorted(root.glob("**/*.json"))]


def differences(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """'setting: made -> wanted' for everything that a figure depends on."""

    def value(settings: Mapping[str, Any], key: str) -> Any:
        return Path(settings[key]).name if key in FILES and settings[key] else settings[key]

    made = {**plain(default_settings()), **without_recipe(), **made}
    left_open = {key for key in LEFT_OPEN if wanted.get(key) is None}
    return [changed(key, value(made, key), value(wanted, key))
            for key in sorted(made.keys() & wanted.keys() - unimportant(wanted["dataset"]) - left_open)
            if value(made, key) != value(wanted, key)]
