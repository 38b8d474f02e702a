"""From the configuration to the parts of a run: networks, objective, optimizer, data."""
from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader

import dataset as data
from losses.composition import Objective, active_terms, build_distillers, term_weights
from losses.distiller import BuildContext, NetInfo
from models import get_segmentation_model
from utils.config import distils, needs_teacher
from utils.distributed import Distributed, synchronise_batch_norm
from utils.errors import UserError
from utils.randomness import seed_everything


def net_info(net: nn.Module) -> NetInfo:
    """What distillers may know about a network."""
    return NetInfo(net.name, dict(net.channels), net.num_class, net.output_stride, net.preprocess)


def build_student(config: argparse.Namespace, num_class: int) -> nn.Module:
    """The student in train mode. Its random weights depend on ``--seed`` only, not on the method."""
    seed_everything(config.seed, "student")
    return get_segmentation_model(
        model=config.student_model, backbone=config.student_backbone, num_class=num_class, aux=config.aux,
        pretrained=config.student_pretrained, pretrained_base=config.student_pretrained_base,
        preprocess=config.student_preprocess).train()


def build_teacher(config: argparse.Namespace, num_class: int) -> nn.Module | None:
    """The frozen teacher in eval mode, or None when no method of the run reads one."""
    if not needs_teacher(config):
        return None
    teacher = get_segmentation_model(
        model=config.teacher_model, backbone=config.teacher_backbone, num_class=num_class,
        pretrained=config.teacher_pretrained, pretrained_base=config.teacher_pretrained_base,
        preprocess=config.teacher_preprocess)
    return teacher.eval().requires_grad_(False)


def build_objective(config: argparse.Namespace, student: nn.Module, teacher: nn.Module | None,
                    resumed: bool = False) -> Objective:
    """Student and distillers with their weights, as the one module that is trained. resumed: a state will be loaded."""
    distillers = nn.ModuleDict()
    if distils(config):
        seed_everything(config.seed, "distillers")
        distillers = build_distillers(BuildContext(
            net_info(student), teacher and net_info(teacher), student.num_class, config.ignore_label,
            active_terms(config), config.crop_size, config.dataset, config, resumed))
    return Objective(student, distillers, term_weights(config), config.aux_weight, config.ignore_label,
                     config.group_size)


def build_optimizer(config: argparse.Namespace, objective: Objective) -> torch.optim.SGD:
    """SGD over student and distillers with one learning rate and one weight decay, as in the reference."""
    groups = [{"params": list(objective.student.parameters())}]
    own = [p for d in objective.distillers.values() for p in d.trained_parameters()]
    if own:
        groups.append({"params": own})
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


def wrap_for_processes(config: argparse.Namespace, objective: Objective, distributed: Distributed) -> nn.Module:
    """The objective on its device, with synchronised batch norm and DDP when there are several processes."""
    objective.to(distributed.device)
    if distributed.world_size == 1:
        return objective
    if config.sync_bn:
        synchronise_batch_norm(objective, distributed.device)
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        objective, objective.unsynchronised())
    gpu = [distributed.device.index] if distributed.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(objective, device_ids=gpu)


def check_batch(config: argparse.Namespace, distributed: Distributed) -> None:
    """Refuse batch sizes that the processes cannot share, and those that batch norm cannot train on."""
    world = distributed.world_size
    if config.batch_size % world:
        raise UserError(f"--batch-size {config.batch_size} does not divide by {world} processes: "
                        f"use a multiple of {world}")
    shared = world > 1 and config.sync_bn
    if config.batch_size // (1 if shared else world) < 2:
        raise UserError(f"--batch-size {config.batch_size} leaves one image per batch norm: the pooled branches of "
                        "the heads need at least 2 (more images, or --sync-bn with several processes)")


def build_dataset(config: argparse.Namespace, spec: data.DatasetSpec, split: str, *, train: bool,
                  list_file: str | None = None) -> data.SegmentationDataset:
    """One split of the data set of the run."""
    crop = config.crop_size if train else None
    return data.SegmentationDataset(spec, config.data, split, train=train, crop_size=crop, seed=config.seed,
                                    ignore_label=config.ignore_label, list_file=list_file)


def build_loader(config: argparse.Namespace, dataset: data.SegmentationDataset, distributed: Distributed,
                 start_step: int, steps: int | None = None, batch_size: int | None = None) -> DataLoader:
    """Batches of this process from ``start_step`` on; the samples do not depend on worker or process counts.

    steps, batch_size: length and total batch, by default those of the run.
    """
    sampler = data.TrainSampler(len(dataset), batch_size=batch_size or config.batch_size,
                                steps=steps or config.max_iterations, rank=distributed.rank,
                                world_size=distributed.world_size, seed=config.seed, start_step=start_step,
                                mode=config.sampling)
    return DataLoader(dataset, batch_sampler=sampler, num_workers=config.workers, collate_fn=data.collate,
                      worker_init_fn=data.worker_init, pin_memory=distributed.device.type == "cuda",
                      persistent_workers=config.workers > 0)
