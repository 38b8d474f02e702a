"""What a method needs of the two networks and of the crop, stated as data and checked in one place."""
from __future__ import annotations

from dataclasses import dataclass

from losses.core.facts import NetInfo
from utils.errors import UserError


@dataclass(frozen=True)
class Needs:
    """Requirements of a method, checked before it is built.

    student, teacher: fields of ``SegOutput`` that it reads; without any of the teacher it needs none. same_stride,
    same_classes (and stride): of both networks. least_classes: of the data set. smallest_map: (height, width) at the
    output stride; why: the reason, in a few words. settings, tap_settings: those that change the map, the taps."""
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
                crop_size: tuple[int, int]) -> None:
    """Raise UserError, naming method, network and what was expected, unless the requirements are met."""
    for role, taps, net in (("student", needs.student, student), ("teacher", needs.teacher, teacher)):
        if taps and net is None:
            raise UserError(f"method {method!r} needs a {role}: it reads {', '.join(taps)} of it, but there is none")
        if missing := [tap for tap in taps if tap not in net.channels]:
            raise UserError(f"method {method!r} needs {', '.join(missing)} of the {role}, "
                            f"but {net.name} offers only {', '.join(net.channels)}", settings=needs.tap_settings)
    if needs.teacher and needs.same_classes:
        _check_equal(method, "logits", student, student.channels["logits"], teacher, teacher.channels["logits"])
    if needs.teacher and (needs.same_classes or needs.same_stride):
        _check_equal(method, "output stride", student, student.stride, teacher, teacher.stride)
    if student.num_class < needs.least_classes:
        raise UserError(f"method {method!r} needs at least {needs.least_classes} classes, the data set has "
                        f"{student.num_class}")
    size = tuple(-(-side // student.stride) for side in crop_size)
    height, width = needs.smallest_map
    if size[0] < height or size[1] < width:
        why = f" ({needs.why})" if needs.why else ""
        raise UserError(f"method {method!r} needs maps of {height}x{width} or more{why}, but crops of {crop_size[0]}x"
                        f"{crop_size[1]} give {size[0]}x{size[1]}: use crops of {height * student.stride}x"
                        f"{width * student.stride} or more", settings=["crop_size", *needs.settings])


def _check_equal(method: str, what: str, student: NetInfo, of_student: int, teacher: NetInfo, of_teacher: int) -> None:
    if of_student != of_teacher:
        raise UserError(f"method {method!r}: {what} {of_student} of the student {student.name} and {of_teacher} of the "
                        f"teacher {teacher.name}: expected equal numbers")


def both_have_aux(student: NetInfo, teacher: NetInfo | None) -> bool:
    """Whether both networks have an auxiliary head: for methods that read it where they can."""
    return teacher is not None and "aux" in student.channels and "aux" in teacher.channels
