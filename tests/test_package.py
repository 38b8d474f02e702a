"""The installed package: one name, its commands, own methods and networks; sdist and editable installation."""
from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, train_arguments, write_folder_dataset
from test_readme_example import example

from tools.package.rewrite import commands, rewritten

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TOOLS = str(ROOT / "tools" / "package")
BUILD = ("import sys; sys.path.insert(0, sys.argv[1]); target = sys.argv[2]; import backend\n"
         "print(backend.build_sdist(target), backend.build_editable(target))")
NETWORK = '''
from torch import nn
from afdcd.models.preprocess import Preprocess

def net(num_class):
    """Two convolutions."""
    made = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(8, num_class, 1))
    made.preprocess = Preprocess("rgb", (0, 0, 0), (1, 1, 1), 1.0)
    return made
'''
#: after `afdcd-train` with sys.argv[1:3], the data and the weights
INSIDE = '''
import contextlib, io, sys
from importlib.metadata import distribution

data, weights = sys.argv[1:3]
commands = distribution("afdcd").entry_points
for command in commands:
    sys.argv, said = [command.name, "--help"], io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        command.load()()
    assert said.getvalue().startswith(f"usage: {command.name} "), (command.name, said.getvalue()[:200])

import afdcd.commands
assert not hasattr(afdcd.commands, "nothing")

from afdcd.tools.bench.jobs import added_since
assert added_since("utils.cpu.prepare_cpu") is not None  # for afdcd-latency

import cosine
sys.argv = ["afdcd-train", "--list-methods"]
assert commands["afdcd-train"].load()() == 0
sys.argv = ["afdcd-eval", "--model", "module:net:net", "--pretrained", weights, "--dataset", "folder", "--data", data,
            "--no-cuda", "--workers", "0", "--json", "eval.json"]
assert commands["afdcd-eval"].load()() == 0
print(*sorted(name for name in sys.modules if "." not in name))
'''


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A process that has to end well, without the repository on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env={**environment, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """(sdist, wheel of an editable installation)."""
    folder = tmp_path_factory.mktemp("built")
    names = run(sys.executable, "-c", BUILD, TOOLS, folder, cwd=folder).stdout.splitlines()[-1].split()
    return folder / names[0], folder / names[1]


def test_installed_in_an_empty_environment(tmp_path) -> None:
    """It sees torch and the rest through a link, and of this package what pip puts there."""
    venv.create(tmp_path / "venv", with_pip=False)
    python, here = tmp_path / "venv" / "bin" / "python", tmp_path / "empty"
    (place,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (place / "others.pth").write_text(sysconfig.get_path("purelib"))
    run(sys.executable, "-m", "pip", "--python", python, "install", "-qq", "--no-index", "--no-deps",
        "--no-build-isolation", ROOT, cwd=tmp_path)
    ours = {path.name for path in place.iterdir() if path.suffix not in (".pth", ".dist-info")}
    assert ours == {"afdcd"}

    data = write_folder_dataset(tmp_path / "set", train=2, val=1)
    here.mkdir()
    (here / "net.py").write_text(NETWORK)
    (here / "cosine.py").write_text(example()[1].replace("from losses.", "from afdcd.losses."))
    arguments = train_arguments(data, here / "run", "--method", "none", "--student-model", "module:net:net",
                                "--max-iterations", "1", "--batch-size", "2", "--skip-val")
    trained = run(python.with_name("afdcd-train"), *arguments, cwd=here)
    assert "afdcd-eval --model module:net:net" in " ".join(trained.stdout.replace("\\", "").split())
    (weights,) = (here / "run").glob("kd_*_folder.pth")
    done = run(python, "-c", INSIDE, data, weights, cwd=here)
    assert "\ncosine " in done.stdout and "mIoU" in done.stdout
    modules = done.stdout.splitlines()[-1].split()
    assert "afdcd" in modules
    assert not {path.stem for path in ROOT.iterdir()} & set(modules)


def test_the_sdist_is_an_ordinary_package(built) -> None:
    with tarfile.open(built[0]) as archive:
        files = {name.partition("/")[2]: archive.extractfile(name).read() for name in archive.getnames()
                 if archive.getmember(name).isfile()}
    assert tomllib.loads(files["pyproject.toml"].decode())["build-system"]["build-backend"] == "setuptools.build_meta"
    modules = {name: ast.parse(content) for name, content in files.items() if name.endswith(".py")}
    assert {name.partition("/")[0] for name in modules} == {"afdcd"}
    ours = {path.stem for path in ROOT.iterdir()} - {"tests"}  # which the benchmark imports in a clone
    imported = {(name, found.split(".")[0]) for name, tree in modules.items() for node in ast.walk(tree)
                for found in ([node.module] if isinstance(node, ast.ImportFrom) else
                              [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])}
    assert not [one for one in imported if one[1] in ours]
    assert {"afdcd/models/weight_links.toml", "afdcd/losses/kernels/contrast_cpu.cpp",
            "afdcd/tools/comparison/page.html"} <= set(files)
    assert "afdcd/tools/reproduce.py" not in files


def test_own_modules_come_along_and_no_scratch_files(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(TOOLS)
    backend = importlib.import_module("backend")
    for name, value in (("ROOT", tmp_path), ("FOLDERS", ("losses",)), ("COMMANDS", {})):
        monkeypatch.setattr(backend, name, value)
    for name in ("__init__.py", "cosine.py", "core/__init__.py", "core/x.cpp", "core/x.txt", ".ipynb_checkpoints/a.py",
                 ".hidden.py", "notes/a.py", "notes/deeper/__init__.py"):
        (tmp_path / "losses" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "losses" / name).write_text("x = 1\n")
    found = {name.removeprefix("losses/") for name in backend.package_files() if name.startswith("losses/")}
    assert found == {"__init__.py", "cosine.py", "core/__init__.py", "core/x.cpp"}
    (tmp_path / "losses" / "scratch.py").write_text("x = 1\nx ==\n")
    with pytest.raises(ValueError, match="scratch.py, line 2: cannot be parsed"):
        backend.package_files()


def test_an_editable_installation_reads_the_clone(built, tmp_path) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        wheel.extractall(tmp_path)
        scripts = next(wheel.read(name).decode() for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert all(f"{name} = {entry}" in scripts for name, entry in PROJECT["scripts"].items())
    code = ("import afdcd.tools.markdown, afdcd.utils.cli, sys; from afdcd.utils.extras import need\n"
            "print(afdcd.utils.cli.__file__, *(x for x in ('utils', 'tools') if x in sys.modules))\n"
            "sys.exit(afdcd.utils.cli.run_main(lambda argv: need('nothing_like_it', 'hub')) - 2)")
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    assert done.stdout.split() == [str(ROOT / "utils" / "cli.py")]
    assert "pip install 'afdcd[hub]'" in done.stderr


def test_what_is_rewritten() -> None:
    source = '''"""Ü: torchrun --nproc_per_node 8 train_kd.py, tools/predict.py, tools/report.py, eval.py."""
import os, engine.build
import dataset as data; from tools import compare
sys.path.insert(0, str(Path(__file__).parent))
name, said = "train_kd.py", f"{os}: python eval.py --x {data} (pip install -e '.[hub]')"
parser = Parser(prog="predict.py", usage="report.py")
'''
    expected = '''"""Ü: torchrun --nproc_per_node 8 -m afdcd.train_kd, afdcd-predict, tools/report.py, afdcd-eval."""
import os; from afdcd import engine; import afdcd.engine.build
import afdcd.dataset as data; from afdcd.tools import compare
pass
name, said = "train_kd.py", f"{os}: afdcd-eval --x {data} (pip install 'afdcd[hub]')"
parser = Parser(prog="afdcd-predict", usage="report.py")
'''
    assert rewritten(source.encode(), commands(PROJECT["scripts"])).decode() == expected


def test_every_command_is_a_program() -> None:
    """And what a user of the package is told to type is one of them."""
    programs = [entry.removeprefix("afdcd.commands:") for entry in PROJECT["scripts"].values()]
    assert all((ROOT / f"{name}.py").exists() or (ROOT / "tools" / f"{name}.py").exists() for name in programs)
    page = (ROOT / "docs" / "package.md").read_text(encoding="utf-8")
    assert all(f"`{command}`" in page for command in PROJECT["scripts"])
