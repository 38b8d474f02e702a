"""torchvision imports beside a torch that it was not built for; in new processes, as an import happens only once."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run a program in the repository."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_models_and_timm_can_be_built():
    done = python("import torch\n"
                  "from models.torchvision_compat import import_torchvision\n"
                  "tv = import_torchvision()\n"
                  "assert import_torchvision() is tv\n"
                  "net = tv.models.mobilenet_v2().eval()\n"
                  "print(tuple(net(torch.zeros(1, 3, 64, 64)).shape))\n"
                  "print(tv.models.MobileNet_V2_Weights.IMAGENET1K_V1.url)\n"
                  "import timm\n"
                  "print(type(timm.create_model('resnet18')).__name__)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "(1, 1000)", "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth", "ResNet"]


def test_a_fitting_torchvision_is_left_alone():
    """The plain import comes first; operators are declared only after it failed for want of them."""
    done = python("import sys, types\n"
                  "fitting = sys.modules['torchvision'] = types.ModuleType('torchvision')\n"
                  "from models import torchvision_compat as compat\n"
                  "assert compat.import_torchvision() is fitting\n"
                  "assert compat._declared == []")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("message", ["operator torchvision::nms does not exist", "something else"])
def test_torchvision_that_does_not_import_at_all(message):
    done = python("import importlib\n"
                  "from models.torchvision_compat import import_torchvision\n"
                  "from utils.errors import UserError\n"
                  "def broken(name):\n"
                  f"    raise RuntimeError({message!r})\n"
                  "importlib.import_module = broken\n"
                  "try:\n"
                  "    import_torchvision()\n"
                  "except UserError as error:\n"
                  "    print(error)")
    assert done.returncode == 0, done.stderr
    assert "torchvision does not" in done.stdout and message in done.stdout
