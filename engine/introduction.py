"""What a run says of itself before it starts: what it trains, and which settings are not the usual ones."""
from __future__ import annotations

from engine.layout import fold
from engine.log import LOG
from engine.options import DEAD_OPTIONS
from engine.presets import preset
from engine.run import Run
from engine.run_files import plain, readable, written
from engine.settings import Settings, default_settings, unread
from engine.unlabelled import images_without_labels, readers
from losses.core import NetInfo
from utils.distributed import available_cpus
from utils.options import flag

#: settings that the first lines, or lines of their own, say in any case
SAID = frozenset((
    *DEAD_OPTIONS, "method", "dataset", "student_model", "student_backbone", "teacher_model", "teacher_backbone",
    "batch_size", "max_iterations", "epochs", "save_dir", "log_dir", "name", "local_rank", "aux", "scale_weights",
    "class_map", "stored_scores"))


def introduce(run: Run) -> None:
    """Log what is trained on what, and what differs from the defaults; every setting goes to the text log alone."""
    settings, world = run.settings, run.distributed.world_size
    o, method = settings.optimization, settings.distillation.method or "afdcd"
    teacher = [f"teacher {run.teacher.name}"] if run.teacher is not None else []
    own, parameters = (sum(p.numel() for p in net.parameters()) / 1e6
                       for net in (run.objective.distillers, run.student))
    LOG.info("%s", fold(["plain training" if method == "none" else f"method {method}", *teacher,
                         f"student {run.student.name} ({parameters:.2f} M parameters)",
                         *([f"{own:.2f} M trained beside it"] if own else [])]))
    LOG.info("%s", fold([f"{o.max_iterations} iterations of {o.batch_size} images:",
                         f"{o.max_iterations * o.batch_size / len(run.train_set):.3g} epochs of the "
                         f"{len(run.train_set)} training images of {run.spec.title}",
                         f"on {world} process{'es' if world > 1 else ''} ({run.distributed.device.type})"]))
    if run.unlabeled is not None:
        LOG.info("%s", fold(about_unlabeled(run)))
    if sizes := about_sizes(run):
        LOG.info("%s", fold(sizes))
    of_preset, given = unusual(settings)
    for title, values in ((f"--method {method} sets:", of_preset), ("not as by default:", given)):
        if values:
            LOG.info("%s", fold([title, *(as_flag(name, value) for name, value in values.items())]))
    if settings.data.workers > available_cpus():
        LOG.info("--workers %d: one per CPU is enough, %d here", settings.data.workers, available_cpus())
    LOG.info("%s", fold([f"files in {run.files.directory}", f"configuration {run.files.config.name}"]))
    LOG.debug("%s", readable(settings))


def about_unlabeled(run: Run) -> list[str]:
    """How many images without labels there are and join a batch, and which terms read them."""
    settings, count = run.settings, images_without_labels(run.settings)
    without, of_labels = readers(settings, run.objective.distillers)
    total = count * settings.optimization.max_iterations
    return [f"{count} images without labels join every batch:", f"{total / len(run.unlabeled):.3g} epochs of the "
            f"{len(run.unlabeled)} in {settings.data.unlabelled},", f"which {', '.join(without)} read and "
            f"{', '.join(of_labels)} leave out"]


def about_sizes(run: Run) -> list[str]:
    """Which maps of the student the methods get at the teacher's size: with larger ones, they cost more."""
    taps = sorted({tap for taps in run.objective.resized.values() for tap in taps})
    if not taps:
        return []
    student, teacher = NetInfo.of(run.student), NetInfo.of(run.teacher)
    height, width = run.settings.data.crop_size

    def size(net: NetInfo, tap: str) -> str:
        return f"{-(-height // net.stride_of(tap))} x {-(-width // net.stride_of(tap))}"

    changes = [f"{tap} from {size(student, tap)} to {size(teacher, tap)}" for tap in taps]
    larger = any(teacher.stride_of(tap) < student.stride_of(tap) for tap in taps)
    advice = ["(--teacher-taps chooses smaller ones)"] if larger and teacher.takes_taps else []
    return ["the student's maps are resized to the teacher's:", *changes, *advice]


def as_flag(name: str, value: object) -> str:
    """A setting as on the command line: ``--crop-size 64 64``, ``--no-rand-mask``."""
    if isinstance(value, bool):
        return flag(name) if value else flag(f"no_{name}")
    return f"{flag(name)} {written(value)}"


def unusual(settings: Settings) -> tuple[dict[str, object], dict[str, object]]:
    """{setting: value} as JSON has it: what the preset of ``--method`` sets, but for what it leaves off, and what else
    differs from the defaults and is read."""
    method, now = settings.distillation.method, plain(settings)
    usual = plain(default_settings())
    published = {}
    if method is not None:
        published = preset(method, settings.data.dataset, settings.networks.student_backbone)
        published = {name: list(v) if isinstance(v, tuple) else v for name, v in published.items()}
    left_out = SAID | unread(settings)
    differs = {name: value for name, value in now.items() if name not in left_out and value != usual[name]}
    of_preset = {name: value for name, value in now.items() if name in published
                 and value == published[name] and (value or value != usual[name])}
    return of_preset, {name: value for name, value in differs.items()
                       if name not in published or value != published[name]}
