"""What every source of networks of another library needs: to import it, and to say what it does not build."""
from __future__ import annotations

from typing import Any

from models.torchvision_compat import import_torchvision
from utils.errors import UserError
from utils.extras import need
from utils.tensor_files import first_line


def library(name: str, extra: str) -> Any:
    """Import an optional library that imports torchvision. UserError, with what to install, when it is not there."""
    import_torchvision()
    return need(name, extra)


def misfit(model: str, error: Exception) -> UserError:
    """What is said of an architecture that a library does not build."""
    return UserError(f"{model}: {type(error).__name__}: {first_line(error)} (of the 'architecture' in its description)")
