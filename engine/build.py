"""From the settings to the parts of a run: networks, objective, optimizer, data. Nothing here writes a file."""
from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

import dataset as data
from engine.class_weights import class_weights
from engine.layout import fold
from engine.log import LOG
from engine.optimizer import build_optimizer
from engine.options import Data
from engine.run import Run
from engine.run_files import RunFiles
from engine.scores import use_scores
from engine.settings import Settings
from engine.sources import sources
from engine.step import TrainStep
from engine.teacher import build_teacher
from engine.unlabelled import check_readers, check_unlabeled, images_without_labels
from engine.weights import weight_factors
from losses.core.common import CommonClasses
from losses.core.facts import NetInfo, RunFacts
from losses.core.objective import Objective, build_distillers, views
from losses.core.task import WeightedCrossEntropyLoss
from models import check_classes
from models.class_map import MappedTeacher, common_classes
from models.prepare import check_precision, to_channels_last
from utils.distributed import (
    Distributed,
    MeanInOneOrder,
    keep_strides,
    send_in_bf16,
    synchronize_batch_norm,
)
from utils.errors import UserError
from utils.module_state import weights_digest
from utils.options import flag
from utils.randomness import seed_everything

#: passes over the training images, above those of every published run
MANY_EPOCHS = 2000


def build_run(settings: Settings, distributed: Distributed, files: RunFiles | None = None) -> Run:
    """Build and check everything that training needs. files: of the run, if they are made already. Raises UserError for
    whatever does not fit."""
    check_batch(settings, distributed)
    check_unlabeled(settings, distributed)
    check_precision((settings.speed.amp_dtype, settings.speed.teacher_dtype), distributed.device)
    spec = data.get_dataset_spec(settings.data.dataset, settings.data.data)
    train_set = build_dataset(settings, spec, spec.train_split, train=True, list_file=settings.data.train_list)
    val_set, report_sets = build_evaluation_sets(settings, spec)
    splits = [split for split in (train_set, val_set, *report_sets) if split is not None]
    unlabeled = build_unlabeled(settings, spec)
    read = [*splits, unlabeled] if unlabeled is not None else splits
    if settings.data.cache is not None:
        data.use_cache(read, settings.data.cache, LOG.info)
    for split in splits:
        split.require_labels()
    student, teacher = build_student(settings, spec), build_teacher(settings, spec)
    if distributed.is_main_process:  # which writes the files that say it
        student.trained_on = data.fingerprint(read)
    settings = replace(settings, networks=replace(settings.networks, aux=student.aux, stored_scores=None,
                                                  **head_widths(student, teacher)))
    if settings.networks.teacher_scores is not None:
        stored = use_scores(settings, run_facts(settings, student.num_class), student, teacher, train_set, unlabeled)
        settings = replace(settings, networks=replace(settings.networks, stored_scores=stored))
    files = files or RunFiles(settings)
    criterion = build_criterion(settings, train_set, distributed.device)
    contents = file_contents(teacher, criterion)
    objective = build_objective(settings, student, teacher, bool(files.resume_from), criterion)
    check_readers(settings, objective.distillers)
    passes = distributed.world_size * settings.speed.grad_accumulation
    objective.images_without_labels = images_without_labels(settings) // passes
    for term, (factor, why) in weight_factors(settings, teacher and NetInfo.of(teacher)).items():
        weight = settings.weights[term]
        scaled = f"{flag(f'lambda_{term}')} {weight:g} x {factor:.4g} = {weight * factor:.4g}:"
        LOG.info("%s", fold([scaled, why], between=" "))
    speed, o = settings.speed, settings.optimization
    check_parts(settings, objective, distributed)
    if speed.uses_channels_last:
        objective.plain_maps = wants_plain_maps(settings, distributed.device.type)
        to_channels_last(objective.student if objective.plain_maps else objective)
    # a graph that is known to stay the same: torch allows that neither in parts nor for compiled networks
    fixed_graph = speed.fast and speed.grad_accumulation == 1 and not speed.compile
    model = wrap_for_processes(objective, distributed, o.sync_bn, fixed_graph, speed.ddp_compression)
    if teacher is not None:
        teacher.to(distributed.device)
        if speed.uses_channels_last:
            to_channels_last(teacher)
    optimizer = build_optimizer(settings, objective)
    step_fn = TrainStep(model, teacher, optimizer, lr=o.lr, max_iterations=o.max_iterations, power=o.poly_power,
                        min_lr=o.min_lr, seed=o.seed, rank=distributed.rank, amp=speed.amp_dtype,
                        parts=speed.grad_accumulation, warmup=settings.recipe.warmup,
                        may_skip=settings.running.skip_nonfinite > 0)
    return Run(settings, distributed, spec, train_set, val_set, report_sets, student, teacher, objective, model,
               optimizer, step_fn, files, unlabeled, contents, sources(settings))


def file_contents(teacher: nn.Module | None, criterion: nn.Module | None) -> dict[str, object]:
    """{setting: what the file that it names holds}, for a training state. teacher: as it was loaded."""
    net = teacher.net if isinstance(teacher, MappedTeacher) else teacher
    weights = getattr(criterion, "class_weights", None)
    return {"teacher_pretrained": None if net is None else f"weights {weights_digest(net.state_dict())}",
            "teacher_preprocess": None if net is None else str(net.preprocess),
            "class_weights": None if weights is None else [float(f"{weight:.6g}") for weight in weights.tolist()]}


def head_widths(student: nn.Module, teacher: nn.Module | None) -> dict[str, int]:
    """{setting: width} of the heads that are not of the usual width, which a weight file may have said."""
    widths = {"student_head_width": getattr(student, "head_width", None),
              "teacher_head_width": getattr(teacher, "head_width", None)}
    return {name: width for name, width in widths.items() if width is not None}


def wants_plain_maps(settings: Settings, device_type: str) -> bool:
    """Whether methods get maps, and keep weights, in the order of their dimensions: without channels-last, and on a CPU
    in float32, where the wide convolutions of projectors take 1.16 times as long in the other order."""
    speed = settings.speed
    return not speed.uses_channels_last or device_type == "cpu" and speed.amp_dtype is None


def build_student(settings: Settings, spec: data.DatasetSpec) -> nn.Module:
    """The student in train mode. Its random weights depend on the seed only, not on the method. UserError when it lacks
    an auxiliary head that was asked for."""
    seed_everything(settings.optimization.seed, "student")
    student = settings.networks.student.build(spec.num_class).train()
    if settings.networks.aux and not student.aux:
        raise UserError(f"--aux: {student.name} has no auxiliary head")
    try:
        note = check_classes(student, settings.networks.student_pretrained, spec.classes)
    except UserError as error:  # it learns the new order
        note = str(error)
    if note is not None:
        LOG.warning("--student-pretrained %s", note)
    return student


def run_facts(settings: Settings, num_class: int, resumed: bool = False,
              common: tuple[int, ...] | None = None) -> RunFacts:
    """What methods may know of a run. common: the classes that the teacher scores, None for all."""
    d, o, r = settings.data, settings.optimization, settings.running
    return RunFacts(
        num_class=num_class, ignore_label=d.ignore_label, crop_size=d.crop_size, active=settings.active,
        group_size=settings.distillation.group_size, compat=settings.distillation.compat, seed=o.seed,
        batch_size=o.batch_size, max_iterations=o.max_iterations, lr=o.lr, poly_power=o.poly_power,
        momentum=o.momentum, weight_decay=o.weight_decay, sync_bn=o.sync_bn, sampling=d.sampling,
        save_per_iters=r.save_per_iters, student=settings.networks.student, resumed=resumed,
        fast=settings.speed.fast, common=common)


def build_criterion(settings: Settings, train_set: data.SegmentationDataset, device: torch.device) -> nn.Module | None:
    """The cross entropy with weights of classes or pixels where the recipe asks for them, else None."""
    r = settings.recipe
    if r.class_weights is None and not r.ohem:
        return None
    weights = None
    if r.class_weights is not None:
        weights = class_weights(r.class_weights, train_set, device)
        said = [f"{name} {weight:.3g}" for name, weight in zip(train_set.spec.classes, weights, strict=True)]
        LOG.info("%s", fold([f"class weights ({r.class_weights}):", *said]))
    return WeightedCrossEntropyLoss(settings.data.ignore_label, settings.distillation.group_size, weights,
                                    (r.ohem_threshold, r.ohem_kept) if r.ohem else None)


def build_objective(settings: Settings, student: nn.Module, teacher: nn.Module | None, resumed: bool = False,
                    criterion: nn.Module | None = None) -> Objective:
    """Student and distillers with their weights, as the one module that is trained. resumed: a state will be loaded.
    criterion: the student's cross entropy, default the plain one."""
    distillers, seen, common = nn.ModuleDict(), {}, common_classes(teacher)
    if settings.methods:
        seed_everything(settings.optimization.seed, "distillers")
        known = (settings.method_options, run_facts(settings, student.num_class, resumed, common), NetInfo.of(student),
                 teacher and NetInfo.of(teacher))
        distillers, seen = build_distillers(*known), views(*known)
    factors = weight_factors(settings, teacher and NetInfo.of(teacher))
    weights = {term: weight * factors[term][0] if term in factors else weight
               for term, weight in settings.weights.items()}
    return Objective(student, distillers, weights, settings.networks.aux_weight, settings.data.ignore_label,
                     settings.distillation.group_size, criterion, {name: view.resized for name, view in seen.items()},
                     common and CommonClasses(common, student.num_class, settings.data.ignore_label),
                     [name for name, view in seen.items() if view.narrowed])


def wrap_for_processes(objective: Objective, distributed: Distributed, sync_bn: bool, fixed_graph: bool = False,
                       compression: str = "none") -> nn.Module:
    """The objective on its device, with synchronized batch norm and DDP when there are several processes.

    fixed_graph: every step computes the same. compression: of the gradients that are sent, "none" or "bf16"."""
    objective.to(distributed.device)
    if distributed.world_size == 1:
        return objective
    if sync_bn:
        synchronize_batch_norm(objective, distributed.device)
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        objective, objective.unsynchronized())
    keep_strides(objective)
    gpu = [distributed.device.index] if distributed.device.type == "cuda" else None
    # parameters that no step uses: a fixed graph shows them; else they are looked for where there may be some. In a
    # network without any, torch then says that it found none
    unused = not fixed_graph and not objective.student.own
    model = nn.parallel.DistributedDataParallel(objective, device_ids=gpu, gradient_as_bucket_view=True,
                                                static_graph=fixed_graph, find_unused_parameters=unused)
    sent = torch.bfloat16 if compression == "bf16" else None
    if gpu is None and distributed.world_size > 2:  # a resumed run is to be the same; of two, either order is
        model.register_comm_hook(None, MeanInOneOrder(objective.parameters(), sent).mean)
    elif sent is not None:
        model.register_comm_hook(None, send_in_bf16)
    return model


def check_batch(settings: Settings, distributed: Distributed) -> None:
    """Refuse batch sizes that the processes cannot share, and those that batch norm cannot train on."""
    world, batch = distributed.world_size, settings.optimization.batch_size
    if batch % world:
        raise UserError(f"--batch-size {batch} does not divide by {world} processes: use a multiple of {world}")
    parts = settings.speed.grad_accumulation
    if batch // world % parts:
        raise UserError(f"--grad-accumulation {parts} does not divide the {batch // world} images of a process "
                        f"(--batch-size {batch}, {world} processes)")
    shared = world > 1 and settings.optimization.sync_bn
    if batch // parts // (1 if shared else world) < 2:
        image, norms = "image", "the pooled branches of the heads need"
        if settings.data.unlabelled is not None:
            image, norms = "labeled image", "those of terms that need labels see no others, and need"
        raise UserError(f"--batch-size {batch} leaves one {image} per batch norm: {norms} at least 2 (more "
                        f"{image}s, fewer parts by --grad-accumulation, or --sync-bn with several processes)")


def in_iterations(settings: Settings) -> Settings:
    """The same settings with ``--epochs``, if there are any, as iterations of the training set."""
    if settings.recipe.epochs is None:
        return settings
    spec = data.get_dataset_spec(settings.data.dataset, settings.data.data)
    images = len(build_dataset(settings, spec, spec.train_split, train=True, list_file=settings.data.train_list))
    o, r = settings.optimization, settings.running
    iterations = -(-settings.recipe.epochs * images // o.batch_size)
    if settings.recipe.warmup >= iterations:
        raise UserError(f"--warmup {settings.recipe.warmup}: expected fewer than the {iterations} steps of --epochs "
                        f"{settings.recipe.epochs}: {images} images, --batch-size {o.batch_size}")
    tenth = {name: min(getattr(r, name), -(-iterations // 10)) for name in ("val_per_iters", "save_per_iters")
             if name not in settings.given}
    LOG.info("--epochs %d of %d training images: --max-iterations %d at --batch-size %d", settings.recipe.epochs,
             images, iterations, o.batch_size)
    return replace(settings, optimization=replace(o, max_iterations=iterations), running=replace(r, **tenth))


def check_length(settings: Settings, images: int) -> None:
    """Say when a training set of so many images is seen very often; UserError where nobody asked for it."""
    o = settings.optimization
    epochs = o.max_iterations * o.batch_size / images
    if epochs <= MANY_EPOCHS:
        return
    said = (f"--max-iterations {o.max_iterations} of --batch-size {o.batch_size} sees each of the {images} training "
            f"images {epochs:.0f} times")
    if not {"max_iterations", "epochs"} & settings.given:
        raise UserError(f"{said}, as the default is for thousands of images: expected --epochs (100 to 300 suit small "
                        "sets) or --max-iterations")
    LOG.warning("%s", said)


def check_parts(settings: Settings, objective: Objective, distributed: Distributed) -> None:
    """Refuse parts of a batch whose gradients do not add up to those of the whole."""
    parts, group = settings.speed.grad_accumulation, settings.distillation.group_size
    if parts == 1:
        return
    if whole := [name for name, distiller in objective.distillers.items() if distiller.whole_batch]:
        raise UserError(f"--grad-accumulation {parts}: {', '.join(whole)} needs all images of a step at once: drop its "
                        "--lambda-*, or use more processes")
    images = settings.optimization.batch_size // distributed.world_size // parts
    if not group or images % group:
        raise UserError(f"--grad-accumulation {parts} makes parts of {images} images: expected a multiple of "
                        f"--group-size {group or '0 (all images of the process)'}, whose images go together")


def build_dataset(settings: Settings, spec: data.DatasetSpec, split: str, *, train: bool,
                  list_file: str | None = None) -> data.SegmentationDataset:
    """One split of the data set of the run."""
    d: Data = settings.data
    return data.SegmentationDataset(spec, d.data, split, train=train, crop_size=d.crop_size if train else None,
                                    seed=settings.optimization.seed, ignore_label=d.ignore_label, list_file=list_file,
                                    scale=d.random_scale, fast=settings.speed.fast)


def build_unlabeled(settings: Settings, spec: data.DatasetSpec) -> data.SegmentationDataset | None:
    """The images of ``--unlabelled``, augmented as the labeled ones."""
    d: Data = settings.data
    if d.unlabelled is None:
        return None
    return data.unlabeled_images(spec, d.unlabelled, crop_size=d.crop_size, seed=settings.optimization.seed,
                                 ignore_label=d.ignore_label, scale=d.random_scale, fast=settings.speed.fast)


def selection_split(settings: Settings, spec: data.DatasetSpec) -> str:
    """The split that picks the best model."""
    chosen = settings.data.selection_split or spec.selection_split
    return spec.reference_selection_split if chosen == "reference" else chosen


def build_evaluation_sets(settings: Settings, spec: data.DatasetSpec) \
        -> tuple[data.SegmentationDataset | None, list[data.SegmentationDataset]]:
    """(the split that picks the best model, or None; the splits that are only reported at the end)."""
    if settings.running.skip_val:
        return None, []
    chosen = selection_split(settings, spec)
    if chosen in spec.splits and chosen not in spec.eval_splits:
        raise UserError(f"--selection-split {chosen}: {spec.title} has no labels of it; "
                        f"expected one of {', '.join(spec.eval_splits)}")
    try:
        selection = build_dataset(settings, spec, chosen, train=False, list_file=settings.data.val_list)
    except UserError as error:
        raise UserError(f"{error} (--selection-split: another split to validate on; --skip-val: none)") from error
    return selection, [build_dataset(settings, spec, s, train=False) for s in spec.report_splits if s != chosen]
