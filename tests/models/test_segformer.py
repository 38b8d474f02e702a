"""SegFormer with mmsegmentation's names: the output equals that of its forward pass, written here on tensors by name,
and the backbone that of transformers; with CIRKD's names: all of it equals that of transformers. The released files
were not at hand: names and layout are those of the published code."""
from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import CAFFE_BGR, IMAGENET_RGB, get_segmentation_model
from models.outside import cirkd_segformer, segformer, suggestion
from models.torchvision_compat import import_torchvision
from utils.errors import UserError

DEPTHS = (1, 2, 1, 1)


class Forward:
    """mmsegmentation's forward pass of EncoderDecoder with MixVisionTransformer and SegformerHead, from a state dict
    alone, without any module of this repository."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.t = tensors

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.t[f"{name}.weight"], self.t[f"{name}.bias"], 1e-6)

    def conv(self, x: Tensor, name: str, **how) -> Tensor:
        return F.conv2d(x, self.t[f"{name}.weight"], self.t.get(f"{name}.bias"), **how)

    def conv_module(self, x: Tensor, name: str) -> Tensor:
        x = self.conv(x, f"{name}.conv")
        return F.batch_norm(x, *(self.t[f"{name}.bn.{of}"] for of in
                                 ("running_mean", "running_var", "weight", "bias"))).relu()

    def attention(self, x: Tensor, at: str, heads: int, ratio: int, h: int, w: int) -> Tensor:
        batch, count, width = x.shape
        seen = x
        if ratio > 1:
            seen = self.conv(x.transpose(1, 2).reshape(batch, width, h, w), f"{at}.sr", stride=ratio)
            seen = self.norm(seen.flatten(2).transpose(1, 2), f"{at}.norm")
        wq, wk, wv = self.t[f"{at}.attn.in_proj_weight"].split(width)
        bq, bk, bv = self.t[f"{at}.attn.in_proj_bias"].split(width)
        q, k, v = ((y @ weight.T + bias).view(batch, -1, heads, width // heads).transpose(1, 2)
                   for y, weight, bias in ((x, wq, bq), (seen, wk, bk), (seen, wv, bv)))
        shares = (q @ k.transpose(2, 3) / (width // heads) ** 0.5).softmax(-1)
        out = (shares @ v).transpose(1, 2).reshape(batch, count, width)
        return out @ self.t[f"{at}.attn.out_proj.weight"].T + self.t[f"{at}.attn.out_proj.bias"]

    def ffn(self, x: Tensor, at: str, h: int, w: int) -> Tensor:
        y = self.conv(x.transpose(1, 2).reshape(len(x), -1, h, w), f"{at}.layers.0")
        y = F.gelu(self.conv(y, f"{at}.layers.1", padding=1, groups=y.shape[1]))
        return self.conv(y, f"{at}.layers.4").flatten(2).transpose(1, 2)

    def backbone(self, x: Tensor) -> list[Tensor]:
        maps = []
        for i, (kernel, stride, heads, ratio) in enumerate(((7, 4, 1, 8), (3, 2, 2, 4), (3, 2, 5, 2), (3, 2, 8, 1))):
            at = f"backbone.layers.{i}"
            x = self.conv(x, f"{at}.0.projection", stride=stride, padding=kernel // 2)
            h, w = x.shape[2:]
            x = self.norm(x.flatten(2).transpose(1, 2), f"{at}.0.norm")
            for j in range(DEPTHS[i]):
                x = x + self.attention(self.norm(x, f"{at}.1.{j}.norm1"), f"{at}.1.{j}.attn", heads, ratio, h, w)
                x = x + self.ffn(self.norm(x, f"{at}.1.{j}.norm2"), f"{at}.1.{j}.ffn", h, w)
            x = self.norm(x, f"{at}.2").transpose(1, 2).reshape(len(x), -1, h, w)
            maps.append(x)
        return maps

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(logits, what the classifier reads, maps of the stages)."""
        maps = self.backbone(x)
        parts = [F.interpolate(self.conv_module(y, f"decode_head.convs.{i}"), maps[0].shape[2:], mode="bilinear",
                               align_corners=False) for i, y in enumerate(maps)]
        feature = self.conv_module(torch.cat(parts, 1), "decode_head.fusion_conv")
        return self.conv(feature, "decode_head.conv_seg"), feature, maps


@pytest.fixture
def tiny(monkeypatch) -> None:
    """The smallest of them, smaller still."""
    sizes = (segformer.Size(4, DEPTHS), *segformer.SIZES[1:])
    for module, width in ((segformer, "HEAD_WIDTH"), (cirkd_segformer, "NARROW")):
        monkeypatch.setattr(module, "SIZES", sizes)
        monkeypatch.setattr(module, width, 6)


def write_released(path, net: nn.Module) -> dict[str, Tensor]:
    """A file as the authors publish it, with random numbers; its tensors."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for key, value in net.state_dict().items():
        random = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        tensors[key] = value if value.dim() == 0 else random * (2 / value[0].numel()) ** 0.5 if value.dim() > 1 \
            else 1 + 0.3 * random.abs() if "running_var" in key or key.endswith("weight") else 0.3 * random
    torch.save({"meta": {"CLASSES": ("a", "b")}, "state_dict": tensors}, path)
    return tensors


def to_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone with the names of transformers 5."""
    renamed = {}
    for key, value in tensors.items():
        if not key.startswith("backbone.layers."):
            continue
        stage, part, rest = key.removeprefix("backbone.layers.").split(".", 2)
        at = f"stages.{stage}"
        if part == "0":
            name = rest.replace("projection", "proj").replace("norm", "layer_norm")
            renamed[f"{at}.patch_embeddings.{name}"] = value
        elif part == "2":
            renamed[f"{at}.layer_norm.{rest}"] = value
        elif "in_proj" in rest:
            block, kind = rest.partition(".")[0], rest.rpartition("_")[2]
            for name, piece in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{at}.blocks.{block}.attention.{name}_proj.{kind}"] = piece
        else:
            for old, new in (("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
                             ("attn.attn.out_proj", "attention.o_proj"),
                             ("attn.sr", "attention.sequence_reduction.sequence_reduction"),
                             ("attn.norm", "attention.sequence_reduction.layer_norm"), ("ffn.layers.0", "mlp.fc1"),
                             ("ffn.layers.1", "mlp.dwconv.dwconv"), ("ffn.layers.4", "mlp.fc2")):
                rest = rest.replace(old, new)
            renamed[f"{at}.blocks.{rest}"] = value.flatten(1) if ".fc" in rest and value.dim() == 4 else value
    return renamed


def test_the_forward_pass(tiny, tmp_path) -> None:
    tensors = write_released(tmp_path / "a.pth", segformer.Segformer(segformer.SIZES[0], 5))
    name = "mmseg:segformer_mit-b0_8x1_1024x1024_160k_cityscapes"
    net = get_segmentation_model(name, "", 5).double().eval()
    net.load_state_dict(tensors)
    x = torch.rand(2, 3, 75, 102, dtype=torch.float64)
    out, (logits, feature, maps) = net(x), Forward(tensors)(x)
    for got, expected in ((out.logits, logits), (out.head, feature), *zip(out[2:6], maps, strict=True)):
        assert expected.std() > 0.1
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    assert net.strides == {"logits": 4, "c1": 4, "c2": 8, "c3": 16, "c4": 32, "head": 4}
    assert net.preprocess == IMAGENET_RGB and suggestion(tensors) == "mmseg:segformer_mit-b0"
    read = get_segmentation_model(name, "", 5, pretrained=str(tmp_path / "a.pth")).eval()
    torch.testing.assert_close(read(x.float()).logits, logits.float(), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="a file of mmsegmentation, .*: it goes to the model mmseg:segformer_mit-b0$"):
        get_segmentation_model("psp", "resnet18_w0.125", 5, pretrained=str(tmp_path / "a.pth"))
    few = ("decode_head.fusion_conv.conv.weight", "backbone.layers.0.0.norm.weight")
    assert segformer.suggestion({key: tensors[key] for key in few}) is None


def test_the_backbone_is_that_of_transformers(tiny, tmp_path) -> None:
    import_torchvision()
    transformers = pytest.importorskip("transformers", minversion="5.0")
    tensors = write_released(tmp_path / "a.pth", segformer.Segformer(segformer.SIZES[0], 5))
    config = transformers.SegformerConfig(hidden_sizes=[4, 8, 20, 32], depths=list(DEPTHS))
    other = transformers.SegformerModel(config).double().eval()
    other.load_state_dict(to_transformers(tensors))
    for module in other.modules():
        if isinstance(module, nn.LayerNorm):  # 1e-5 there, whatever its configuration says
            module.eps = 1e-6
    net = get_segmentation_model("mmseg:segformer_mit-b0", "", 5).double().eval()
    net.load_state_dict(tensors)
    x = torch.rand(1, 3, 64, 96, dtype=torch.float64)
    wanted = other(x, output_hidden_states=True).hidden_states[-4:]
    for got, expected in zip(net(x)[2:6], wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def cirkd_to_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the names of transformers 5, whose convolution behind the scales has no bias."""
    renamed = {}
    for key, value in tensors.items():
        if match := re.fullmatch(r"(patch_embed|block|norm|linear_c)(\d)\.(.+)", key):
            kind, stage, rest = match[1], int(match[2]) - 1, match[3]
            if ".attn.kv." in key:
                block, what = rest.partition(".")[0], rest.rpartition(".")[2]
                for name, piece in zip("kv", value.chunk(2), strict=True):
                    renamed[f"segformer.stages.{stage}.blocks.{block}.attention.{name}_proj.{what}"] = piece
                continue
            for old, new in (("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
                             ("attn.q.", "attention.q_proj."),
                             ("attn.proj", "attention.o_proj"),
                             ("attn.norm", "attention.sequence_reduction.layer_norm"),
                             ("attn.sr", "attention.sequence_reduction.sequence_reduction")):
                rest = rest.replace(old, new)
            at = {"patch_embed": "patch_embeddings", "block": "blocks", "norm": "layer_norm"}.get(kind)
            rest = rest if kind != "patch_embed" else rest.replace("norm", "layer_norm")
            name = f"segformer.stages.{stage}.{at}.{rest}" if at else f"decode_head.linear_projections.{stage}.{rest}"
            renamed[name] = value
        elif key != "linear_fuse.0.bias":
            for old, new in (("linear_fuse.0", "linear_fuse"), ("linear_fuse.1", "batch_norm"),
                             ("linear_pred", "classifier")):
                key = key.replace(old, new)
            renamed[f"decode_head.{key}"] = value
    mean = "decode_head.batch_norm.running_mean"
    return renamed | {mean: renamed[mean] - tensors["linear_fuse.0.bias"]}


def test_cirkd(tiny, tmp_path) -> None:
    name = "cirkd:segformer_MiT_B0"
    tensors = write_released(tmp_path / "a.pth", cirkd_segformer.Segformer(cirkd_segformer.parse(name[6:]), 5))
    read = get_segmentation_model(name, "", 5, pretrained=str(tmp_path / "a.pth")).eval()
    assert read.strides == {"logits": 4, "c1": 4, "c2": 8, "c3": 16, "c4": 32, "head": 4}
    assert read.preprocess == CAFFE_BGR and suggestion(tensors) is None
    for wrong in ("segformer_MiT_B6", "deeplabv3"):
        with pytest.raises(UserError, match=f"cirkd:{wrong}: expected cirkd:segformer_MiT_B0 ... B5"):
            get_segmentation_model(f"cirkd:{wrong}", "", 5)
    import_torchvision()
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = transformers.SegformerConfig(hidden_sizes=[4, 8, 20, 32], depths=list(DEPTHS), decoder_hidden_size=6,
                                          num_labels=5)
    other = transformers.SegformerForSemanticSegmentation(config).double().eval()
    lost = other.load_state_dict(cirkd_to_transformers(tensors))
    assert not lost.missing_keys and not lost.unexpected_keys
    for path, module in other.named_modules():  # 1e-5 there, whatever its configuration says
        if re.search(r"layernorm_(before|after)$|stages\.\d\.layer_norm$", path):
            module.eps = 1e-6
    net = get_segmentation_model(name, "", 5).double().eval()
    net.load_state_dict(tensors)
    x = torch.rand(2, 3, 75, 102, dtype=torch.float64)
    out, wanted = net(x), other(x, output_hidden_states=True)
    for got, expected in ((out.logits, wanted.logits), *zip(out[2:6], wanted.hidden_states[-4:], strict=True)):
        assert expected.std() > 0.1
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(read(x.float()).logits, wanted.logits.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", ["cirkd:segformer_MiT_B0", "mmseg:segformer_mit-b0"])
def test_imagenet_files_fill_the_backbone(model, tiny, tmp_path) -> None:
    """A file of the backbone alone, with its classifier, and one of a whole network."""
    whole = write_released(tmp_path / "whole.pth", get_segmentation_model(model, "", 5).net)
    backbone = {key.removeprefix("backbone."): value for key, value in whole.items()
                if not key.startswith(("linear_", "decode_head."))}
    classifier = {"head.weight": torch.zeros(1000, 32), "head.bias": torch.zeros(1000)}
    torch.save(backbone | classifier, tmp_path / "mit_b0.pth")
    for name in ("mit_b0.pth", "whole.pth"):
        got = get_segmentation_model(model, "", 7, pretrained_base=str(tmp_path / name)).state_dict()
        inside = {key.removeprefix("backbone."): value for key, value in got.items()}
        assert len(backbone) > 90 and all(torch.equal(inside[key], value.float()) for key, value in backbone.items())
    torch.save({key: value for key, value in list(backbone.items())[20:]}, tmp_path / "part.pth")
    with pytest.raises(UserError, match="matches only .* tensors of .*'s backbone"):
        get_segmentation_model(model, "", 5, pretrained_base=str(tmp_path / "part.pth"))


def test_in_training_blocks_are_left_out_for_single_images(tiny) -> None:
    block = segformer.Block(8, 2, 1, dropped=0.5).train()
    x = torch.randn(64, 6, 8)
    torch.manual_seed(0)
    with torch.no_grad():
        changed = block.thin(x)
    share = changed / x
    assert set(share.unique().round(decimals=3).tolist()) == {0.0, 2.0}
    assert all(len(one.round(decimals=3).unique()) == 1 for one in share), "an image is left out as a whole"
    assert torch.equal(block.eval().thin(x), x)
    net = segformer.Segformer(segformer.SIZES[0], 5)
    rates = [block.dropped for stage in net.backbone.layers for block in stage[1]]
    assert rates[0] == 0 and rates == sorted(rates) and rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("model", ["cirkd:segformer_MiT_B0", "mmseg:segformer_mit-b0"])
def test_first_weights(model) -> None:
    """Also of the classifier, and no bias anywhere. The tolerance: of widths found from a few thousand numbers."""
    net = get_segmentation_model(model, "", 19).net
    layers = [layer for layer in net.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    assert len(layers) > 40
    for layer in layers:
        assert layer.bias is None or not layer.bias.any()
        width = 0.02 if isinstance(layer, nn.Linear) else \
            (2 * layer.groups / (layer.out_channels * layer.kernel_size[0] ** 2)) ** 0.5
        if model.startswith("mmseg") and layer is net.decode_head.conv_seg:
            width = 0.01
        count = layer.weight.numel()
        assert layer.weight.std().item() == pytest.approx(width, rel=6 / count ** 0.5), layer


def test_released_shapes() -> None:
    """At full width, on the meta device. count: of parameters, in millions."""
    for size, (first, last, count) in enumerate([(32, 256, 3.72), (64, 512, 13.68), (64, 512, 24.72),
                                                 (64, 512, 44.6), (64, 512, 61.37), (64, 512, 81.97)]):
        with torch.device("meta"):
            net = segformer.Segformer(segformer.SIZES[size], 19)
        tensors = net.state_dict()
        shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        for key, shape in {"backbone.layers.0.0.projection.weight": (first, 3, 7, 7),
                           "backbone.layers.0.1.0.attn.attn.in_proj_weight": (3 * first, first),
                           "backbone.layers.0.1.1.attn.sr.weight": (first, first, 8, 8),
                           "backbone.layers.3.1.0.attn.attn.out_proj.weight": (last, last),
                           "backbone.layers.3.1.0.ffn.layers.1.weight": (4 * last, 1, 3, 3),
                           "backbone.layers.3.2.bias": (last,), "decode_head.convs.3.conv.weight": (256, last, 1, 1),
                           "decode_head.fusion_conv.conv.weight": (256, 1024, 1, 1),
                           "decode_head.conv_seg.weight": (19, 256, 1, 1)}.items():
            assert shapes[key] == shape
        assert suggestion(tensors) == f"mmseg:segformer_mit-b{size}"
        if size not in (0, 4):
            continue
        with torch.device("meta"):
            other = cirkd_segformer.Segformer(cirkd_segformer.parse(f"segformer_MiT_B{size}"), 19).state_dict()
        assert other["block4.1.attn.kv.weight"].shape == (2 * last, last) and "block4.1.attn.sr.weight" not in other
        assert other["linear_fuse.0.weight"].shape == ((768, 3072, 1, 1) if size > 1 else (256, 1024, 1, 1))
        assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(count, abs=0.02), size
