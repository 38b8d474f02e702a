"""Every registered method with real networks: pairs of architectures, two processes, kill and resume, the export."""
from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_same, launch, records, write_folder_dataset
from method_cases import (
    CLASSES,
    RUN_STUDENT,
    Case,
    build,
    check_gradients,
    labels,
    own_terms,
    run,
    run_arguments,
    smallest_crop,
    write_run_teacher,
)

import train_kd
from losses.core import NetInfo, methods
from models import get_segmentation_model
from models.output import SegOutput

NAMES = list(methods())
#: (teacher, student): the architectures with one another, with and without auxiliary head
PAIRS = {"deeplabv3 to mobile": (("deeplabv3", "resnet18_w0.5"), ("deeplab_mobile", "mobilenetv2_w0.25")),
         "psp to deeplabv3": (("psp", "resnet18_w0.5"), ("deeplabv3", "resnet18_w0.25")),
         "deeplabv3 to psp": (("deeplabv3", "resnet18_w0.25"), ("psp", "resnet18_w0.25")),
         "psp to mobile": (("psp", "resnet18_w0.25"), ("psp_mobile", "mobilenetv2_w0.25"))}
#: methods that measure their terms in two processes too: afdcd, and those whose steps exchange tensors or train a
#: discriminator
TALKING = {"adv", "afdcd", "cirkd", "cirkdv2", "ifvd", "skd"}
MEASURED = "--diagnose-every", "2"
STEM = f"kd_{RUN_STUDENT[0]}_{RUN_STUDENT[1]}_folder"


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> tuple[Path, Path]:
    """(data set, teacher)."""
    base = tmp_path_factory.mktemp("methods")
    return write_folder_dataset(base / "set", train=4, val=1), write_run_teacher(base / "teacher.pth")


@pytest.fixture(scope="module")
def two_processes(request, material, tmp_path_factory) -> dict[str, str]:
    """{method: "" or what went wrong} of a run with two processes of every method whose test was chosen, which may be
    one (-k); "unlabelled": with such images."""
    base = tmp_path_factory.mktemp("two_processes")
    assert set(NAMES) >= TALKING
    chosen = {item.callspec.params["name"] for item in request.session.items
              if item.name.startswith(test_two_processes_train_and_agree.__name__)}
    jobs = {n: run_arguments(n, *material, base / n, *(MEASURED if n in TALKING else ())) for n in NAMES if n in chosen}
    if "unlabelled" in chosen:
        jobs["unlabelled"] = run_arguments("cirkd", *material, base / "unlabelled", "--unlabelled",
                                           str(material[0] / "images/val"))
    (base / "jobs.json").write_text(json.dumps(jobs))
    program = ROOT / "tests" / "programs" / "train_methods.py"
    done = launch(str(program), [str(base / "jobs.json"), str(base / "results.json")])
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((base / "results.json").read_text())


@pytest.mark.parametrize("name", [*NAMES, "unlabelled"])
def test_two_processes_train_and_agree(two_processes, name) -> None:
    assert two_processes[name] == ""


def load(save: Path, suffix: str = "") -> dict:
    return torch.load(save / f"{STEM}{suffix}.pth", weights_only=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_resumes_to_the_same_end(material, tmp_path, monkeypatch, name) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    save = train_kd.save_run

    def also_for_later(run) -> None:
        save(run)
        if run.step == 1:  # what a run that dies here leaves behind
            shutil.copytree(whole, resumed)

    with monkeypatch.context() as patch:
        patch.setattr(train_kd, "save_run", also_for_later)
        assert train_kd.main(run_arguments(name, *material, whole)) == 0
    measured = "--diagnose-every", "1"  # which changes nothing
    assert train_kd.main(run_arguments(name, *material, resumed, "--resume", "auto", *measured)) == 0

    states = [load(save, "_state") for save in (whole, resumed)]
    for part in ("model", "distillers", "optimizer"):
        assert_same(*(state[part] for state in states), part)
    logged = [[(r["step"], r["loss"], r["raw"]) for r in records(p)] for p in (whole, resumed)]
    assert logged[0] == logged[1] and len(logged[0]) == 2
    (diagnosis,) = records(resumed, "diagnose")
    assert {n: x["raw"] for n, x in diagnosis["terms"].items()} == pytest.approx(logged[0][1][2], rel=1e-12)

    student = get_segmentation_model(model=RUN_STUDENT[0], backbone=RUN_STUDENT[1], num_class=CLASSES)
    student.load_state_dict(load(whole), strict=True)  # nothing of the method is in the exported file


@cache
def network_outputs(pair: str, crop: tuple[int, int]) -> tuple[tuple[NetInfo, SegOutput], tuple[NetInfo, SegOutput]]:
    """Description and output of (teacher, student) for one image."""
    torch.manual_seed(0)
    networks = [get_segmentation_model(model=m, backbone=b, num_class=CLASSES).eval() for m, b in PAIRS[pair]]
    images = torch.randn(1, 3, *crop)
    with torch.no_grad():
        teacher, student = (net(images) for net in networks)
    return (NetInfo.of(networks[0]), teacher), (NetInfo.of(networks[1]), student)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pair", PAIRS)
def test_every_pair_of_networks(name, pair) -> None:
    crop = smallest_crop(name)
    (teacher, of_teacher), (student, of_student) = network_outputs(pair, crop)
    distiller = build(name, crop, student=student, teacher=teacher)
    leaves = SegOutput(*(None if t is None else t.clone().requires_grad_() for t in of_student))
    terms = run(distiller, leaves, of_teacher, labels(crop, batch=1))
    missing = own_terms(name, Case(name, crop).active) - set(terms)
    assert terms and (not missing or of_student.aux is None)  # a share of the auxiliary logits falls away without them
    check_gradients(name, distiller, leaves, of_teacher, terms)
