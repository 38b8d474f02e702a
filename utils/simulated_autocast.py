"""Autocast on a simulated GPU (``utils/simulated_gpu.py``): PyTorch's own asks C++ whether a tensor is on the GPU.

The lists are PyTorch's, as far as this repository uses them. What PyTorch sums in float32 without a copy (``sum``,
``softmax`` and the like) is copied here.
"""
from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_KEY = "AutocastCUDA"
#: computed in the half precision
HALF = ("_convolution", "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose2d", "prelu", "addmm", "addmv",
        "matmul", "einsum", "mm", "mv", "linear", "addbmm", "baddbmm", "bmm", "scaled_dot_product_attention")
#: computed in float32
FULL = ("acos", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "pow", "softplus", "layer_norm",
        "group_norm", "cosine_similarity", "nll_loss", "nll_loss2d", "kl_div", "l1_loss", "smooth_l1_loss", "mse_loss",
        "binary_cross_entropy_with_logits", "dist", "pdist", "cdist", "logsumexp", "upsample_nearest2d",
        "upsample_bilinear2d", "prod", "softmax", "log_softmax", "cumsum", "cumprod", "linalg_vector_norm", "norm",
        "sum")


def _kernel(op: Any, half: bool) -> Any:
    """What stands for ``op`` under autocast."""
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _KEY))

    def cast(x: Any) -> Any:
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.device.type == "cuda"):
            return x
        wanted = torch.get_autocast_dtype("cuda") if half else torch.float32
        return x if x.dtype in (wanted, torch.float64) else x.to(wanted)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            args, kwargs = tree_map(cast, (args, kwargs))
            return op(*args, **kwargs)

    return run


def _register(library: torch.library.Library) -> None:
    for names, half in ((HALF, True), (FULL, False)):
        for name in names:
            packet = getattr(torch.ops.aten, name)
            for overload in packet.overloads():
                if "out" not in overload:
                    library.impl(name if overload == "default" else f"{name}.{overload}",
                                 _kernel(getattr(packet, overload), half), _KEY, allow_override=True)


@contextmanager
def simulated_autocast() -> Iterator[None]:
    """Inside, ``torch.autocast("cuda", ...)`` casts tensors of a simulated GPU."""
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # each says that it replaces PyTorch's
            _register(library)
        yield
    finally:
        library._destroy()
