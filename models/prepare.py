"""Networks made ready for speed: weights in channels-last order, and a teacher that only has to be run forward."""
from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from models.output import SegOutput


def to_channels_last(module: nn.Module) -> nn.Module:
    """Lay out the weights of every convolution as [out, height, width, in], in place; shapes and values stay."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
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
            if isinstance(children.get(conv), nn.Conv2d) and isinstance(children[norm], nn.BatchNorm2d):
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

    taps: the fields of ``SegOutput`` that are read; those of other heads are None. dtype: half precision of
    convolutions and outputs, None as the weights. fold: whether to fold. The attributes are those of the network, but
    ``channels`` has no tap that is None any more. Autocast has no effect inside."""

    def __init__(self, net: nn.Module, taps: Collection[str], dtype: torch.dtype | None = None,
                 fold: bool = True) -> None:
        super().__init__()
        if net.aux and "aux" not in taps:
            net.aux = False
            del net.auxlayer
        if not {"logits", "head"} & set(taps):
            net.head = Unread()
        if fold:
            fold_batch_norms(net)
        self.net, self.dtype = net, dtype
        gone = {"aux"} if not net.aux else set()
        gone |= {"logits", "head"} if isinstance(net.head, Unread) else set()
        self.channels = {tap: count for tap, count in net.channels.items() if tap not in gone}
        self.name, self.num_class, self.output_stride = net.name, net.num_class, net.output_stride
        self.preprocess, self.aux = net.preprocess, net.aux
        if dtype is not None:
            for module in net.modules():
                if isinstance(module, nn.Conv2d):  # a batch norm that was not folded takes half precision, as it is
                    module.to(dtype)

    def forward(self, x: Tensor) -> SegOutput:
        """As of the network: float images [B, 3, H, W] -> maps of ``dtype``."""
        with torch.autocast(x.device.type, enabled=False):
            return self.net(x if self.dtype is None else x.to(self.dtype))
