"""What the methods that compare logits have in common: checks, and labels at logit size."""
from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from losses.distiller import BuildContext, Distiller, check_taps
from utils.errors import UserError


def check_logit_maps(method: str, student: Tensor, teacher: Tensor) -> None:
    """Raise UserError unless both logit maps [B, K, h, w] have the same shape."""
    if student.shape != teacher.shape:
        raise UserError(f"{method}: the logits of student {tuple(student.shape)} and teacher {tuple(teacher.shape)} "
                        "must have the same shape (classes and output stride)")


def check_logit_nets(method: type[Distiller], context: BuildContext, least_classes: int = 1) -> None:
    """Raise UserError unless both networks give logits of the same classes, at least so many, at the same stride."""
    check_taps(method, context.student, context.teacher)
    student, teacher = context.student, context.teacher
    for what, ours, theirs in (("logits", student.channels["logits"], teacher.channels["logits"]),
                               ("output stride", student.stride, teacher.stride)):
        if ours != theirs:
            raise UserError(f"method {method.method!r}: {what} {ours} of the student {student.name} and {theirs} of "
                            f"the teacher {teacher.name}: expected equal numbers")
    if student.channels["logits"] < least_classes:
        raise UserError(f"method {method.method!r} needs at least {least_classes} classes, the data set has "
                        f"{student.channels['logits']}")


def labels_at(target: Tensor, size: tuple[int, int]) -> Tensor:
    """int64 labels [B, H, W] at another size (h, w): of the nearest pixel, as an image resize in mode nearest."""
    # float32 holds every label exactly; integer images cannot be resized on every device
    return F.interpolate(target[:, None].float(), size=tuple(size), mode="nearest")[:, 0].long()
