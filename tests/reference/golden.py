"""Reader of ``golden.json``: recorded losses and gradients of every method, rebuilt from names and seeds.

    case = golden.load_case("kd/cirkd_T1_0")
    inputs = golden.make_inputs(case, torch.float64)
    golden.check_losses(case, {"kd": kd_loss(inputs["student"], inputs["teacher"])}, inputs)

Inputs whose role starts with "student" require a gradient; ``grads`` in the file refer to them. The losses are not
weighted by any lambda. The figures were recorded in float64, ``losses_float32`` in float32.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

from reference import fill

Case = Mapping[str, Any]
Rename = Callable[[str], str] | Mapping[str, str] | None
Module = TypeVar("Module", bound=nn.Module)


@cache
def _cases() -> dict[str, Case]:
    text = (Path(__file__).parent / "golden.json").read_text()
    return {case["id"]: case for case in json.loads(text)["cases"]}


def case_ids(prefix: str = "") -> list[str]:
    """Ids of the recorded cases that start with ``prefix``, in file order."""
    return [name for name in _cases() if name.startswith(prefix)]


def load_case(name: str) -> Case:
    """One recorded case; KeyError when there is none of that id."""
    return _cases()[name]


def make_inputs(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """{role: leaf tensor}; the students' require a gradient."""
    inputs = {}
    for role, spec in case["inputs"].items():
        x = fill.tensor(spec["name"], spec["shape"], case["seed"], dtype=torch.float64)
        x = x * spec["scale"] + spec.get("offset", 0.0)
        if spec.get("post") == "relu":
            x = x.clamp(min=0)
        inputs[role] = x.to(dtype).requires_grad_(role.startswith("student"))
    return inputs


def make_labels(case: Case) -> Tensor:
    """int64 label map [B, H, W] of blocks, some of them ignored."""
    spec = case["labels"]
    batch, height, width = spec["shape"]
    block = spec["block"]
    coarse_shape = (batch, height // block, width // block)
    seeds = (crc32(f"{case['seed']}/{name}".encode()) for name in ("labels", "ignore"))
    classes, ignored = map(np.random.default_rng, seeds)
    coarse = classes.integers(0, spec["ncls"], coarse_shape)
    coarse = np.where(ignored.random(coarse_shape) < spec["frac"], spec["ignore"], coarse).astype(np.int64)
    return torch.from_numpy(coarse.repeat(block, axis=1).repeat(block, axis=2))


def uniform(case: Case, name: str, shape: Iterable[int], dtype: torch.dtype = torch.float64) -> Tensor:
    """The uniform numbers that replace a random draw of the recorded run."""
    return fill.uniform(name, tuple(shape), case["seed"], dtype)


def _renamed(name: str, rename: Rename) -> str:
    if rename is None:
        return name
    return rename(name) if callable(rename) else rename.get(name, name)


def _param_value(name: str, shape: tuple[int, ...], seed: int, norm: bool) -> np.ndarray:
    """Numbers of one state_dict entry by the rule of this file (not that of ``fill.value``), float64."""
    z = fill.raw(name, shape, seed).astype(np.float32).astype(np.float64)
    leaf = name.split(".")[-1]
    if "queue" in name:
        return z / np.linalg.norm(z, axis=-1, keepdims=True)
    if leaf in ("weight_u", "weight_v"):
        return z / np.linalg.norm(z)
    if leaf == "running_var":
        return 1 + 0.1 * np.abs(z)
    if leaf in ("weight", "weight_bar") and len(shape) > 1:
        return z * np.sqrt(2 / np.prod(shape[1:]))
    return 1 + 0.1 * z if norm and leaf == "weight" else 0.1 * z


@torch.no_grad()
def fill_params(module: Module, case: Case, rename: Rename = None) -> Module:
    """Overwrite parameters and buffers by the reference's names; returns the module.

    rename: own state_dict name -> reference name, a function or a mapping of those that differ. Integer buffers become
    0. Asserts that the names and shapes are exactly the recorded ones.
    """
    state = {_renamed(name, rename): tensor for name, tensor in module.state_dict().items()}
    floating = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    shapes = {name: tuple(shape) for name, shape in case["params"]["shapes"].items()}
    assert {name: tuple(tensor.shape) for name, tensor in floating.items()} == shapes
    prefix = case["params"]["prefix"]
    for name, tensor in state.items():
        if name in floating:
            norm = name.rpartition(".")[0] + ".running_mean" in floating
            tensor.copy_(torch.from_numpy(_param_value(prefix + name, tuple(tensor.shape), case["seed"], norm)))
        else:
            tensor.zero_()
    return module


def _close(got: float, want: float, rtol: float, atol: float, what: str) -> None:
    assert abs(got - want) <= atol + rtol * abs(want), f"{what}: {got:.9g}, recorded {want:.9g}"


def check_gradient(grad: Tensor, want: Mapping[str, Any], what: str) -> None:
    """Assert that a gradient has the recorded norm and the recorded elements, at the precision of its dtype."""
    double = grad.dtype == torch.float64
    flat = grad.detach().double().reshape(-1)
    _close(float(flat.norm()), want["norm"], 1e-6 if double else 1e-3, 1e-12, f"{what} norm")
    spread = want["norm"] / flat.numel() ** 0.5
    rtol, atol = (1e-6, 1e-6 * spread + 1e-15) if double else (5e-3, 1e-3 * spread)
    for index, value in zip(want["index"], want["values"], strict=True):
        _close(float(flat[index]), value, rtol, atol, f"{what} [{index}]")


def check_losses(case: Case, losses: Mapping[str, Tensor], inputs: Mapping[str, Tensor],
                 module: nn.Module | None = None, rename: Rename = None) -> None:
    """Assert values, input gradients and (with a module) parameter gradient norms of every recorded loss.

    losses: {recorded name: scalar}, all of the case's; each is differentiated on its own. rename: as in
    :func:`fill_params`.
    """
    assert set(losses) == set(case["losses"])
    named = {_renamed(n, rename): p for n, p in module.named_parameters()} if module is not None else {}
    for name, loss in losses.items():
        double = loss.dtype == torch.float64
        _close(loss.item(), case["losses" if double else "losses_float32"][name], 1e-6 if double else 2e-4, 1e-12, name)
        wanted = case["grads"].get(name, {})
        norms = case.get("param_grad_norms", {}).get(name, {}) if module is not None else {}
        leaves = {**{role: inputs[role] for role in wanted}, **{p: named[p] for p in norms}}
        if not leaves:
            continue
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), retain_graph=True), strict=True))
        largest = max(norms.values(), default=0.0)
        for role, want in wanted.items():
            check_gradient(grads[role], want, f"{name} gradient of {role}")
        for parameter, norm in norms.items():
            # some norms are zero but for rounding, hence the allowance relative to the largest
            _close(float(grads[parameter].double().norm()), norm, 1e-6 if double else 1e-3,
                   (1e-12 if double else 1e-6) * largest, f"{name} gradient norm of {parameter}")
