"""What happens to the networks between the stages before training, which need them as they are, and the first step."""
from __future__ import annotations

import torch

from dataset import EvalSampler, collate
from engine.build import run_facts
from engine.predict import predict_classes
from engine.run import Run
from losses.core.facts import NetInfo
from losses.core.objective import taps_of_teacher
from models.class_map import MappedTeacher, for_predictions
from models.prepare import PreparedTeacher, StoredTeacher
from utils.errors import UserError
from utils.tensor_files import first_line


def get_ready(run: Run) -> None:
    """Prepare the teacher, and compile both networks where that was asked for. Raises UserError without a compiler."""
    speed = run.settings.speed
    if run.teacher is not None:
        predict_panels(run)
        run.teacher = run.step_fn.teacher = ready_teacher(run)
    if speed.compile:
        check_compiler(run.distributed.device)
        run.step_fn.counts_flops = False
        # functions, not modules: a compiled module would stand in the names of the weights
        run.objective.run_student = torch.compile(run.objective.run_student)
        if run.teacher is not None:
            run.step_fn.teacher = torch.compile(run.teacher.forward)


def ready_teacher(run: Run) -> PreparedTeacher | MappedTeacher | StoredTeacher:
    """What stands for the teacher in a step: itself, with what the step needs, or its stored scores."""
    speed = run.settings.speed
    if run.train_set is not None and run.train_set.scores is not None:
        return StoredTeacher(run.teacher, run.train_set.scores.taps)
    # a half that the losses are not used to (outside of autocast, a convolution refuses it) goes no further
    output_dtype = None if speed.amp_dtype or not speed.teacher_dtype else torch.get_default_dtype()
    mapped, taps = isinstance(run.teacher, MappedTeacher), teacher_taps(run)
    prepared = PreparedTeacher(run.teacher.net if mapped else run.teacher, taps, speed.teacher_dtype, output_dtype,
                               speed.fast).eval()
    if not mapped:
        return prepared
    run.teacher.net = prepared
    return run.teacher


@torch.no_grad()
def predict_panels(run: Run) -> None:
    """Ask the teacher, while it has all its parts, for the classes of the validation images that the main process is
    going to draw."""
    running = run.settings.running
    if run.val_set is None or not run.distributed.is_main_process or not running.tensorboard:
        return
    teacher = for_predictions(run.teacher)
    for index in list(EvalSampler(len(run.val_set), 0, run.distributed.world_size))[:running.panels]:
        batch = collate([run.val_set[index]])
        image, valid = (batch[name].to(run.distributed.device) for name in ("image", "valid"))
        classes = predict_classes(teacher, image, valid, size=batch["label"].shape[-2:])
        run.teacher_predictions[index] = classes[0].cpu().long()


def teacher_taps(run: Run) -> set[str]:
    """What the teacher has to put out: what methods read under --fast, otherwise everything."""
    if not run.settings.speed.fast:
        return set(run.teacher.channels)
    student, teacher = NetInfo.of(run.student), NetInfo.of(run.teacher)
    return taps_of_teacher(run.settings.method_options, run_facts(run.settings, student.num_class), student, teacher)


def check_compiler(device: torch.device) -> None:
    """Raise UserError unless torch.compile works on the device."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # a missing compiler shows in many ways
        needed = "Triton" if device.type == "cuda" else "a C++ compiler such as g++"
        raise UserError(f"--compile: torch.compile does not work here, it needs {needed} "
                        f"({first_line(error)})") from error
