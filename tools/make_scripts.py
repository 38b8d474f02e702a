#!/usr/bin/env python3
"""Write the training scripts of the published tables, train_scripts/<data set>/<teacher>_<student>_<method>.sh.

    python tools/make_scripts.py            rewrite them all
    python tools/make_scripts.py --check    exit with 1 and name what differs

Settings come from where ``--method`` has them: published values and defaults of the method's file in ``losses/``. Here
stand published figures, the protocol of each data set, and what a script shows. A new method is one line in METHODS.
"""
from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from engine.presets import preset, published_row
from engine.settings import build_parser
from utils.cli import parse_options, run_main
from utils.files import write_text
from utils.options import OptionGroup, flag, option

SCRIPTS = Path(__file__).resolve().parent.parent / "train_scripts"
OPTIMIZATION = ("batch_size", "lr", "min_lr", "momentum", "weight_decay", "poly_power", "aux_weight")
RUNNING = ("workers", "val_per_iters", "save_per_iters", "log_iter")
#: shown in the scripts of the few rows that depart from the default
RARE = ("min_lr", "compat")
#: of the settings of ``train_kd.py``
DEFAULTS = {action.dest: action.default for action in build_parser()._actions}


@dataclass(frozen=True)
class Network:
    """title: for people; short: in file names."""
    title: str
    short: str
    model: str
    backbone: str


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


@dataclass(frozen=True)
class Method:
    """title: for people; shown: settings that the scripts spell out, a tuple per line; notes: comments, by (data set,
    student), by data set, or '*' for the rest; teacher: whether it learns from the table's teacher."""
    title: str
    shown: tuple[tuple[str, ...], ...] = ()
    notes: Mapping[str | tuple[str, str], str] = field(default_factory=dict)
    teacher: bool = True


R101, R18, MBV2, PSP = "deeplabv3_r101", "r18", "mbv2", "psp_r18"
NETWORKS = {
    R101: Network("DeepLabV3-ResNet101", R101, "deeplabv3", "resnet101"),
    R18: Network("DeepLabV3-ResNet18", "deeplabv3_r18", "deeplabv3", "resnet18"),
    MBV2: Network("DeepLabV3-MobileNetV2", "deeplabv3_mbv2", "deeplab_mobile", "mobilenetv2"),
    PSP: Network("PSPNet-ResNet18", PSP, "psp", "resnet18")}

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
        PSP: {"none": 73.33, "skd": 74.07, "ifvd": 73.54, "cwd": 73.99, "cirkd": 74.78, "lad": 75.4, "afdcd": 76.14}}),
    "camvid": Table("CamVid", "camvid", (360, 360), 40000, "deeplabv3_resnet101_camvid_best_model.pth", 69.84, {
        R18: {"none": 66.92, "skd": 67.46, "ifvd": 67.28, "cwd": 67.71, "cirkd": 68.21, "afdcd": 69.27},
        PSP: {"none": 66.73, "skd": 67.83, "ifvd": 67.61, "cwd": 67.92, "cirkd": 68.65, "afdcd": 69.48}},
        note="Published CamVid figures are of the test images; the Af-DCD program also chose its best model on them. "
             "Here val chooses and test is reported; --selection-split reference restores that habit.")}

MORE_DECAY = "Published with a larger weight decay than the other rows."
NO_TWIN = f"{MORE_DECAY} The student alone was not trained again with it."
ITS_SCHEDULE = ("As published, the learning rate of this row tends to 0.0001 in place of 0, and it is validated every "
                "400 iterations, which doubles the candidates for the best model.")
CITYS_ONLY = "Only Cityscapes scripts of this row were released: the same weights on this data set are an assumption."
NO_ADVERSARIAL = ("A crop of 360 gives logits of 45x45, on which the released discriminator crashes: this row runs "
                  "without the adversarial term (--lambda-adv 0.001 --adv-upsample switches it on).")
#: of SKD, IFVD and CWD
ADVERSARIAL = {"citys": "", "voc": CITYS_ONLY, "camvid": f"{CITYS_ONLY} {NO_ADVERSARIAL}"}

#: a script is written for every method listed here and every student with a published figure of it
METHODS = {
    "none": Method("not distilled", teacher=False),
    "kd": Method("KD", (("lambda_kd",), ("kd_temperature",)), {
        "*": "No script of this row was released; the weight is that of KD within Af-DCD on this data set."}),
    "skd": Method("SKD", (("lambda_kd", "lambda_skd", "lambda_adv"),), ADVERSARIAL),
    "ifvd": Method("IFVD", (("lambda_kd", "lambda_ifvd", "lambda_adv"),), ADVERSARIAL),
    "cwd": Method("CWD", (("lambda_kd", "lambda_cwd_feat", "lambda_cwd_logit", "lambda_adv"),), ADVERSARIAL),
    "dsd": Method("DSD", (("lambda_dsd_psd", "lambda_dsd_csd"), ("compat",)), {
        ("citys", MBV2): "This student has no auxiliary head, and the released code compares its maps with others of "
                         "the teacher; the published figure was made with it: hence --compat reference. Without it "
                         "head and logits are compared with head and logits."}),
    "cirkd": Method("CIRKD", (("lambda_kd", "lambda_cirkd_batch", "lambda_cirkd_pixel", "lambda_cirkd_region"),
                              ("group_size", "compat")), {
        "*": "The released code fills the pixel queues with pixels of other classes, and the published figure was made "
             "with it: hence --compat reference. Without it the queues are correct."}),
    "maskd": Method("MasKD", (("lambda_maskd", "maskd_aux_weight"),
                              ("maskd_tokens", "maskd_steps", "maskd_batch_size", "maskd_lr", "compat")), {
        "*": "Learns its masks first (10k iterations, cached in the run's folder). The released code does so with the "
             "teacher in train mode, dropout and synchronized batch norm included: hence --compat reference. Without "
             f"it the teacher is in eval mode. {NO_TWIN} {ITS_SCHEDULE}"}),
    "dist": Method("DIST", (("lambda_dist", "dist_aux_weight"),
                            ("dist_temperature", "dist_beta", "dist_gamma", "group_size")), {
        "*": f"{NO_TWIN} {ITS_SCHEDULE}",
        ("citys", PSP): f"{NO_TWIN} {ITS_SCHEDULE} Others who ran the released code report 75.37 to 75.53."}),
    "kt": Method("KT", (("lambda_kd", "lambda_kt_logit", "lambda_kt_feature", "lambda_kt_contrast"),
                        ("lambda_kt_aux", "kd_temperature", "kt_temperature", "kt_switch")), {
        "*": f"{MORE_DECAY} The released code compares the logits at crop size, as --compat reference does: the same "
             "but for cells that label edges cut, and slower."}),
    "lad": Method("LAD", (("lambda_lad",), ("lad_model",)), {
        "*": "Published with one decimal. The teacher, a DeepLabV3-ResNet18 that is shown noisy labels, is trained "
             "first by the same command (cached in the run's folder). The released code has a learning rate of 0.001 "
             "and a student that starts from trained weights; this is the schedule of the other rows (--lr 0.001 "
             "--student-pretrained FILE come closer)."}, teacher=False),
    "afdcd": Method("Af-DCD", (
        ("lambda_kd", "lambda_fd", "lambda_ctr"), ("rand_mask", "enhance_projector", "mask_ratio"),
        ("kd_temperature", "tau_ocd", "m_ocd", "pool_size", "patch_size", "clip_distiller")), {
        ("citys", R18): "The released script asks for centre mask and enhanced projector in a spelling that its "
                        "program rejects, so nobody can tell which setting gave the published figure. This is the "
                        "intended one; add --rand-mask true --enhance-projector false for that program's defaults.",
        "camvid": "The contrast is not pooled on CamVid, whatever --pool-size says."})}


def written(setting: str, value: object) -> str:
    """A setting as the command line takes it, numbers without exponents: ``--lambda-fd 0.000002``."""
    values = value if isinstance(value, (list, tuple)) else (value,)
    texts = [np.format_float_positional(v, trim="0") if isinstance(v, float) else str(v).lower() for v in values]
    return " ".join([flag(setting), *texts])


def scripts() -> Iterator[tuple[str, str]]:
    """(path below train_scripts, content) of every script."""
    for dataset, table in TABLES.items():
        yield f"{table.folder}/{R101}_teacher.sh", teacher_script(dataset)
        for student, published in table.published.items():
            for method in (name for name in published if name in METHODS):
                teacher = f"{R101}_" if METHODS[method].teacher else ""
                # the student's short name repeats the architecture only where no teacher's name says it
                short = NETWORKS[student].short.removeprefix("deeplabv3_" if teacher else "")
                name = "baseline" if method == "none" else method
                yield f"{table.folder}/{teacher}{short}_{name}.sh", student_script(dataset, student, method)


def teacher_script(dataset: str) -> str:
    """The script that trains the teacher of a table."""
    table = TABLES[dataset]
    trained = f"work_dir/{table.folder}/{R101}_teacher/kd_deeplabv3_resnet101_{dataset}_best_model.pth"
    return assemble(dataset, R101, "none", [
        f"{table.title}, teacher {NETWORKS[R101].title}: {table.teacher_miou:.2f} mIoU published.",
        "We do not know the schedule of the released file; this is that of the students. To distil from yours:",
        f"TEACHER={trained} bash SCRIPT"])


def student_script(dataset: str, student: str, method: str) -> str:
    """The script of one figure of a table."""
    table, described, published = TABLES[dataset], METHODS[method], TABLES[dataset].published[student]
    figures = [f"teacher {table.teacher_miou:.2f}"] if described.teacher else []
    figures += [f"student alone {published['none']:.2f}"] if method != "none" else []
    networks = (f"{NETWORKS[R101].title} -> " if described.teacher else "") + NETWORKS[student].title
    notes = described.notes
    return assemble(dataset, student, method, [
        f"{table.title}, {networks}, {described.title}: {published[method]:.2f} mIoU published"
        + (f" ({', '.join(figures)})." if figures else "."),
        notes.get((dataset, student), notes.get(dataset, notes.get("*", "")))])


def assemble(dataset: str, student: str, method: str, comment: list[str]) -> str:
    """Comment paragraphs and command of one script."""
    table, network, described = TABLES[dataset], NETWORKS[student], METHODS[method]
    values = {**DEFAULTS, **preset(method, dataset, network.backbone),
              **published_row(method, dataset, network.model, network.backbone),
              "dataset": dataset, "crop_size": table.crop, "max_iterations": table.iterations}

    def show(names: Iterable[str]) -> str:
        return " ".join(written(n, values[n]) for n in names if n not in RARE or values[n] != DEFAULTS[n])

    commands = [f'--dataset {dataset} --data "$DATA" {show(("crop_size", "max_iterations"))}', show(OPTIMIZATION)]
    if described.teacher:
        commands += [f"--teacher-model {NETWORKS[R101].model} --teacher-backbone {NETWORKS[R101].backbone}",
                     f'--teacher-pretrained "${{TEACHER:-$CKPT/{table.teacher_file}}}"']
    first, *more = map(show, described.shown or [()])
    commands += [f"--student-model {network.model} --student-backbone {network.backbone}",
                 f'--student-pretrained-base "$CKPT/{network.backbone}-imagenet.pth"',
                 f"--method {method} {first}".rstrip(), *more, show(RUNNING),
                 '--save-dir "$WORK_DIR" --log-dir "$LOG_DIR" "$@"']
    head = [*comment, table.note,
            "GPUS, DATA, TEACHER, ...: see ../common.sh. More flags are passed on. Written by tools/make_scripts.py."]
    return "\n".join(["#!/usr/bin/env bash", *(f"# {line}" for text in head for line in wrap(text, 116)),
                      "set -euo pipefail", f'source "$(dirname "${{BASH_SOURCE[0]}}")/../common.sh" {dataset}', "",
                      "train \\\n    " + " \\\n    ".join(filter(None, commands))]) + "\n"


def differences() -> list[str]:
    """Scripts that are missing, differ from the tables, or stand in none of them; paths below train_scripts."""
    wanted = dict(scripts())
    present = {str(path.relative_to(SCRIPTS)) for t in TABLES.values() for path in SCRIPTS.glob(f"{t.folder}/*.sh")}
    return [*(f"{name}: differs" for name, text in wanted.items()
              if name in present and (SCRIPTS / name).read_text(encoding="utf-8") != text),
            *(f"{name}: missing" for name in sorted(wanted.keys() - present)),
            *(f"{name}: not in the tables" for name in sorted(present - wanted.keys()))]


@dataclass(frozen=True)
class Settings(OptionGroup):
    """The command line."""
    check: bool = option(False, "write nothing; exit with 1 when a script differs from the tables")


def main(argv: list[str] | None = None) -> int:
    """Write or check. Returns the exit code."""
    description = "Write train_scripts/<data set>/*.sh from one table."
    if parse_options(Settings, argv, prog="make_scripts.py", description=description).check:
        problems = differences()
        print("\n".join(problems) or "all scripts agree with the tables")
        return 1 if problems else 0
    for name, text in scripts():
        write_text(SCRIPTS / name, text)
        (SCRIPTS / name).chmod(0o755)
    print("\n".join(f"left alone, {line}" for line in differences()) or f"wrote {len(dict(scripts()))} scripts")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
