"""Networks made ready for speed: weights in channels-last order, and a teacher that only has to be run forward."""
from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.output import SegOutput
from utils.errors import UserError

#: half precisions by the names that flags give them
HALF_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def check_precision(precisions: Collection[torch.dtype | None], device: torch.device) -> None:
    """UserError when one is bfloat16 and the device is a GPU that only emulates it."""
    if torch.bfloat16 in precisions and device.type == "cuda" \
            and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"{torch.cuda.get_device_name(device)} does not compute in bfloat16: use fp16 in place of bf16",
                        settings=["amp"])


class PlainOrderDropout(nn.Dropout):
    """Dropout that draws the same mask for a map [B, C, h, w] however it is laid out. torch draws in the order of
    memory."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.is_contiguous():
            return super().forward(x)
        kept = 1 - self.p
        # divided last: 1 / 0.9 is no number of bfloat16, which would make all maps 0.2 % smaller
        return x * torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(kept) / kept


class SubsampledConv2d(nn.Conv2d):
    """A 1x1 convolution with a stride, as one without a stride over every so many pixels: the same numbers."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.stride
        return F.conv2d(x[:, :, ::rows, ::columns], self.weight, self.bias)


def _is_unsafe(child: nn.Module) -> bool:
    """Whether oneDNN (of PyTorch 2.13, with AVX-512) writes past the gradient of the weight in channels-last order: a
    1x1 convolution with a stride and fewer than 16 channels, as in the shortcuts of very narrow ResNets."""
    return (type(child) is nn.Conv2d and child.kernel_size == (1, 1) and child.stride != (1, 1)
            and child.padding == (0, 0) and child.groups == 1 and child.in_channels < 16)


def to_channels_last(module: nn.Module) -> nn.Module:
    """Lay out the weights of every convolution as [out, height, width, in], in place; shapes and values stay."""
    for child in module.modules():
        if type(child) is nn.Dropout:
            child.__class__ = PlainOrderDropout
        if _is_unsafe(child):
            child.__class__ = SubsampledConv2d
        if isinstance(child, nn.Conv2d) and "weight" in child._parameters:  # not one whose weight is computed
            child.weight.data = child.weight.data.contiguous(memory_format=torch.channels_last)
    return module


def _convolutions_before_norms(net: nn.Module) -> Iterator[tuple[nn.Conv2d, nn.Module, str]]:
    """(convolution, the module that holds the norm behind it, the norm's name there): neighbors in a sequence, or
    ``conv1`` and ``bn1`` of one module."""
    for parent in net.modules():
        children = dict(parent.named_children())
        if isinstance(parent, nn.Sequential):
            names = list(children)
            pairs = zip(names[:-1], names[1:], strict=True)
        else:
            pairs = ((f"conv{name[2:]}", name) for name in children if name.startswith("bn"))
        for conv, norm in pairs:
            if isinstance(children.get(conv), nn.Conv2d) and isinstance(children[norm], BATCH_NORMS):
                yield children[conv], parent, norm


@torch.no_grad()
def fold_batch_norms(net: nn.Module) -> nn.Module:
    """Put the batch norms of a network in eval mode into the convolutions before them, in place. The result is the same
    up to rounding, and cannot be trained."""
    for conv, parent, name in list(_convolutions_before_norms(net)):
        norm = getattr(parent, name)
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        shift = norm.bias.double() - norm.running_mean.double() * scale
        if conv.bias is not None:
            shift += conv.bias.double() * scale
        conv.weight.copy_(conv.weight.double() * scale[:, None, None, None])
        conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=False)
        setattr(parent, name, nn.Identity())
    return net


class Unread(nn.Module):
    """Stands for a head that nobody reads."""

    def forward(self, x: Tensor) -> tuple[None, None]:
        return None, None


class PreparedTeacher(nn.Module):
    """A frozen network in eval mode, which it takes over: without the heads that are not read, and with batch norms
    folded into convolutions.

    taps: the fields of ``SegOutput`` that are read, and that ``channels`` holds; the others are None. dtype: half
    precision of the convolutions, None as the weights. output_dtype: of the output, None as it is computed. fold:
    whether to fold. The other attributes are those of the network. Autocast has no effect inside, but for networks
    that are not ``own``: those run whole and unfolded, in half precision by autocast."""

    def __init__(self, net: nn.Module, taps: Collection[str], dtype: torch.dtype | None = None,
                 output_dtype: torch.dtype | None = None, fold: bool = True) -> None:
        super().__init__()
        self.channels = {tap: count for tap, count in net.channels.items() if tap in taps}
        self.dtype, self.output_dtype, self.own = dtype, output_dtype, net.own
        self.name, self.num_class, self.output_stride = net.name, net.num_class, net.output_stride
        self.strides, self.preprocess = net.strides, net.preprocess
        self.net = net
        if not net.own:
            return
        if net.aux and "aux" not in taps:
            net.aux = False
            del net.auxlayer
        if not {"logits", "head"} & set(taps):
            net.head = Unread()
        if fold:
            fold_batch_norms(net)
        for module in net.modules():
            if dtype is not None and isinstance(module, nn.Conv2d):  # a batch norm takes half precision as it is
                module.to(dtype)

    def forward(self, x: Tensor) -> SegOutput:
        """As of the network: float images [B, 3, H, W] -> maps."""
        with torch.autocast(x.device.type, self.dtype, enabled=not self.own and self.dtype is not None):
            output = self.net(x.to(self.dtype) if self.own and self.dtype is not None else x)
        read = {tap: value if tap in self.channels else None for tap, value in output._asdict().items()}
        if self.output_dtype is not None:
            read = {tap: value if value is None else value.to(self.output_dtype) for tap, value in read.items()}
        return SegOutput(**read)


class StoredTeacher(nn.Module):
    """Stands for a network whose outputs are stored: it gets them in place of images. taps: {field of ``SegOutput``:
    channels} of what is stored, in order. The attributes are those of the network."""

    def __init__(self, net: nn.Module, taps: Mapping[str, int]) -> None:
        super().__init__()
        self.channels, self.name, self.num_class = dict(taps), net.name, net.num_class
        self.output_stride, self.strides, self.preprocess = net.output_stride, net.strides, net.preprocess

    def forward(self, stored: Tensor) -> SegOutput:
        """The stored outputs [B, C, h, w] as maps, in the default precision."""
        parts = stored.to(torch.get_default_dtype()).split(list(self.channels.values()), dim=1)
        return SegOutput(**{**dict.fromkeys(SegOutput._fields), **dict(zip(self.channels, parts, strict=True))})
