"""The full training state: written atomically, read as tensors and plain values only, and taken up again."""
from __future__ import annotations

import platform
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dataset as data
from engine.log import LOG
from engine.nonfinite import check_finite, last_good_state
from engine.optimizer import load_optimizer
from engine.recipe import without_recipe
from engine.run import Run
from engine.run_files import changed, plain
from engine.settings import Settings
from engine.sources import differing
from models.preprocess import Preprocess
from models.weights import check_values, describe, save_state_dict
from utils.distributed import same_everywhere
from utils.errors import UserError
from utils.module_state import weights_digest
from utils.tensor_files import first_line, in_plain_order, load_tensors, save_tensors

FORMAT = 1
#: folders: only whether there is one makes a difference; what they hold is compared by fingerprints and checksums, and
#: how scores are stored by ``stored_scores``
OF_PRESENCE = ("unlabelled", "teacher_scores")
#: settings that may differ between a run and its continuation without changing the result
FREE_TO_CHANGE = frozenset((
    "resume", "workers", "data", *OF_PRESENCE, "cache", "save_dir", "log_dir", "log_iter", "save_per_iters",
    "val_per_iters", "diagnose_every", "skip_nonfinite", "timeout", "skip_val", "results", "protocol", "label", "name",
    "tensorboard", "tracker", "tracker_project", "panels", "local_rank", "no_cuda", "teacher_pretrained",
    "teacher_pretrained_base", "student_pretrained", "student_pretrained_base", "teacher_classes"))


#: settings that say where a run ends: it may end where it is
LENGTH = frozenset(("max_iterations", "epochs"))


def versions() -> dict[str, str]:
    """Versions that a result depends on, for the checkpoint and the saved configuration."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}


def save_run(run: Run) -> None:
    """Write the student's weights and the training state, on the main process; the state before is kept. UserError when
    a weight is not finite or another run has taken the folder (nothing is written then), or the files cannot be
    written."""
    check_finite(run)
    if not run.distributed.is_main_process:
        return
    run.check_lock()
    try:
        save_state_dict(run.student, run.files.student)
        save_state(run, keep=run.files.previous_state)
    except UserError as error:
        run.check_lock()  # if it is that, nothing of this folder is this run's
        raise UserError(f"{error}; {last_good_state(run.files.states())}") from error


def save_state(run: Run, keep: Path | None = None) -> None:
    """Write the training state alone, on the main process. keep: what the state that was there becomes. UserError when
    another run has taken the folder."""
    if not run.distributed.is_main_process:
        return
    run.check_lock()
    if run.logger is not None:  # a state is never ahead of the log
        run.logger.sync()
    save_tensors(run.files.state, in_plain_order({
        "format": FORMAT, "versions": versions(), "model": run.student.state_dict(), "net_info": describe(run.student),
        "distillers": run.objective.distillers.state_dict(), "optimizer": run.optimizer.state_dict(),
        "scaler": run.step_fn.scaler.state_dict(), "step": run.step, "best": run.best,
        "best_weights": run.best_weights, "window": run.clock.held(),
        # without a validation set, none is missing
        "validated": run.step if run.val_set is None else run.validated, "config": plain(run.settings),
        "processes": run.distributed.world_size, "skipped": run.step_fn.skipped,
        "changed": run.changed, "contents": run.contents, "sources": run.sources, "revisions": run.revisions}), keep)


def load_state(path: Path) -> dict[str, Any]:
    """Read a training state written by :func:`save_run`. Raises :class:`UserError` for anything else."""
    if not path.is_file():
        found = "this is a folder" if path.is_dir() else "no such file"
        raise UserError(f"--resume {path}: {found} (expected a training state '*_state.pth', or 'auto')")
    state = load_tensors(path, "training state", ["resume"])
    if not isinstance(state, dict) or state.get("format") != FORMAT or "optimizer" not in state:
        raise UserError(f"--resume {path}: not a training state of this program (a plain weights file goes to "
                        "--student-pretrained)")
    return state


def newest_state(paths: Sequence[Path]) -> tuple[Path, dict[str, Any], bool]:
    """(path, content) of the first of the training states that can be read, and whether one before it cannot, which is
    told in a line. UserError that names every one when none can."""
    faults = []
    for path in paths:
        try:
            state = load_state(path)
        except UserError as error:
            faults.append(error)
            continue
        if faults:
            LOG.warning("%s: going on from the one before it", faults[0])
        return path, state, bool(faults)
    raise faults[0] if len(faults) == 1 else UserError(
        f"{faults[0]}; nor can the one before it be read: {faults[1]}; without --resume the run starts anew")


def resume(run: Run, *, trains: bool = False) -> bool:
    """Take up the training state that ``--resume`` means; False when there is none to take up.

    trains: the run goes on and is written down. UserError then for other settings where no step is left to be made with
    them: they would stand in the files of a run that has not used them."""
    if not run.files.resume_from:
        return False
    path, state, damaged = newest_state(run.files.resume_from)
    try:
        check_state(run, path, state)
        run.student.load_state_dict(state["model"])
        run.objective.distillers.load_state_dict(state["distillers"])
        load_optimizer(run.optimizer, state["optimizer"])
        if state.get("scaler"):  # only --amp fp16 has one
            run.step_fn.scaler.load_state_dict(state["scaler"])
        preprocess = Preprocess.from_dict(state["net_info"]["preprocess"])
        if run.settings.networks.student_preprocess is None:  # what its weights said may not be here any more
            run.student.preprocess = preprocess
        run.step, best = int(state["step"]), float(state["best"])
        run.step_fn.skipped = int(state.get("skipped", 0))
        run.validated = int(state.get("validated", run.step))  # earlier programs validated first
        run.clock.take_up(state.get("window", {"steps": None}))  # none of earlier programs
        stage_options = {name for d in run.objective.distillers.values() for name in d.stage_options}
        held = {"student_preprocess": str(preprocess), **state.get("contents", {})}  # none of earlier programs
        holds = {"student_preprocess": str(run.student.preprocess), **run.contents}
        changes = changed_settings(state["config"], run.settings, held, holds, stage_options)
        other_data = changed_data(state["net_info"].get("trained_on"), run.student.trained_on)
        earlier = list(state.get("changed", ()))
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--resume {path}: the state is of another model or method than the one asked for "
                        f"({first_line(error)})") from error
    if not same_everywhere(run.step, run.distributed.device):
        raise UserError(f"--resume {path}: the processes found different states; --save-dir has to be one folder "
                        "that all machines share")
    if trains:
        check_finished(run, path, changes)
    processes = state.get("processes", run.distributed.world_size)
    if processes != run.distributed.world_size and not is_finished(run):
        changes["processes"] = processes, run.distributed.world_size
    before = state.get("sources", {})  # none of earlier programs
    if is_finished(run) and before:
        run.sources = before  # the code of now makes no step
    other_code = differing(before, run.sources)
    run.changed = earlier + [{"step": run.step, "setting": name, "before": then, "after": now}
                             for name, (then, now) in (changes | other_code).items()]
    run.revisions = list(state.get("revisions", ()))  # none of earlier programs
    if damaged and run.lock is not None:  # not while others may be writing
        run.files.set_damaged_aside()
    if path.parent.resolve() == run.files.directory.resolve() and has_best(run, state.get("best_weights"), trains):
        run.best, run.best_weights = best, state.get("best_weights")
    why = "no step is left to be made with it" if is_finished(run) else \
        "the continuation will differ from an uninterrupted run"
    for change in [*(changed(name, *values) for name, values in changes.items()), *other_data]:
        LOG.warning("--resume: %s (%s)", change, why)
    for name, values in other_code.items():
        LOG.warning("--resume: %s (the continuation may differ from an uninterrupted run)", changed(name, *values))
    best = f", best mIoU {100 * run.best:.2f}" if run.best >= 0 else ""
    LOG.info("resumed from %s at step %d%s", path, run.step, best)
    return True


def has_best(run: Run, expected: str | None, trains: bool) -> bool:
    """Whether the best model so far is in the folder; if it is the state itself, it is written there.

    expected: digest of its weights; None in a state of an earlier version, of which any file is taken for it. A run
    that goes back to an older state finds the best model of what came after. So does one that was killed between its
    next best model and the state: these weights are validated again first, and kept, since nothing is to be exceeded.
    """
    if expected is None:
        return run.files.best.is_file()
    found = weights_in(run.files.best)
    if found == expected:
        return True
    now = weights_digest(run.student.state_dict())
    if expected == now:
        if trains and run.distributed.is_main_process:
            run.check_lock()
            save_state_dict(run.student, run.files.best)
        return True
    if run.files.best.is_file() and found != now:
        LOG.warning("--resume: %s is not the best model of this state, which is lost: that of the validations to come "
                    "will be", run.files.best)
    return False


def weights_in(path: Path) -> str | None:
    """The digest of the weights in a file; None when there is none that can be read."""
    try:
        return weights_digest(load_tensors(path, "weights file"))
    except (UserError, AttributeError, TypeError):  # the latter: of what are no weights
        return None


def check_state(run: Run, path: Path, state: dict[str, Any]) -> None:
    """UserError for a state beyond the end of the run, and for weights that no network can have."""
    last = run.settings.optimization.max_iterations
    if state["step"] > last:
        raise UserError(f"--resume {path}: it is at step {state['step']}, the run ends at --max-iterations {last}")
    own = run.student.state_dict()
    for name in own.keys() & state["model"].keys():
        check_values(f"--resume {path}", name, state["model"][name], own[name])


def is_finished(run: Run) -> bool:
    """Whether no step is left to be made."""
    return run.step == run.settings.optimization.max_iterations


def check_finished(run: Run, path: Path, changes: Mapping[str, tuple[object, object]]) -> None:
    """UserError for other settings than those of the state, {name: (old, new)}, when no step is left."""
    if is_finished(run) and not changes.keys() <= LENGTH:
        raise UserError(f"--resume {path}: the run is finished, at step {run.step}, with other settings: "
                        f"{'; '.join(changed(name, *values) for name, values in changes.items())}; expected the same, "
                        "or a new run: without --resume, in another --save-dir")


def changed_data(before: dict[str, Any] | None, now: dict[str, Any] | None) -> list[str]:
    """What differs between the data of a saved run and those of now, as one text; before: None in older states, now:
    None on processes that do not tell it."""
    found = data.changes(before, now) if before and now else []
    return [f"other data: {'; '.join(found)}"] if found else []


def changed_settings(saved: dict, settings: Settings, held: Mapping[str, object], holds: Mapping[str, object],
                     finished: Collection[str] = ()) -> dict[str, tuple[object, object]]:
    """{name: (old, new)} of every setting that matters and differs from the saved run.

    held, holds: {setting: what the file that it names held then, or holds now}, which counts in the place of the name.
    finished: settings of a stage that a resumed run does not repeat.
    """
    known = held.keys() & holds.keys()
    now = {**plain(settings), **{k: holds[k] for k in known}}
    saved = {**without_recipe(), **saved, **{k: held[k] for k in known}}
    free = FREE_TO_CHANGE - known - {k for k in OF_PRESENCE if (saved[k] is None) != (now[k] is None)}
    return {k: (saved[k], now[k]) for k in now
            if k in saved and saved[k] != now[k] and k not in free and k not in finished}
