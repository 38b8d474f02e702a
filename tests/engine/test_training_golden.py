"""The reference's recorded training iterations, reproduced by the project's own training step in float64."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reference import fill

from engine.step import TrainStep
from losses.afdcd import AfDCD, OmniContrastiveFeatureLoss
from losses.core.objective import Objective
from losses.kd import KD
from models import get_segmentation_model
from models.prepare import PreparedTeacher, to_channels_last

#: iterations of a case, where the first ones say enough for the time they take
FIRST = {"r50_to_mobile": 2, "r50_to_r18": 3}
GOLDEN = json.loads((Path(__file__).parent.parent / "reference" / "training.json").read_text())


def network(spec: list, num_class: int, seed: int) -> torch.nn.Module:
    model, backbone, aux = spec
    net = get_segmentation_model(model=model, backbone=backbone, num_class=num_class, aux=aux)
    return fill.no_dropout(fill.fill_module(net, seed)).double()


def build(spec: dict, fast: bool) -> TrainStep:
    """fast: with the teacher prepared, in channels-last order and with the fused update, as runs do by default."""
    teacher = network(spec["teacher"], spec["num_class"], spec["teacher_seed"]).eval().requires_grad_(False)
    student = network(spec["student"], spec["num_class"], spec["student_seed"]).train()
    criterion = OmniContrastiveFeatureLoss(student.channels["c4"], teacher.channels["c4"], rand_mask=False)
    fill.fill_module(criterion, spec["criterion_seed"])
    distillers = {"kd": KD(spec["kd_temperature"]), "afdcd": AfDCD(criterion, clip_norm=spec["clip"])}
    weights = {"kd": spec["lambda_kd"], "fd": spec["lambda_fd"], "ctr": spec["lambda_ctr"]}
    objective = Objective(student, distillers, weights, aux_weight=0.4).double()
    if fast:
        teacher = to_channels_last(PreparedTeacher(teacher, {"logits", "c4"}))
        to_channels_last(objective)
    optimizer = torch.optim.SGD(objective.parameters(), lr=spec["lr"], momentum=spec["momentum"],
                                weight_decay=spec["weight_decay"], fused=fast)
    return TrainStep(objective, teacher, optimizer, lr=spec["lr"], max_iterations=spec["max_iterations"],
                     power=spec["power"])


#: the faster forms everywhere, their plain twins in the case that takes the shortest time
CASES = [(case, True) for case in GOLDEN["cases"]] + [(case, False) for case in GOLDEN["cases"]
                                                      if case["id"] == "small_mobile_to_r18"]


@pytest.mark.parametrize(("case", "fast"), CASES, ids=[f"{case['id']}-{'fast' if f else 'plain'}" for case, f in CASES])
def test_training_iterations_equal_the_reference(case: dict, fast: bool) -> None:
    spec, expect = case["spec"], case["expect"]
    step_fn = build(spec, fast)
    b, h, w = spec["batch"]
    steps = FIRST.get(case["id"]) or 1 + max(int(k[4]) for k in expect if k.startswith("iter"))
    for i in range(steps):
        images = fill.tensor(f"image{i}", (b, 3, h, w), spec["data_seed"]).double()
        images = images.contiguous(memory_format=torch.channels_last) if fast else images
        target = fill.labels(f"label{i}", (b, h, w), spec["num_class"], spec["data_seed"])
        result = step_fn(images, images, target, i)
        task = result.weighted["task"] + result.weighted.get("aux", 0.0)
        got = {"lr": result.lr, "task": task, "kd": result.weighted["kd"], "fd": result.weighted["fd"],
               "ctr": result.weighted["ctr"], "criterion_grad_norm": result.grad_norms["afdcd"]}
        for name, value in got.items():
            want = expect[f"iter{i}.{name}"]
            assert abs(float(value) - want) <= 1e-5 * max(abs(want), 1e-3), (i, name, float(value), want)
    if steps == spec["iterations"] and "student_after" in expect:
        flat = torch.cat([p.detach().reshape(-1) for p in step_fn.objective.student.parameters()])
        assert fill.compare(fill.digest(flat), expect["student_after"]) < 1e-5
