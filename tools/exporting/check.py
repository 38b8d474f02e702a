"""An exported file beside the network that it was made of, on two sizes."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.predict import predict
from tools.exporting.graph import INPUT, Form, example_input, sizes_to_check
from utils.errors import UserError
from utils.extras import need

#: largest difference of a logit, times the largest logit where that is above 1
TOLERANCE = 1e-4
#: of onnxruntime, by device
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
#: a graph that has been loaded: from the input to the output
Graph = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Check:
    """How an exported file compares. max_difference: of the logits; of classes, how far the logit of the class found
    is below the largest one at most. agreement: share of positions of the same class. largest_logit: of PyTorch.
    sizes: [batch, height, width] of the inputs."""

    max_difference: float
    agreement: float
    largest_logit: float
    sizes: list[list[int]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for ``config.json``."""
        return {**asdict(self), "tolerance": TOLERANCE}


def load_pt2(path: Path, device: str = "cpu") -> Graph:
    """The graph of a file of ``torch.export.save``. device: "cpu" or "cuda"."""
    with open(path, "rb") as file:
        program = torch.export.load(file)
    if device != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    return program.module()


def load_onnx(path: Path, device: str = "cpu", threads: int = 0) -> Graph:
    """The graph of an ONNX file in onnxruntime, which takes and returns tensors of the CPU. threads: 0, as many as it
    likes. UserError when onnxruntime cannot use the device."""
    runtime, provider = need("onnxruntime", "export"), PROVIDERS[device]
    if provider not in runtime.get_available_providers():
        raise UserError(f"onnxruntime has no {provider}; expected the package onnxruntime-gpu for device {device}")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(str(path), options, providers=[provider])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(session.run(None, {INPUT: x.cpu().numpy()})[0]))

    return run


@torch.no_grad()
def check(net: nn.Module, form: Form, graph: Graph, divisor: int, what: str) -> Check:
    """Compare a loaded graph with the network in eval mode on the CPU. what: named in errors. UserError when they
    differ by more than ``TOLERANCE``, or the graph cannot be run on one of the sizes."""
    sizes, differences, same, largest, total = sizes_to_check(form, divisor), [], 0, 0.0, 0
    for size in sizes:
        images, x = example_input(net, form, size)
        expected = predict(net, images) if form.argmax else net(net.preprocess(images)).logits
        try:
            got = graph(x)
        except Exception as error:  # whatever a runtime raises
            raise UserError(f"{what}: cannot be run on {list(x.shape)} ({' '.join(str(error).split())[:200]})"
                            ) from error
        found = got.long() if form.argmax else got.argmax(1)
        if form.argmax:
            differences.append((expected.amax(1) - expected.gather(1, found[:, None])[:, 0]).max().item())
        else:
            differences.append((got - expected).abs().max().item())
        best = expected.argmax(1)
        same, total = same + int((found == best).sum()), total + best.numel()
        largest = max(largest, expected.abs().max().item())
    result = Check(max(differences), same / total, largest, [list(size) for size in sizes])
    if not result.max_difference <= TOLERANCE * max(1.0, largest):
        raise UserError(f"{what}: differs from PyTorch by {result.max_difference:.3g} (logits up to {largest:.3g}), "
                        f"more than {TOLERANCE:g}; it is not written")
    return result
