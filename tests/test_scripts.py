"""The training scripts: they start, and their flags are those of the published runs."""
from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.presets import preset, published, published_row
from engine.settings import build_parser, parse_settings
from tools import make_scripts

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "train_scripts"
PUBLISHED = json.loads((ROOT / "tests/reference/published_settings.json").read_text())
TRAINING = sorted(str(path.relative_to(SCRIPTS)) for path in SCRIPTS.glob("*/*.sh"))
SHELL = sorted([*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*/*.sh"), *ROOT.glob("tools/*.sh"), ROOT / "tests/run.sh",
                ROOT / ".ci/run"])
#: name in the published tables -> constant of make_scripts
STUDENTS = {"deeplab_mobile-mobilenetv2": "MBV2", "deeplabv3-resnet18": "R18", "psp-resnet18": "PSP"}


def run(*command: str | Path, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in an environment without the variables that the scripts read, but for ``variables``."""
    ours = {"GPUS", "DATA", "DATA_ROOT", "CKPT", "TEACHER", "WORK_DIR", "LOG_DIR", "NNODES", "NODE_RANK", "PORT",
            "MASTER_ADDR", "CUDA_VISIBLE_DEVICES"}
    env = {key: value for key, value in os.environ.items() if key not in ours and not key.startswith("SLURM")}
    env |= {"DRY_RUN": "1", "PYTHON": sys.executable, **variables}
    return subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def printed(script: str, *flags: str, **settings) -> list[str]:
    """The words of the command that ``DRY_RUN=1 bash script flags`` prints."""
    done = run("bash", SCRIPTS / script, *flags, **{"GPUS": "8", **settings})
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def flat(words: list[str]) -> SimpleNamespace:
    """{setting: value} of the command line of ``train_kd.py``, as attributes."""
    return SimpleNamespace(**parse_settings(words).flat())


@cache
def script_words(script: str, flags: tuple[str, ...], settings: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """The command line of ``train_kd.py`` in a script."""
    words = printed(script, *flags, **dict(settings))
    return tuple(words[words.index("train_kd.py") + 1:])


def parsed(script: str, *flags: str, **settings: str) -> SimpleNamespace:
    """The settings that the script's command stands for."""
    return flat(list(script_words(script, flags, tuple(settings.items()))))


@pytest.mark.parametrize("path", SHELL, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_syntax(path):
    done = run("bash", "-n", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "set -euo pipefail" in path.read_text()


def test_scripts_agree_with_the_tables():
    assert make_scripts.differences() == []
    published = sum(len(row) for table in make_scripts.TABLES.values() for row in table.published.values())
    assert len(TRAINING) == published + len(make_scripts.TABLES)


def test_check_names_what_differs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_scripts, "SCRIPTS", tmp_path)
    assert make_scripts.main(["--check"]) == 1
    assert "cityscapes/deeplabv3_r101_r18_afdcd.sh: missing" in capsys.readouterr().out
    assert make_scripts.main([]) == 0
    assert make_scripts.main(["--check"]) == 0
    (tmp_path / "voc/psp_r18_baseline.sh").write_text("train --lr 1\n")
    (tmp_path / "voc/mine.sh").write_text("")
    assert make_scripts.main(["--check"]) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == ["voc/psp_r18_baseline.sh: differs",
                                                         "voc/mine.sh: not in the tables"]


@pytest.mark.parametrize("script", PUBLISHED["scripts"])
def test_afdcd_scripts_have_the_published_settings(script):
    config = vars(parsed(script))
    expected = {key: tuple(value) if isinstance(value, list) else value
                for key, value in PUBLISHED["scripts"][script].items()}
    got = {key: tuple(config[key]) if isinstance(config[key], list) else config[key] for key in expected}
    assert got == expected


@pytest.mark.parametrize("script", TRAINING)
def test_every_script_parses_and_agrees_with_the_preset(script):
    config = parsed(script)
    method = script.removesuffix(".sh").rsplit("_", 1)[1]
    expected_method = "none" if method in ("teacher", "baseline") else method
    assert config.method == expected_method
    assert any(value for key, value in vars(config).items() if key.startswith("lambda_")) == (expected_method != "none")
    case = (config.method, config.dataset, config.student_backbone)
    expected = preset(*case)
    assert {key: getattr(config, key) for key in expected} == expected
    folder = script.removesuffix(".sh")
    assert (config.save_dir, config.log_dir) == (f"work_dir/{folder}", f"log_dir/{folder}")
    schedule = next(row for name, row in PUBLISHED["scripts"].items() if name.split("/")[0] == script.split("/")[0])
    keys = {"dataset", "max_iterations", "batch_size", "lr", "momentum", "weight_decay", "poly_power", "aux_weight",
            "val_per_iters"}
    row = published_row(method, config.dataset, config.student_model, config.student_backbone) \
        if expected_method != "none" else {}
    for key in keys:  # but for methods whose own scripts had another value
        assert getattr(config, key) == row.get(key, schedule[key]), key
    assert config.crop_size == tuple(schedule["crop_size"])
    if method == "teacher":
        assert (config.student_model, config.student_backbone) == ("deeplabv3", "resnet101")
        assert config.student_pretrained_base == "pretrained_ckpt/resnet101-imagenet.pth"


@pytest.mark.parametrize("script", TRAINING)
def test_every_script_spells_its_preset_out(script):
    """The command says everything that ``--method`` stands for, so that it can be read without the code."""
    words = printed(script)
    words = words[words.index("train_kd.py") + 1:]
    at = words.index("--method")
    method = words[at + 1]
    spelled = build_parser().parse_args(words[:at] + words[at + 2:])
    wanted = published(method, spelled.dataset, spelled.student_backbone)
    assert {key: getattr(spelled, key) for key in wanted} == wanted


@pytest.mark.parametrize(("script", "decay"), [
    ("cityscapes/deeplabv3_r101_mbv2_maskd.sh", 2e-4), ("cityscapes/deeplabv3_r101_r18_maskd.sh", 5e-4),
    ("cityscapes/deeplabv3_r101_psp_r18_maskd.sh", 5e-4), ("cityscapes/deeplabv3_r101_psp_r18_dist.sh", 5e-4),
    ("cityscapes/deeplabv3_r101_mbv2_kt.sh", 5e-4), ("cityscapes/deeplabv3_r101_mbv2_dsd.sh", 1e-4),
    ("voc/psp_r18_lad.sh", 1e-4)])
def test_weight_decay_of_rows_from_other_papers(script, decay):
    assert parsed(script).weight_decay == decay


@pytest.mark.parametrize("script", TRAINING)
def test_maskd_and_dist_have_their_schedule_and_the_others_that_of_the_protocol(script):
    own = script.endswith(("_maskd.sh", "_dist.sh"))
    config, text = parsed(script), (SCRIPTS / script).read_text()
    assert (config.min_lr, config.val_per_iters, config.save_per_iters) == ((1e-4, 400, 400) if own else (0, 800, 800))
    head = " ".join(line.lstrip("# ") for line in text.split("set -euo")[0].splitlines())
    assert ("tends to 0.0001 in place of 0, and it is validated every 400 iterations" in head) == own
    assert ("teacher in train mode, dropout and synchronized batch norm included" in head) == ("_maskd" in script)


@pytest.mark.parametrize("script", TRAINING)
def test_rows_that_were_published_with_a_defect_have_it(script):
    rows = script.endswith(("_cirkd.sh", "_maskd.sh")) or script == "cityscapes/deeplabv3_r101_mbv2_dsd.sh"
    assert parsed(script).compat == ("reference" if rows else "fixed")
    assert ("--compat reference" in (SCRIPTS / script).read_text().split("set -euo")[0]) == (
        rows or script.endswith("_kt.sh"))


@pytest.mark.parametrize("script", [name for name in TRAINING if name.endswith("_lad.sh")])
def test_lad_trains_its_own_teacher(script):
    config = parsed(script)
    assert (config.teacher_pretrained, config.lad_teacher, config.lad_steps) == (None, None, None)
    assert (config.lad_model, config.lad_backbone or config.student_backbone) == ("deeplabv3", "resnet18")
    assert (config.lambda_lad, config.aux_weight) == (3.0, 0.02)


def test_published_miou():
    assert PUBLISHED["miou"].keys() == make_scripts.TABLES.keys()
    names = {"baseline": "none", "Af-DCD": "afdcd"}
    for dataset, table in make_scripts.TABLES.items():
        assert table.teacher_miou == PUBLISHED["miou"][dataset]["teacher deeplabv3-resnet101"]
        expected = {}
        for source in (PUBLISHED["miou"][dataset], PUBLISHED["miou_elsewhere"].get(dataset, {})):
            for student in source.keys() & STUDENTS.keys():
                row = {names.get(method, method.lower()): miou for method, miou in source[student].items()}
                found = expected.setdefault(getattr(make_scripts, STUDENTS[student]), {})
                assert not found.keys() & row.keys(), "a figure stands in both"
                found.update(row)
        assert table.published == expected


def test_one_line_adds_a_method(monkeypatch):
    monkeypatch.delitem(make_scripts.METHODS, "cwd")
    before = {name for name, _ in make_scripts.scripts()}
    monkeypatch.setitem(make_scripts.METHODS, "cwd", make_scripts.Method("CWD", (("lambda_cwd_feat",),)))
    added = {name: text for name, text in make_scripts.scripts() if name not in before}
    assert set(added) == {"cityscapes/deeplabv3_r101_r18_cwd.sh", "cityscapes/deeplabv3_r101_mbv2_cwd.sh",
                          "voc/deeplabv3_r101_r18_cwd.sh", "voc/deeplabv3_r101_psp_r18_cwd.sh",
                          "camvid/deeplabv3_r101_r18_cwd.sh", "camvid/deeplabv3_r101_psp_r18_cwd.sh"}
    assert all("--method cwd --lambda-cwd-feat 50.0" in text for text in added.values())


SCRIPT = "voc/deeplabv3_r101_psp_r18_afdcd.sh"


def test_environment_and_extra_flags_win():
    config = parsed(SCRIPT, "--batch-size", "4", "--resume", "auto", DATA_ROOT="/sets", TEACHER="/a b/t.pth",
                    CKPT="/files", WORK_DIR="/out")
    assert (config.data, config.teacher_pretrained, config.save_dir) == ("/sets/VOCAug", "/a b/t.pth", "/out")
    assert config.student_pretrained_base == "/files/resnet18-imagenet.pth"
    assert (config.batch_size, config.resume) == (4, "auto")
    assert parsed(SCRIPT, DATA="/voc", DATA_ROOT="/sets").data == "/voc"


def test_default_folders_lie_in_the_repository_from_anywhere(tmp_path):
    done = run("bash", SCRIPTS / SCRIPT, cwd=tmp_path, GPUS="0")
    words = shlex.split(done.stdout)
    assert words[1] == str(ROOT / "train_kd.py")
    assert flat(words[2:]).data == str(ROOT / "data/VOCAug")


def test_launcher_for_gpus_cpu_and_several_machines():
    eight = printed(SCRIPT)
    assert eight[1:6] == ["-m", "torch.distributed.run", "--nproc_per_node", "8", "--standalone"]
    assert "--no-cuda" not in eight
    cpu = printed(SCRIPT, GPUS="0")
    assert cpu[:3] == [sys.executable, "train_kd.py", "--no-cuda"]
    assert printed(SCRIPT, GPUS="1")[:2] == [sys.executable, "train_kd.py"]
    second = printed(SCRIPT, GPUS="4", NNODES="2", NODE_RANK="1", MASTER_ADDR="first", PORT="1234")
    assert second[3:second.index("train_kd.py")] == ["--nproc_per_node", "4", "--nnodes", "2", "--node_rank", "1",
                                                     "--master_addr", "first", "--master_port", "1234"]


def test_number_of_gpus_is_counted():
    assert "--no-cuda" in printed(SCRIPT, GPUS="", CUDA_VISIBLE_DEVICES="")
    assert printed(SCRIPT, GPUS="", CUDA_VISIBLE_DEVICES="0,3")[4] == "2"


@pytest.mark.parametrize("settings, message", [
    ({"GPUS": "all"}, "GPUS=all: expected a number of processes"),
    ({"GPUS": "1", "NNODES": "2"}, "MASTER_ADDR must name the first machine"),
])
def test_wrong_settings_are_refused(settings, message):
    done = run("bash", SCRIPTS / SCRIPT, **settings)
    assert done.returncode != 0
    assert message in done.stderr
    assert done.stdout == ""


def test_eval_script():
    words = printed("eval.sh", "citys", "psp", "resnet18", "my file.pth", "--json", "out.json", GPUS="2")
    assert words[5:] == ["--standalone", "eval.py", "--dataset", "citys", "--data", "data/cityscapes", "--model", "psp",
                         "--backbone", "resnet18", "--pretrained", "my file.pth", "--json", "out.json"]
    wrong = run("bash", SCRIPTS / "eval.sh", "citys")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("usage:")


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """The environment of a job on two nodes, this is the second, with stand-ins for Slurm's programs."""
    for name, body in {
        "scontrol": 'if [ "$1" = show ]; then echo node-a; seq 100000; else echo "$@" >>"$SAID"; fi',
        "scancel": 'echo "scancel $*" >>"$SAID"; kill -TERM "$(cat "$SAID.srun")"',
        "srun": 'echo $$ >"$SAID.srun"; echo "srun $1 $2" >>"$SAID"; while [ "${1#--}" != "$1" ]; do shift; done\n'
                'SLURM_NODEID=1 exec "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n".replace("\\n", "\n"))
        (tmp_path / name).chmod(0o755)
    return {"SLURM_NNODES": "2", "SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_CPUS_PER_TASK": "6",
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "GPUS": "4", "SAID": str(tmp_path / "said")}


def test_slurm_wraps_any_script(slurm):
    done = run("bash", SCRIPTS / "slurm.sh", f"train_scripts/{SCRIPT}", "--seed", "3", **slurm)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[3:13] == ["--nproc_per_node", "4", "--nnodes", "2", "--node_rank", "1", "--master_addr", "node-a",
                           "--master_port", "20123"]
    config = flat(words[words.index("train_kd.py") + 1:])
    assert (config.seed, config.resume) == (3, "auto")
    assert Path(slurm["SAID"]).read_text() == "srun --kill-on-bad-exit=1 --cpus-per-task=6\n"
    failed = run("bash", SCRIPTS / "slurm.sh", f"train_scripts/{SCRIPT}", **{**slurm, "GPUS": "many"})
    assert failed.returncode == 2
    assert run("bash", SCRIPTS / "slurm.sh", "no/such/script.sh", **slurm).returncode == 2
    assert "requeue" not in Path(slurm["SAID"]).read_text()


@pytest.mark.parametrize(("body", "code", "queued"), [
    ("exit 75", 75, True), ("exit 1", 1, False), ("exit 0", 0, False),
    # the time limit comes: told to end, torchrun ends with 1, and a run that was just finished with 0
    ("trap 'exit 1' TERM; kill -USR1 $PPID; while :; do sleep 0.05; done", 1, True),
    ("trap 'exit 0' TERM; kill -USR1 $PPID; while :; do sleep 0.05; done", 0, False)])
def test_slurm_queues_a_run_again_that_was_told_to_stop(slurm, tmp_path, body, code, queued):
    (tmp_path / "job.sh").write_text(body)
    done = run("bash", SCRIPTS / "slurm.sh", tmp_path / "job.sh", **slurm)
    said = Path(slurm["SAID"]).read_text().splitlines()[1:]
    expected = ["scancel --signal=TERM 123"] if "USR1" in body else []
    assert (done.returncode, said) == (code, expected + ["requeue 123"] * queued), done.stderr


def test_a_script_becomes_its_program(tmp_path):
    """Signals have to reach the training, and its exit code whoever started the script."""
    (tmp_path / "python").write_text("#!/bin/sh\necho $$ $PPID; exit 75\n")
    (tmp_path / "python").chmod(0o755)
    done = run("bash", SCRIPTS / SCRIPT, DRY_RUN="", PYTHON=str(tmp_path / "python"), GPUS="0")
    assert done.returncode == 75 and int(done.stdout.split()[1]) == os.getpid()
    (tmp_path / "list").write_text(f"NEW=1 {shlex.quote(str(tmp_path / 'python'))} train_kd.py\n")
    done = run("bash", SCRIPTS / "array.sh", tmp_path / "list", SLURM_ARRAY_TASK_ID="1")
    assert done.returncode == 75 and int(done.stdout.split()[1]) == os.getpid()


def test_without_an_environment_a_script_says_how_to_make_one(tmp_path):
    shutil.copytree(SCRIPTS, tmp_path / "train_scripts")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text("#!/bin/sh\nexit 1\n")  # no module torch
    (tmp_path / "bin" / "python3").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    for name in (SCRIPT, "reproduce.sh"):
        done = run("bash", tmp_path / "train_scripts" / name, cwd=tmp_path, DRY_RUN="", PYTHON="", GPUS="0", PATH=path)
        assert done.returncode == 2 and "bash tools/setup_env.sh" in done.stderr
        assert len(done.stderr.splitlines()) == 1 and done.stdout == ""
