"""Two processes: batch norm over both halves of a batch equals one batch norm over the whole, gradients included."""
from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.distributed import Distributed, cleanup, init_distributed, synchronize_batch_norm


def main() -> None:
    distributed = init_distributed(no_cuda=True)
    compare(distributed)
    cleanup()


def compare(distributed: Distributed) -> None:
    torch.manual_seed(0)
    whole = torch.randn(4, 3, 5, 7, dtype=torch.float64)
    weight = torch.randn_like(whole)
    plain = nn.BatchNorm2d(3).double()
    nn.init.normal_(plain.weight), nn.init.normal_(plain.bias)
    shared = synchronize_batch_norm(nn.Sequential(nn.BatchNorm2d(3).double()), distributed.device)
    shared[0].load_state_dict(plain.state_dict())

    expected_input = whole.clone().requires_grad_()
    expected = plain(expected_input)
    (expected * weight).sum().backward()

    part = slice(2 * distributed.rank, 2 * distributed.rank + 2)
    mine = whole[part].clone().requires_grad_()
    output = shared(mine)
    (output * weight[part]).sum().backward()
    assert torch.allclose(output, expected[part], atol=1e-12)
    assert torch.allclose(mine.grad, expected_input.grad[part], atol=1e-12)
    for name, parameter in shared[0].named_parameters():
        dist.all_reduce(parameter.grad)
        assert torch.allclose(parameter.grad, dict(plain.named_parameters())[name].grad, atol=1e-12), name
    for name, buffer in shared[0].named_buffers():
        assert torch.allclose(buffer.double(), dict(plain.named_buffers())[name].double(), atol=1e-12), name


if __name__ == "__main__":
    main()
