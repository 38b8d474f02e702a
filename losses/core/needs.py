"""What a method needs of the two networks and of the crop, stated as data and checked in one place."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from losses.core.facts import NetInfo
from utils.errors import UserError


@dataclass(frozen=True)
class Needs:
    """Requirements of a method, checked before it is built.

    student, teacher: fields of ``SegOutput`` that it reads; without any of the teacher it needs none. same_stride,
    same_classes: it compares maps position by position, class by class; where the strides of a map differ, the
    student's is resized to the teacher's, see :func:`taps_to_resize`. least_classes: of the data set. smallest_map:
    (height, width); why: the reason, in a few words. settings, tap_settings: those that change the map, the taps."""
    student: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()
    same_stride: bool = False
    same_classes: bool = False
    least_classes: int = 1
    smallest_map: tuple[int, int] = (1, 1)
    why: str = ""
    settings: tuple[str, ...] = ()
    tap_settings: tuple[str, ...] = ()

    @classmethod
    def both(cls, *taps: str, **more) -> Needs:
        """The same taps of either network."""
        return cls(student=taps, teacher=taps, **more)


def check_needs(method: str, needs: Needs, student: NetInfo, teacher: NetInfo | None,
                crop_size: tuple[int, int], weights: Iterable[str] = ()) -> None:
    """Raise UserError, naming method, network and what was expected, unless the requirements are met. weights: the
    settings without which the method would not be used."""
    for role, taps, net in (("student", needs.student, student), ("teacher", needs.teacher, teacher)):
        if taps and net is None:
            raise UserError(f"method {method!r} needs a {role}: it reads {', '.join(taps)} of it, but there is none")
        if missing := [tap for tap in taps if tap not in net.channels]:
            more_taps = ("list_taps", f"{role}_taps") if net.takes_taps else ()
            raise UserError(f"method {method!r} needs {', '.join(missing)} of the {role}, but {net.name} offers only "
                            f"{', '.join(net.channels)}", settings=[*more_taps, *needs.tap_settings])
    if needs.teacher and needs.same_classes:
        _check_equal(method, "logits", student, student.channels["logits"], teacher, teacher.channels["logits"])
    if student.num_class < needs.least_classes:
        raise UserError(f"method {method!r} needs at least {needs.least_classes} classes, the data set has "
                        f"{student.num_class}")
    stride = max((student.stride_of(tap) for tap in needs.student), default=student.stride)
    size = tuple(-(-side // stride) for side in crop_size)
    height, width = needs.smallest_map
    if size[0] < height or size[1] < width:
        why = f" ({needs.why})" if needs.why else ""
        raise UserError(f"method {method!r} needs maps of {height}x{width} or more{why}, but crops of {crop_size[0]}x"
                        f"{crop_size[1]} give {size[0]}x{size[1]}: use crops of {height * stride}x"
                        f"{width * stride} or more, or leave the method out with weights of 0",
                        settings=["crop_size", *needs.settings, *weights])


def taps_to_resize(needs: Needs, student: NetInfo, teacher: NetInfo | None) -> tuple[str, ...]:
    """The maps of the student that a method gets resized, bilinearly with corners aligned, to the size of the
    teacher's: those that it compares position by position and whose strides differ."""
    if teacher is None or not (needs.same_stride or needs.same_classes):
        return ()
    return tuple(tap for tap in needs.student
                 if tap in needs.teacher and student.stride_of(tap) != teacher.stride_of(tap))


def _check_equal(method: str, what: str, student: NetInfo, of_student: int, teacher: NetInfo, of_teacher: int) -> None:
    if of_student != of_teacher:
        raise UserError(f"method {method!r}: {what} {of_student} of the student {student.name} and {of_teacher} of the "
                        f"teacher {teacher.name}: expected equal numbers")


def both_have_aux(student: NetInfo, teacher: NetInfo | None) -> bool:
    """Whether both networks have an auxiliary head: for methods that read it where they can."""
    return teacher is not None and "aux" in student.channels and "aux" in teacher.channels
