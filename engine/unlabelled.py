"""Images without labels in the batches of a run: how many, and who reads them."""
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from losses.core.distiller import Distiller
from utils.distributed import Distributed
from utils.errors import UserError

if TYPE_CHECKING:
    from engine.settings import Settings


def images_without_labels(settings: Settings) -> int:
    """Images without labels in a batch, beside the labeled ones, over all processes together. UserError when their
    share is too small for one."""
    if settings.data.unlabelled is None:
        return 0
    batch, share = settings.optimization.batch_size, settings.data.unlabelled_share
    count = round(batch * share / (1 - share))
    if not count:
        raise UserError(f"--unlabelled-share {share:g}: less than one image beside the {batch} of --batch-size: "
                        f"expected at least {1 / (batch + 1):.2g}")
    return count


def check_unlabeled(settings: Settings, distributed: Distributed) -> None:
    """Refuse images without labels that the processes, or the parts of a step, cannot share."""
    count, world, parts = images_without_labels(settings), distributed.world_size, settings.speed.grad_accumulation
    step = world * parts
    if parts > 1:  # the images of a group stay together
        step *= settings.distillation.group_size or 1
    if count % step:
        batch, more = settings.optimization.batch_size, count + step - count % step
        shared = [f"{world} processes"] * (world > 1) + [f"--grad-accumulation {parts}"] * (parts > 1)
        raise UserError(f"--unlabelled-share {settings.data.unlabelled_share:g} puts {count} images without labels "
                        f"beside the {batch} of --batch-size: expected a multiple of {step} ({', '.join(shared)}), "
                        f"such as {more}: --unlabelled-share {more / (batch + more):.4g}")


def readers(settings: Settings,
            methods: Mapping[str, type[Distiller] | Distiller]) -> tuple[list[str], list[str]]:
    """(terms of the run that do without labels, and count on images without labels too; those of labeled images).
    methods: of the run, by name; those that are built know which terms the networks leave out."""
    terms = [term for method in methods.values() for term in method.terms
             if term.name in settings.active and not term.scales_task]
    supervised = ["task", *(["aux"] if settings.networks.aux else [])]
    return ([term.name for term in terms if not term.needs_labels],
            [*supervised, *(term.name for term in terms if term.needs_labels)])


def check_readers(settings: Settings, methods: Mapping[str, type[Distiller] | Distiller]) -> None:
    """Refuse images without labels that no term of the run would read. methods: as of :func:`readers`."""
    if settings.data.unlabelled is None:
        if settings.data.unlabelled_share != type(settings.data)().unlabelled_share:
            raise UserError("--unlabelled-share without --unlabelled: expected the folder of the images too")
        return
    without, of_labels = readers(settings, methods)
    if not without:
        raise UserError(f"--unlabelled {settings.data.unlabelled}: every term of this run ({', '.join(of_labels)}) "
                        "needs labels, so that these images would only change batch norm: expected a term that does "
                        "without, such as --lambda-kd 1")
