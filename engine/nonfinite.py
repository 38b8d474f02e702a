"""A loss, gradient or weight that is not finite: which step, term and samples, what is still good, and a file with
which ``tools/replay.py`` runs that step again."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import dataset as data
from engine.log import LOG
from engine.run import Run, build_sampler
from engine.run_files import plain
from engine.step import WEIGHTS, Fault, StepResult
from utils.distributed import gathered
from utils.errors import UserError
from utils.files import sha256
from utils.tensor_files import in_plain_order, load_tensors, save_tensors

if TYPE_CHECKING:
    from engine.journal import Journal

FORMAT = "afdcd replay 1"
SHOWN = 8  # samples in a message


def check_finite(run: Run) -> None:
    """UserError when something was not finite since the last call, or a weight is not now. All processes have to call
    it. Costs a synchronization."""
    if fault := run.step_fn.find_fault():
        raise failure(run, fault)


def check_step(run: Run, result: StepResult, journal: Journal) -> None:
    """Write down a step that was skipped; UserError when it is one too many. All processes have to call it."""
    if result.fault is None:
        return
    allowed = run.settings.running.skip_nonfinite
    if run.step_fn.skipped > allowed:
        raise failure(run, result.fault)
    names = gathered([name for _, name in samples(run, result.fault)])[result.fault.rank]
    LOG.warning("%s: skipped, %d of at most %d (--skip-nonfinite); %s", result.fault, run.step_fn.skipped, allowed,
                told(result.fault.rank, run.distributed.world_size, names))
    if journal.logger is not None:
        journal.logger.record("skipped", run.step, what=list(result.fault.what), process=result.fault.rank,
                              samples=names)


def failure(run: Run, fault: Fault) -> UserError:
    """The error of a run that ends, the same in all processes; the one that saw the fault writes the replay bundle."""
    said = ""
    if fault.rank == run.distributed.rank:
        keys = samples(run, fault)
        path = run.files.replay
        try:
            run.check_lock()
            save_tensors(path, in_plain_order(bundle(run, fault, keys)))
            replay = f"tools/replay.py {path} runs that step again"
        except UserError as error:
            replay = f"no replay bundle ({error})"
        advice = "try a lower --lr or --lambda-*"
        if fault.what != (WEIGHTS,) and not run.step_fn.may_skip:
            advice += ", or --skip-nonfinite for single bad steps"
        said = (f"{fault} in {told(fault.rank, run.distributed.world_size, [f'{i} {name}' for i, name in keys])}; "
                f"{last_good_state(run.files.states())}; {replay}; {advice}")
    return UserError(gathered(said)[fault.rank])


def samples(run: Run, fault: Fault) -> list[tuple[int, str]]:
    """(index in the training set, name) of this process's images in the step of a fault."""
    known = run.training_images.samples
    return [(index, known[index].name) for index, _ in keys_of(run, fault.step)]


def keys_of(run: Run, step: int) -> list[tuple[int, int]]:
    """(index in the training set, ordinal) of this process's images in a step."""
    o = run.settings.optimization
    return next(iter(build_sampler(run, step, o.max_iterations, o.batch_size)))


def told(rank: int, processes: int, names: Sequence[str]) -> str:
    """Process and samples, in a few words."""
    shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    return f"process {rank} of {processes}, images {shown}"


def last_good_state(states: Sequence[Path]) -> str:
    """Which of the states in the folder of a run is good, in a few words."""
    for path in states:
        try:
            return f"the last good state is {path}, step {int(load_tensors(path, 'training state')['step'])}"
        except (UserError, KeyError, TypeError, ValueError):
            continue
    return "no good state has been saved yet"


def bundle(run: Run, fault: Fault, keys: Sequence[tuple[int, str]]) -> dict[str, Any]:
    """All that the step of a fault depends on. The batch is made again; of the teacher, the file and its checksum."""
    batch = data.collate([run.training_images[key] for key in keys_of(run, fault.step)])
    teacher = Path(run.settings.networks.teacher_pretrained or "").expanduser() if run.teacher is not None else None
    scaler = run.step_fn.scaler
    return {
        "format": FORMAT, "torch": str(torch.__version__), "config": plain(run.settings), "step": fault.step,
        "what": list(fault.what), "rank": fault.rank, "processes": run.distributed.world_size,
        "unlabelled": run.objective.images_without_labels * run.step_fn.parts,
        # weights do not change after the fault; running statistics and what methods hold do, until it is found
        "seen_since": 0 if fault.exact else run.step - fault.step, "classes": list(run.spec.classes),
        "preprocess": run.student.preprocess.to_dict(), "scale": scaler.get_scale() if scaler.is_enabled() else 1.0,
        "model": run.student.state_dict(), "distillers": run.objective.distillers.state_dict(),
        "teacher": {"file": str(teacher), "sha256": sha256(teacher)} if teacher and teacher.is_file() else None,
        # channels of the taps in the batch's scores; none are stored for a teacher that is asked itself
        "stored": dict(run.teacher.channels) if "scores" in batch else None,
        "batch": {**batch, "name": [name for _, name in keys]}}
