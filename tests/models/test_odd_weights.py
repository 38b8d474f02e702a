"""Weights that would load and make nonsense: refused in one line that names file and tensor."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models import NetworkChoice, get_segmentation_model
from models.weights import load_weights, read_state_dict
from utils.errors import UserError


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return get_segmentation_model("deeplab_mobile", "mobilenetv2_w0.125", num_class=3)


@pytest.fixture(scope="module")
def names(net) -> dict[str, str]:
    """A convolution, a running variance and a counter of the network."""
    ends = {"weight": ".weight", "variance": "running_var", "counter": "num_batches_tracked"}
    return {kind: next(name for name in net.state_dict() if name.endswith(end)) for kind, end in ends.items()}


@pytest.mark.parametrize(("kind", "change", "message"), [
    ("weight", lambda x: x.to(torch.int8), "holds int8 values, expected floating-point numbers"),
    ("weight", lambda x: x > 0, "holds bool values, expected floating-point numbers"),
    ("weight", lambda x: x.to(torch.float8_e4m3fn), "holds float8_e4m3fn values"),
    ("weight", lambda x: x.double() * 1e300, "holds values that float32 cannot hold, up to"),
    ("weight", lambda x: torch.where(x == x.max(), float("nan"), x), "holds values that are not finite"),
    ("weight", lambda x: x.half() + float("inf"), "holds values that are not finite"),
    ("variance", lambda x: x - 2, "holds negative variances"),
    ("counter", lambda x: x > 0, "holds bool values, expected whole numbers")])
def test_odd_values_are_refused_by_name(net, names, tmp_path, kind, change, message) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.save({**before, names[kind]: change(before[names[kind]])}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=f"odd.pth: {names[kind]} {message}"):
        load_weights(net, tmp_path / "odd.pth")
    assert all(value.equal(before[name]) for name, value in net.state_dict().items()), "nothing was changed"


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_taken_over(net, tmp_path, kind) -> None:
    content = {k: v.to(kind) if v.is_floating_point() else v.int() for k, v in net.state_dict().items()}
    torch.save(content, tmp_path / "net.pth")
    load_weights(net, tmp_path / "net.pth")
    assert all(v.equal(content[k].to(v.dtype)) for k, v in net.state_dict().items())


def test_the_committed_teacher_is_taken_over() -> None:
    path = Path(__file__).parents[2] / "pretrained_ckpt" / "toy_streets_teacher.pth"
    assert torch.float16 in {value.dtype for value in read_state_dict(path).values()}
    NetworkChoice("deeplabv3", "resnet18_w0.375", pretrained=str(path)).build(11)
