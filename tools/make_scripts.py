#!/usr/bin/env python3
"""Write the training scripts of the published tables, train_scripts/<data set>/<teacher>_<student>_<method>.sh.

    python tools/make_scripts.py            rewrite them all
    python tools/make_scripts.py --check    exit with 1 and name what differs

The three tables below are the only place where settings stand. A new method is one line in METHODS.
"""
from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.cli import ArgumentParser, run_main
from utils.files import write_text

SCRIPTS = Path(__file__).resolve().parent.parent / "train_scripts"
OPTIMISATION = "--batch-size 16 --lr 0.02 --momentum 0.9 --weight-decay {decay} --poly-power 0.9 --aux-weight {aux}"
RUNNING = "--workers 8 --val-per-iters 800 --save-per-iters 800 --log-iter 10"


@dataclass(frozen=True)
class Network:
    """title: for people; short: in file names; base: ImageNet file of the backbone."""

    title: str
    short: str
    model: str
    backbone: str
    base: str


@dataclass(frozen=True)
class Table:
    """One published table, mIoU in percent: of the teacher, and by student and method ('none': not distilled)."""

    title: str
    folder: str
    crop: tuple[int, int]
    iterations: int
    teacher_file: str
    teacher_miou: float
    published: Mapping[str, Mapping[str, float]]
    note: str = ""


#: by (data set, student), by data set, or '*' for the rest; see :func:`lookup`
ByRow = Mapping[str | tuple[str, str], str]


@dataclass(frozen=True)
class Method:
    """title: for people; weights, variant: flags that differ by row; flags: the same everywhere; decay: weight decay;
    aux: weight of the auxiliary head; notes: comments; teacher: whether it learns from the table's teacher."""

    title: str
    weights: ByRow = field(default_factory=dict)
    variant: ByRow = field(default_factory=dict)
    flags: str = ""
    decay: ByRow = field(default_factory=lambda: {"*": "0.0001"})
    aux: str = "0.4"
    notes: ByRow = field(default_factory=dict)
    teacher: bool = True


R101, R18, MBV2, PSP = "deeplabv3_r101", "r18", "mbv2", "psp_r18"
NETWORKS = {
    R101: Network("DeepLabV3-ResNet101", "deeplabv3_r101", "deeplabv3", "resnet101", "resnet101-imagenet.pth"),
    R18: Network("DeepLabV3-ResNet18", "deeplabv3_r18", "deeplabv3", "resnet18", "resnet18-imagenet.pth"),
    MBV2: Network("DeepLabV3-MobileNetV2", "deeplabv3_mbv2", "deeplab_mobile", "mobilenetv2",
                  "mobilenetv2-imagenet.pth"),
    PSP: Network("PSPNet-ResNet18", "psp_r18", "psp", "resnet18", "resnet18-imagenet.pth"),
}

TABLES = {
    "citys": Table("Cityscapes", "cityscapes", (512, 1024), 40000, "deeplabv3_resnet101_citys_best_model.pth", 78.07, {
        R18: {"none": 74.21, "skd": 75.42, "ifvd": 75.59, "cwd": 75.55, "dsd": 74.81, "cirkd": 76.38, "maskd": 77.00,
              "dist": 77.10, "afdcd": 77.03, "kt": 77.98},
        MBV2: {"none": 73.12, "skd": 73.82, "ifvd": 73.50, "cwd": 74.66, "dsd": 74.11, "cirkd": 75.42, "maskd": 75.26,
               "afdcd": 76.43, "kt": 76.17},
        PSP: {"none": 72.55, "cirkd": 74.73, "maskd": 75.34, "dist": 76.31, "kt": 76.49}}),
    "ade20k": Table("ADE20K", "ade20k", (512, 512), 40000, "deeplabv3_resnet101_ade20k_best_model.pth", 42.70, {
        R18: {"none": 33.91, "kd": 34.88, "cirkd": 35.41, "afdcd": 36.21}}),
    "coco_stuff_164k": Table("COCO-Stuff-164K", "coco_stuff", (512, 512), 80000,
                             "deeplabv3_resnet101_coco_stuff_164k_best_model.pth", 38.71, {
        R18: {"none": 32.60, "kd": 32.88, "cirkd": 33.11, "afdcd": 34.02}}),
    "voc": Table("Pascal VOC (aug)", "voc", (512, 512), 40000, "deeplabv3_resnet101_pascal_aug_best_model.pth", 77.67, {
        R18: {"none": 73.21, "skd": 73.51, "ifvd": 73.85, "cwd": 74.02, "cirkd": 74.50, "lad": 75.0, "afdcd": 76.25},
        PSP: {"none": 73.33, "skd": 74.07, "ifvd": 73.54, "cwd": 73.99, "cirkd": 74.78, "lad": 75.4,
              "afdcd": 76.14}}),
    "camvid": Table("CamVid", "camvid", (360, 360), 40000, "deeplabv3_resnet101_camvid_best_model.pth", 69.84, {
        R18: {"none": 66.92, "skd": 67.46, "ifvd": 67.28, "cwd": 67.71, "cirkd": 68.21, "afdcd": 69.27},
        PSP: {"none": 66.73, "skd": 67.83, "ifvd": 67.61, "cwd": 67.92, "cirkd": 68.65, "afdcd": 69.48}},
        note="Published CamVid figures are of the test images; the Af-DCD program also chose its best model on them. "
             "Here val chooses and test is reported; --selection-split reference restores that habit."),
}

#: SKD, IFVD and CWD rows: KD and a discriminator beside the method's own terms
ADVERSARIAL = "--lambda-kd 1.0 {own} --lambda-adv 0.001"
#: KT rows, and with NO_TWIN those of MasKD and DIST
MORE_DECAY = "Published with a larger weight decay than the other rows."
NO_TWIN = f"{MORE_DECAY} The student alone was not trained again with it."
CIRKD = "--lambda-kd 1.0 --lambda-cirkd-batch 1.0 --lambda-cirkd-pixel {memory} --lambda-cirkd-region {memory}"
CITYS_ONLY = "Only Cityscapes scripts of this row were released: the same weights on this data set are an assumption."
NO_ADVERSARIAL = ("A crop of 360 gives logits of 45x45, on which the released discriminator crashes: this row runs "
                  "without the adversarial term (--lambda-adv 0.001 --adv-upsample switches it on).")


def adversarial(title: str, own: str) -> Method:
    """A row that was published with KD and the adversarial term."""
    weights = ADVERSARIAL.format(own=own)
    return Method(title, weights={"*": weights, "camvid": weights.replace("0.001", "0.0")},
                  notes={"citys": "", "voc": CITYS_ONLY, "camvid": f"{CITYS_ONLY} {NO_ADVERSARIAL}"})


#: a script is written for every method listed here and every student with a published figure of it
METHODS = {
    "none": Method("not distilled", teacher=False),
    "kd": Method(
        "KD", weights={"*": "--lambda-kd 1.0", "ade20k": "--lambda-kd 0.5", "coco_stuff_164k": "--lambda-kd 0.5"},
        flags="--kd-temperature 1.0",
        notes={"*": "No script of this row was released; the weight is that of KD within Af-DCD on this data set."}),
    "skd": adversarial("SKD", "--lambda-skd 10.0"),
    "ifvd": adversarial("IFVD", "--lambda-ifvd 20.0"),
    "cwd": adversarial("CWD", "--lambda-cwd-feat 50.0 --lambda-cwd-logit 3.0"),
    "dsd": Method(
        "DSD", weights={"*": "--lambda-dsd-psd 1000.0 --lambda-dsd-csd 10.0"},
        variant={("citys", MBV2): "--compat reference"},
        notes={("citys", MBV2): "This student has no auxiliary head, and the released code compares its maps with "
                                "others of the teacher; the published figure was made with it: hence --compat "
                                "reference. Without it head and logits are compared with head and logits."}),
    "cirkd": Method(
        "CIRKD",
        weights={"*": CIRKD.format(memory=0.1), "voc": CIRKD.format(memory=0.01)},
        flags="--group-size 2 --compat reference",
        notes={"*": "The released code fills the pixel queues with pixels of other classes, and the published figure "
                    "was made with it: hence --compat reference. Without it the queues are correct."}),
    "maskd": Method(
        "MasKD", weights={"*": "--lambda-maskd 1.0 --maskd-aux-weight 0.4"},
        flags="--maskd-tokens 8 --maskd-steps 10000 --maskd-batch-size 16 --maskd-lr 0.1",
        decay={"*": "0.0005", ("citys", MBV2): "0.0002"},
        notes={"*": f"Learns its masks first (10k iterations, cached in the run's folder). {NO_TWIN}"}),
    "dist": Method(
        "DIST", weights={"*": "--lambda-dist 1.0 --dist-aux-weight 0.4"},
        flags="--dist-temperature 1.0 --dist-beta 1.0 --dist-gamma 1.0 --group-size 2", decay={"*": "0.0005"},
        notes={"*": NO_TWIN,
               ("citys", PSP): f"{NO_TWIN} Others who ran the released code report 75.37 to 75.53."}),
    "kt": Method(
        "KT",
        weights={"*": "--lambda-kd 1.0 --lambda-kt-logit 1.0 --lambda-kt-feature 1.0 --lambda-kt-contrast 1.0"},
        flags="--lambda-kt-aux 0.4 --kd-temperature 4.0 --kt-temperature 4.0 --kt-switch 10000", decay={"*": "0.0005"},
        notes={"*": f"{MORE_DECAY} The released code compares the logits at crop size, as --compat reference does: the "
                    "same but for cells that label edges cut, and slower."}),
    "lad": Method(
        "LAD", weights={"*": "--lambda-lad 3.0"}, flags="--lad-model deeplabv3", aux="0.02", teacher=False,
        notes={"*": "Published with one decimal. The teacher, a DeepLabV3-ResNet18 that is shown noisy labels, is "
                    "trained first by the same command (cached in the run's folder). The released code has a learning "
                    "rate of 0.001 and a student that starts from trained weights; this is the schedule of the other "
                    "rows (--lr 0.001 --student-pretrained FILE come closer)."}),
    "afdcd": Method(
        "Af-DCD",
        weights={
            "citys": "--lambda-kd 1.0 --lambda-fd 0.000002 --lambda-ctr 0.005",
            "ade20k": "--lambda-kd 0.5 --lambda-fd 0.000001 --lambda-ctr 0.04",
            "coco_stuff_164k": "--lambda-kd 0.5 --lambda-fd 0.000005 --lambda-ctr 0.005",
            "voc": "--lambda-kd 1.0 --lambda-fd 0.000001 --lambda-ctr 0.005",
            "camvid": "--lambda-kd 1.0 --lambda-fd 0.000008 --lambda-ctr 0.01",
        },
        variant={"*": "--rand-mask true --enhance-projector false --mask-ratio 0.75",
                 ("citys", R18): "--rand-mask false --enhance-projector true --mask-ratio 0.75"},
        flags="--kd-temperature 1.0 --tau-ocd 0.07 --m-ocd 16 --pool-size 4 --patch-size 4 4 --clip-distiller 15",
        notes={("citys", R18): "The released script asks for centre mask and enhanced projector in a spelling that its "
                               "program rejects, so nobody can tell which setting gave the published figure. This is "
                               "the intended one; add --rand-mask true --enhance-projector false for that program's "
                               "defaults.",
               "camvid": "The contrast is not pooled on CamVid, whatever --pool-size says."}),
}


def lookup(table: ByRow, dataset: str, student: str) -> str:
    """The most specific entry of a row, '' when there is none."""
    return table.get((dataset, student), table.get(dataset, table.get("*", "")))


def scripts() -> Iterator[tuple[str, str]]:
    """(path below train_scripts, content) of every script."""
    for dataset, table in TABLES.items():
        yield f"{table.folder}/{R101}_teacher.sh", teacher_script(dataset)
        for student, published in table.published.items():
            for method in published:
                if method in METHODS:
                    name = "baseline" if method == "none" else method
                    teacher = f"{R101}_" if METHODS[method].teacher else ""
                    # the student's short name repeats the architecture only where no teacher's name says it
                    short = NETWORKS[student].short.removeprefix("deeplabv3_" if teacher else "")
                    yield f"{table.folder}/{teacher}{short}_{name}.sh", student_script(dataset, student, method)


def teacher_script(dataset: str) -> str:
    """The script that trains the teacher of a table."""
    table = TABLES[dataset]
    trained = f"work_dir/{table.folder}/{R101}_teacher/kd_deeplabv3_resnet101_{dataset}_best_model.pth"
    comment = [f"{table.title}, teacher {NETWORKS[R101].title}: {table.teacher_miou:.2f} mIoU published.",
               "We do not know the schedule of the released file; this is that of the students. To distil from yours:",
               f"TEACHER={trained} bash SCRIPT"]
    return assemble(dataset, R101, "none", comment)


def student_script(dataset: str, student: str, method: str) -> str:
    """The script of one figure of a table."""
    table = TABLES[dataset]
    published = table.published[student]
    title = NETWORKS[student].title
    figures = [f"teacher {table.teacher_miou:.2f}"] if METHODS[method].teacher else []
    figures += [f"student alone {published['none']:.2f}"] if method != "none" else []
    networks = f"{NETWORKS[R101].title} -> {title}" if METHODS[method].teacher else title
    comment = [f"{table.title}, {networks}, {METHODS[method].title}: {published[method]:.2f} mIoU published"
               + (f" ({', '.join(figures)})." if figures else "."),
               lookup(METHODS[method].notes, dataset, student)]
    return assemble(dataset, student, method, comment)


def assemble(dataset: str, student: str, method: str, comment: list[str]) -> str:
    """Comment paragraphs and command of one script."""
    table, network, settings = TABLES[dataset], NETWORKS[student], METHODS[method]
    height, width = table.crop
    lines = [f'--dataset {dataset} --data "$DATA" --crop-size {height} {width} --max-iterations {table.iterations}',
             OPTIMISATION.format(decay=lookup(settings.decay, dataset, student), aux=settings.aux)]
    if settings.teacher:
        lines += [f"--teacher-model {NETWORKS[R101].model} --teacher-backbone {NETWORKS[R101].backbone}",
                  f'--teacher-pretrained "${{TEACHER:-$CKPT/{table.teacher_file}}}"']
    lines += [f"--student-model {network.model} --student-backbone {network.backbone}",
              f'--student-pretrained-base "$CKPT/{network.base}"',
              f"--method {method} {lookup(settings.weights, dataset, student)}".rstrip(),
              lookup(settings.variant, dataset, student), settings.flags, RUNNING,
              '--save-dir "$WORK_DIR" --log-dir "$LOG_DIR" "$@"']
    head = [*comment, table.note,
            "GPUS, DATA, TEACHER, ...: see ../common.sh. More flags are passed on. Written by tools/make_scripts.py."]
    return "\n".join(["#!/usr/bin/env bash", *(f"# {line}" for text in head for line in wrap(text, 116)),
                      "set -euo pipefail",
                      f'source "$(dirname "${{BASH_SOURCE[0]}}")/../common.sh" {dataset}', "",
                      "train \\\n    " + " \\\n    ".join(filter(None, lines))]) + "\n"


def differences() -> list[str]:
    """Scripts that are missing, differ from the tables, or stand in none of them; paths below train_scripts."""
    wanted = dict(scripts())
    paths = (path for table in TABLES.values() for path in SCRIPTS.glob(f"{table.folder}/*.sh"))
    found = {str(path.relative_to(SCRIPTS)) for path in paths}
    changed = [name for name, text in wanted.items()
               if name in found and (SCRIPTS / name).read_text(encoding="utf-8") != text]
    return ([f"{name}: differs" for name in changed] + [f"{name}: missing" for name in sorted(wanted.keys() - found)]
            + [f"{name}: not in the tables" for name in sorted(found - wanted.keys())])


def main(argv: list[str] | None = None) -> int:
    """Write or check. Returns the exit code."""
    parser = ArgumentParser(prog="make_scripts.py", description="Write train_scripts/<data set>/*.sh from one table.")
    parser.boolean(parser, "--check", False, "write nothing; exit with 1 when a script differs from the tables")
    if parser.parse_args(argv).check:
        found = differences()
        print("\n".join(found) or "all scripts agree with the tables")
        return 1 if found else 0
    for name, text in scripts():
        path = SCRIPTS / name
        write_text(path, text)
        path.chmod(0o755)
    print("\n".join(f"left alone, {line}" for line in differences()) or f"wrote {len(dict(scripts()))} scripts")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
