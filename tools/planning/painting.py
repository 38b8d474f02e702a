"""The images of a plan that paints its own."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dataset.toy_streets import write_toy_streets
from tools.planning.plan import ROOT
from utils.distributed import available_cpus


def paint(plan: Mapping[str, Any]) -> None:
    """Write the toy streets of a plan into its folder, unless they are there. Nothing for a plan of other images.
    UserError when the folder holds anything else."""
    if "paint" not in plan:
        return
    folder = ROOT / plan["data"]
    if not folder.is_dir():
        print(f"painting toy streets into {folder} ...", flush=True)
    write_toy_streets(folder, **plan["paint"], workers=available_cpus())
