"""A network as one graph, for any batch and any size: traced by ``torch.export``, written as .pt2 or ONNX."""
from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.overrides import TorchFunctionMode

from engine.evaluate import prepare_for_inference
from utils.errors import UserError
from utils.extras import need
from utils.tensor_files import first_line

DIVISORS = (1, 2, 4, 8, 16, 32, 64)
#: (height, width) of the example that is traced, before it is rounded up; they share no factor
EXAMPLE = (97, 131)
INPUT = "image"
#: pixels of a side that a graph takes at least: the first that a network can be traced for
LEASTS = (16, 32, 64)


@dataclass(frozen=True)
class Form:
    """What is inside an exported graph. preprocessing: it takes uint8 RGB pictures [B, H, W, 3]; else what
    ``net.preprocess`` returns, float32 [B, 3, H, W]. argmax: it returns classes [B, H, W]; else logits at the stride
    of the network. size: (height, width) of all pictures, None for any."""

    preprocessing: bool = False
    argmax: bool = False
    size: tuple[int, int] | None = None


class PoolingByProducts(TorchFunctionMode):
    """Inside, adaptive average pooling is two matrix products, whose factors exporters can write down for any size."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.adaptive_avg_pool2d:
            return pool_by_products(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def pool_by_products(input: Tensor, output_size: int | tuple[int | None, int | None]) -> Tensor:
    """``F.adaptive_avg_pool2d`` of a map [B, C, h, w], up to rounding."""
    rows, columns = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
    if rows == columns == 1:
        return input.mean((2, 3), keepdim=True)
    height, width = input.shape[2:]
    if rows is not None:
        input = _averages(rows, height, input) @ input
    return input if columns is None else input @ _averages(columns, width, input).T


def _averages(bins: int, side: int, like: Tensor) -> Tensor:
    """[bins, side]: row i averages the positions from floor(i * side / bins) to ceil((i + 1) * side / bins)."""
    i = torch.arange(bins, device=like.device).unsqueeze(1)
    position = torch.arange(side, device=like.device)
    start, end = i * side // bins, ((i + 1) * side + bins - 1) // bins
    return ((position >= start) & (position < end)).to(like.dtype) / (end - start).to(like.dtype)


class Deployable(nn.Module):
    """A network as it leaves: a prepared copy, with what ``form`` wants around it."""

    def __init__(self, net: nn.Module, form: Form) -> None:
        super().__init__()
        self.net, self.form = prepare_for_inference(net, channels_last=False), form
        self.bgr, self.scale = net.preprocess.channel_order == "bgr", net.preprocess.scale
        self.kind = torch.uint8 if net.num_class <= 256 else torch.int16
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(net.preprocess, name)).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """See :class:`Form`."""
        x = image
        if self.form.preprocessing:  # as Preprocess, in the same order
            x = image.permute(0, 3, 1, 2)
            x = ((x.flip(1) if self.bgr else x).to(torch.float32) / self.scale - self.mean) / self.std
        with PoolingByProducts():
            logits = self.net(x).logits
        if not self.form.argmax:
            return logits
        return F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=True).argmax(1).to(self.kind)


def input_divisor(net: nn.Module) -> int:
    """What height and width of a network's input have to be multiples of: its attribute ``multiple``, where it pads by
    itself, which a graph does not; else found by asking it. UserError when it takes none of the tried sizes."""
    if getattr(net, "multiple", 1) > 1:
        return net.multiple
    for divisor in DIVISORS:
        try:
            with torch.no_grad():
                net(torch.zeros(1, 3, *_rounded((64, 96), divisor, odd=True)))
            return divisor
        except (RuntimeError, ValueError, AssertionError, UserError) as error:
            reason = error
    raise UserError(f"{net.name}: takes no picture whose sides are multiples of {DIVISORS[-1]} ({first_line(reason)})")


def _rounded(size: tuple[int, int], divisor: int, odd: bool = False) -> tuple[int, int]:
    """The next multiples of the divisor; odd: odd multiples, which no larger power of two divides."""
    height, width = ((-(-side // divisor) | odd) * divisor for side in size)
    return height, width


def sizes_to_check(form: Form, divisor: int) -> list[tuple[int, int, int]]:
    """Two (batch, height, width) on which an export is compared; the first is that of the traced example."""
    if form.size is not None:
        return [(2, *form.size), (1, *form.size)]
    return [(2, *_rounded(EXAMPLE, divisor)), (1, *_rounded((160, 75), divisor))]


def example_input(net: nn.Module, form: Form, size: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """(soft random pictures uint8 [B, 3, H, W] BGR, the same as the graph takes them)."""
    batch, height, width = size
    coarse = torch.rand(batch, 3, -(-height // 16), -(-width // 16), generator=torch.Generator().manual_seed(0))
    images = (255 * F.interpolate(coarse, (height, width), mode="bilinear")).to(torch.uint8)
    return images, images.flip(1).permute(0, 2, 3, 1).contiguous() if form.preprocessing else net.preprocess(images)


def free_axes(form: Form) -> dict[int, str]:
    """{axis: name} of what may differ from call to call."""
    rows = 1 if form.preprocessing else 2
    return {0: "batch"} | ({rows: "height", rows + 1: "width"} if form.size is None else {})


class Traced(NamedTuple):
    """A graph. least: pixels that a side of its input has at least."""

    program: ExportedProgram
    least: int


def trace(net: nn.Module, form: Form, divisor: int) -> Traced:
    """The graph of a network in eval mode on the CPU. UserError, naming the network, when it cannot be traced."""
    _, example = example_input(net, form, sizes_to_check(form, divisor)[0])
    advice = "; a single size may be possible: --size H W" if form.size is None else ""
    for least in LEASTS:
        least = max(2, -(-least // divisor)) * divisor
        dims = {0: Dim("batch", min=1)}
        dims |= {axis: Dim(name, min=least) if divisor == 1
                 else divisor * Dim(f"{name}_{divisor}", min=least // divisor)
                 for axis, name in free_axes(form).items() if axis}
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                program = torch.export.export(Deployable(net, form).eval(), (example,), dynamic_shapes=(dims,))
                return Traced(program, least)
        except Exception as error:  # torch has no common class for what it cannot trace
            reason = error
            if form.size is not None or "Constraints violated" not in str(error):  # which larger sides may mend
                break
    raise UserError(f"{net.name}: cannot be traced by torch.export ({first_line(reason)}){advice}") from reason


def write_pt2(program: ExportedProgram, path: Path) -> None:
    """Write a graph for ``torch.export.load``."""
    with open(path, "wb") as file:
        torch.export.save(program, file)


def write_onnx(program: ExportedProgram, form: Form, path: Path) -> int:
    """Write a graph as one ONNX file; its version of the operator set. UserError when an operation has no form in
    ONNX."""
    need("onnxscript", "export")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = torch.onnx.export(program, dynamo=True, verbose=False, input_names=[INPUT],
                                     output_names=[output_name(form)], dynamic_shapes={INPUT: free_axes(form)})
    except Exception as error:  # of torch, onnxscript or onnx
        raise UserError(f"torch.onnx.export cannot write this network ({first_line(error)})") from error
    made.save(path, external_data=False)
    return made.model.opset_imports[""]


def output_name(form: Form) -> str:
    """Of the graph's output."""
    return "classes" if form.argmax else "logits"


def describe_form(net: nn.Module, form: Form, least: int = LEASTS[0]) -> dict[str, Any]:
    """Input and output of a graph, for ``config.json``. least: see :class:`Traced`."""
    sides = ["height", "width"] if form.size is None else list(form.size)
    order = "rgb" if form.preprocessing else net.preprocess.channel_order
    shape = ["batch", *sides, 3] if form.preprocessing else ["batch", 3, *sides]
    given = {"name": INPUT, "dtype": "uint8" if form.preprocessing else "float32", "shape": shape,
             "channel_order": order, "preprocessing": "inside" if form.preprocessing else "outside"}
    if form.size is None:
        given["least_side"] = least
    if form.argmax:
        kind = "uint8" if net.num_class <= 256 else "int16"
        return {"input": given, "output": {"name": output_name(form), "dtype": kind, "shape": ["batch", *sides]}}
    stride = net.output_stride
    return {"input": given, "output": {"name": output_name(form), "dtype": "float32", "shape": [
        "batch", net.num_class, *(f"ceil({side}/{stride})" if form.size is None else -(-side // stride)
                                  for side in sides)]}}
