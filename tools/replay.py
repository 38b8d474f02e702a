#!/usr/bin/env python3
"""Run the step again in which a run met a loss, gradient or weight that is not finite: where does it begin?

    python tools/replay.py work_dir/student/kd_..._replay.pth
    python tools/replay.py BUNDLE --device cuda --teacher-pretrained FILE

Prints every term of the loss with the norm of its gradient, the first module whose output is not finite, and the
weights whose gradient is not. Needs the bundle and the teacher's file, no data. Exit code 1 when all is finite here.
"""
from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import engine.build
from engine.nonfinite import FORMAT
from engine.run import Run, network_inputs
from engine.settings import Settings, from_saved
from models.prepare import StoredTeacher
from models.preprocess import Preprocess
from tools.markdown import table
from tools.simulate_memory import build
from utils.cli import parse_options, run_main
from utils.errors import UserError
from utils.files import sha256
from utils.options import OptionGroup, option
from utils.tensor_files import first_line, load_tensors

SHOWN = 5  # names in a line


@dataclass(frozen=True, kw_only=True)
class Options(OptionGroup):
    """The command line."""
    bundle: str = option(MISSING, metavar="FILE")
    device: str = option("cpu", "where to compute, such as cpu or cuda:0", metavar="DEVICE")
    teacher_pretrained: str | None = option(None, "the run's teacher (default: where the run had it)", metavar="FILE")


@dataclass
class First:
    """The first module whose output was not finite. given: whether its input was not either."""
    name: str = ""
    kind: str = ""
    count: int = 0
    of: int = 0
    given: bool = False

    def __str__(self) -> str:
        return (f"first module with an output that is not finite: {self.name} ({self.kind}), {self.count} of {self.of} "
                f"values; its input is {'not finite either' if self.given else 'finite'}")


def read_bundle(path: Path) -> dict[str, Any]:
    """The content of a bundle. UserError for anything else."""
    content = load_tensors(path, "replay bundle")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not a replay bundle of this program (expected a file '*_replay.pth')")
    return content


def settings_of(content: Mapping[str, Any], options: Options) -> Settings:
    """The settings of the run, for one process without data."""
    settings = from_saved(content["config"], options.bundle)
    teacher = options.teacher_pretrained or settings.networks.teacher_pretrained
    said = content["teacher"]
    if said and Path(teacher).is_file() and sha256(Path(teacher)) != said["sha256"]:
        raise UserError(f"--teacher-pretrained {teacher}: not the teacher of the run, which was {said['file']}: its "
                        "checksum is another")
    networks = replace(settings.networks, student_pretrained=None, student_pretrained_base=None,
                       teacher_pretrained=teacher)
    return replace(
        settings, networks=networks, data=replace(settings.data, workers=0, cache=None),
        optimization=replace(settings.optimization,
                             batch_size=len(content["batch"]["name"]) - content.get("unlabelled", 0)),
        speed=replace(settings.speed, compile=False),
        running=replace(settings.running, skip_val=True, resume=options.bundle, skip_nonfinite=0))


def restored(content: Mapping[str, Any], options: Options) -> Run:
    """The run as it was before the step."""
    try:
        device = torch.device(options.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {options.device}: not usable here ({first_line(error)})") from error
    classes = tuple(content["classes"])
    spec = SimpleNamespace(num_class=len(classes), classes=classes, title="the data set",
                           train_split="train")  # all that is read
    with mock.patch.object(engine.build.data, "get_dataset_spec", lambda *_: spec):
        run = build(settings_of(content, options), device)
    if stored := content.get("stored"):
        run.teacher = run.step_fn.teacher = StoredTeacher(run.teacher, stored)
    elif "scores" in content["batch"]:
        print("the bundle does not say of what its stored scores are: the teacher itself is asked in their place")
    run.student.load_state_dict(content["model"])
    run.objective.distillers.load_state_dict(content["distillers"])
    run.student.preprocess = Preprocess.from_dict(content["preprocess"])
    run.step, run.step_fn.rank = content["step"], content["rank"]
    return run


@contextmanager
def watched(modules: Mapping[str, nn.Module]) -> Iterator[First]:
    """Inside, the first output that is not finite is noted; a module counts when those inside it have."""
    first = First()

    def look(module: nn.Module, given: Any, output: Any, name: str) -> None:
        values = floats(output)
        bad = sum(int((~x.isfinite()).sum()) for x in values)
        if bad and not first.name:
            first.name, first.kind, first.count = name, type(module).__name__, bad
            first.of, first.given = sum(x.numel() for x in values), not all(x.isfinite().all() for x in floats(given))

    handles = [module.register_forward_hook(partial(look, name=f"{root}.{name}".rstrip(".")))
               for root, net in modules.items() for name, module in net.named_modules()]
    try:
        yield first
    finally:
        for handle in handles:
            handle.remove()


def floats(values: Any) -> list[Tensor]:
    """The floating-point tensors in nested containers."""
    return [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.is_floating_point()]


def replay(run: Run, content: Mapping[str, Any]) -> bool:
    """Run the step, part by part as it was, and print what is found. Whether something is not finite."""
    step_fn, objective, step = run.step_fn, run.objective, run.step
    found = say_names("weights that are not finite before the step", objective.named_parameters())
    found |= say_names("what methods hold that is not finite before the step",
                       ((name, x) for name, x in objective.named_buffers() if ".running_" not in name))
    generator = step_fn.seed_streams(step, run.distributed.device)
    inputs = network_inputs(run, content["batch"])
    split = [[None] * step_fn.parts if x is None else x.chunk(step_fn.parts) for x in inputs]
    modules = {"student": run.student, **{f"distillers.{n}": d for n, d in objective.distillers.items()}}
    if run.teacher is not None:
        modules["teacher"] = run.teacher
    for number, part in enumerate(zip(*split, strict=True)):
        if step_fn.parts > 1:
            print(f"\npart {number + 1} of {step_fn.parts}")
        with watched(modules) as first:
            terms = step_fn.compute_terms(objective, *part, step, generator)
        terms = {name: value / step_fn.parts for name, value in terms.items()}
        found |= say_terms(objective, terms, step, content["scale"])
        if first.name:
            print(first)
            found = True
    return found


def say_terms(objective: nn.Module, terms: Mapping[str, Tensor], step: int, scale: float) -> bool:
    """A row for every term: its value, weighted, and the norm of the weighted gradient. Whether one is not finite."""
    weighted = objective.weighted(terms, step)
    weights = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    rows, lines, bad = [], [], False
    for name, value in weighted.items():
        parts = [None] * len(weights)
        if value.requires_grad:
            parts = torch.autograd.grad(value * scale, list(weights.values()), retain_graph=True, allow_unused=True)
        gradient = {one: part / scale for one, part in zip(weights, parts, strict=True) if part is not None}
        norm = torch.stack([part.norm() for part in gradient.values()]).norm() if gradient else torch.zeros(())
        wrong = [one for one, part in gradient.items() if not part.isfinite().all()]
        if wrong:
            lines.append(f"{name}: the gradient of {some(wrong)} is not finite")
        bad |= bool(wrong) or not value.isfinite()
        rows.append([name, *(f"{x.item():.6g}" for x in (terms[name], value, norm))])
    print(table(["term", "value", "weighted", "norm of its gradient"], rows))
    print("\n".join(lines), end="\n" * bool(lines))
    return bad


def say_names(what: str, tensors: Iterator[tuple[str, Tensor]]) -> bool:
    """A line on the tensors that are not finite, if there are any. Whether there are."""
    names = [name for name, x in tensors if x.is_floating_point() and not x.isfinite().all()]
    if names:
        print(f"{what}: {some(names)}")
    return bool(names)


def some(names: list[str]) -> str:
    """The first of them."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def main(argv: list[str] | None = None) -> int:
    """Replay one bundle. Returns the exit code: 1 when everything is finite here."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith("-"):
        argv = ["--bundle", *argv]
    options = parse_options(Options, argv, prog="replay.py", description=__doc__.split("\n")[0])
    content = read_bundle(Path(options.bundle))
    images = zip(content["batch"]["index"].tolist(), content["batch"]["name"], strict=True)
    print(f"step {content['step'] + 1}, process {content['rank']} of {content['processes']}, images "
          f"{', '.join(f'{index} {name}' for index, name in images)}")
    print(f"not finite in the run: {', '.join(content['what'])}")
    if content["seen_since"]:
        print(f"running statistics, queues, discriminators have seen this step and {content['seen_since'] - 1} later "
              "ones; batch norm does not read the statistics in training")
    found = replay(restored(content, options), content)
    if not found:
        shared = content["processes"] > 1 and content["config"]["sync_bn"]
        why = "batch norm saw the images of all processes in the run, those of one here; " if shared else ""
        print(f"everything is finite here: {why}another device, or what the lines above say, may make the difference")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(run_main(main))
