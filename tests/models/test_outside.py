"""Networks of other libraries: their taps, their weights, and that they train and are evaluated like our own."""
from __future__ import annotations

import shlex
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    CLASSES,
    STUDENT,
    assert_refused,
    distil_arguments,
    train_arguments,
    write_folder_dataset,
    write_teacher,
)
from torch import nn

import eval as evaluation
import train_kd
from examples.espnet import ESPNet
from losses.core.facts import Batch, NetInfo
from losses.core.needs import Needs, taps_to_resize
from losses.core.objective import Objective, resize_maps
from losses.kd import KD
from models import NetworkChoice, SegOutput, get_segmentation_model, load_weights, save_state_dict
from models.class_map import ClassMap, MappedTeacher
from models.class_names import KnownClasses, classes_of
from models.heads import resize
from models.outside import OutsideNet, brings_weights, candidates, parse_taps
from models.outside.huggingface import class_scores
from models.outside.net import Outside, first_tensor
from models.outside.taps import Layout
from models.prepare import PreparedTeacher
from models.preprocess import IMAGENET_RGB
from models.torchvision_compat import import_torchvision
from utils.errors import UserError

ESP = "module:examples.espnet:ESPNet"


def espnet(num_class: int = CLASSES, **more) -> OutsideNet:
    """ESPNet scores one class more than it puts out."""
    torch.manual_seed(0)
    return OutsideNet("esp", Outside(ESPNet(num_class + 1, p=1, q=1), ESPNet.taps, multiple=8), num_class, **more)


class TestTaps:
    def test_maps_are_those_that_pass_in_the_network(self) -> None:
        net = espnet(taps={"c3": "encoder.level3_0", "head": "classifier:in"}).eval()
        x = torch.randn(2, 3, 64, 96)
        out = net(x)
        assert not net.catcher.caught, "a second pass must not see the maps of the first"
        first, second, third = net.net.encoder(x)
        for name, value in {"c1": first, "c2": second, "c4": third, "logits": net.net(x)}.items():
            assert torch.equal(getattr(out, name), value), name
        assert out.aux is None and out.head.shape == (2, CLASSES + 1, 32, 48)
        assert net.strides == {"logits": 1, "c1": 2, "c2": 4, "c3": 8, "c4": 8, "head": 2}
        assert net.channels == {"logits": CLASSES, "c1": 19, "c2": 131, "c3": 128, "c4": 256, "head": CLASSES + 1}

    def test_images_of_any_size_are_padded_and_the_maps_cut(self) -> None:
        net, x = espnet().eval(), torch.randn(1, 3, 61, 90)
        out = net(x)
        whole = net(nn.functional.pad(x, (0, 6, 0, 3)))
        assert out.logits.shape[2:] == (61, 90) and out.c4.shape[2:] == (8, 12)
        assert torch.equal(out.logits, whole.logits[:, :, :61, :90])

    def test_what_fails_for_another_reason_than_the_size_is_not_blamed_on_it(self) -> None:
        net = espnet().eval().double()
        with pytest.raises(RuntimeError, match="(?i)double"):
            net(torch.zeros(1, 3, 64, 96))

    def test_several_outputs_have_numbers(self) -> None:
        class Several(nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.head = Body(), nn.Conv2d(4, CLASSES, 1)

            def forward(self, x):
                return {"out": self.head(self.body(x)["maps"][1])}

        class Body(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 3, stride=4, padding=1)

            def forward(self, x):
                y = self.conv(x)
                return {"maps": (x, y)}

        net = OutsideNet("several", Outside(Several(), {"c1": "body[1]", "c2": "body.conv"}), CLASSES)
        out = net(torch.randn(1, 3, 32, 32))
        assert torch.equal(out.c1, out.c2) and net.strides["c1"] == 4
        assert [path for path, _ in candidates(net.net, 32)] == ["body.conv", "body[0]", "body[1]", "head"]
        with pytest.raises(UserError, match=r"c1=body\[2\], but that module returns 2 tensors"):
            OutsideNet("several", Outside(Several(), {"c1": "body[2]"}), CLASSES)

    def test_tokens_become_maps(self) -> None:
        tokens = torch.arange(2 * 25 * 3.0).view(2, 25, 3)  # one class token and 4 x 6 of the image
        layout = Layout.of(tokens, (64, 96), "c4")
        out = layout.map(tokens, (64, 96), "c4")
        assert layout == ("tokens", 16, 1)
        assert layout.map(torch.zeros(1, 1 + 31 * 31, 8), (500, 500), "c4").shape == (1, 8, 31, 31), "rounded down"
        with pytest.raises(UserError, match="c4: 24 tokens of an image of 80x96, expected 5 x 6 at stride 16"):
            layout.map(tokens, (80, 96), "c4")
        assert out.shape == (2, 3, 4, 6) and torch.equal(out[1, :, 2, 5], tokens[1, 1 + 2 * 6 + 5])
        last = torch.randn(2, 4, 6, 3)
        layout = Layout.of(last, (64, 96), "c4")
        assert torch.equal(layout.map(last, (64, 96), "c4"), last.permute(0, 3, 1, 2))
        square = torch.randn(1, 4, 4, 4)  # which the sides alone do not tell
        assert torch.equal(layout.map(square, (64, 64), "c4"), square.permute(0, 3, 1, 2))
        with pytest.raises(UserError, match=r"c4: expected a map .* got \[2, 3\]"):
            Layout.of(torch.zeros(2, 3), (64, 96), "c4")

    @pytest.mark.parametrize(("text", "message"), [
        ("c4", "expected NAME=PATH"), ("c5=x", "names among logits, aux, c1"), ("c4=a,c4=b", "c4 is given twice"),
        ("c4=a b", "got 'b'"), ("c4=a[x]", "expected the path of a submodule")])
    def test_what_is_no_tap_is_refused(self, text, message) -> None:
        with pytest.raises(UserError, match=message):
            parse_taps(text)

    def test_a_path_that_is_not_there_is_answered_with_those_that_are(self) -> None:
        assert parse_taps("c4=a.b, head=c:in") == {"c4": "a.b", "head": "c:in"} and parse_taps(None) == {}
        with pytest.raises(UserError, match=r"no submodule 'encoder.b9' for tap c4 \(there is e.g. .*--list-taps"):
            espnet(taps={"c4": "encoder.b9"})


class TestWeights:
    def test_tensors_keep_the_names_of_the_network_itself(self, tmp_path) -> None:
        net = espnet()
        assert list(net.state_dict()) == list(net.net.state_dict())
        holder, other = nn.Sequential(net), nn.Sequential(espnet())
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(1)
        other.load_state_dict(holder.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), holder.parameters(), strict=True))
        save_state_dict(net, tmp_path / "a.pth")
        again = espnet()
        load_weights(again, tmp_path / "a.pth")
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), net.parameters(), strict=True))
        assert torch.load(tmp_path / "a.pth", weights_only=True).keys() == net.net.state_dict().keys()

    def test_an_imagenet_file_of_torchvision_starts_an_encoder_of_smp(self, tmp_path) -> None:
        import_torchvision()
        pytest.importorskip("segmentation_models_pytorch")
        from torchvision.models import resnet18

        whole = resnet18(weights=None)
        torch.save(whole.state_dict(), tmp_path / "w.pth")
        net = get_segmentation_model("smp:FPN:resnet18", "", CLASSES, pretrained_base=str(tmp_path / "w.pth"))
        assert torch.equal(net.net.encoder.conv1.weight, whole.conv1.weight) and net.preprocess == IMAGENET_RGB

    def test_timm_reads_its_own_files(self, tmp_path) -> None:
        import_torchvision()
        timm = pytest.importorskip("timm")
        torch.manual_seed(1)
        whole = timm.create_model("mobilenetv3_small_050", pretrained=False).eval()
        torch.save(whole.state_dict(), tmp_path / "w.pth")
        net = get_segmentation_model("deeplabv3", "timm:mobilenetv3_small_050", CLASSES,
                                     pretrained_base=str(tmp_path / "w.pth")).eval()
        assert torch.equal(net.pretrained.net.conv_stem.weight, whole.conv_stem.weight)
        out = net(torch.randn(2, 3, 64, 64))
        assert {tap: 64 // getattr(out, tap).shape[2] for tap in net.strides} == net.strides
        assert net.strides["c4"] == net.output_stride == 8 and not net.own
        (tmp_path / "bad.pth").write_bytes(b"nothing")
        with pytest.raises(UserError, match="timm:mobilenetv3_small_050"):
            get_segmentation_model("psp", "timm:mobilenetv3_small_050", CLASSES,
                                   pretrained_base=str(tmp_path / "bad.pth"))


class TestSources:
    @pytest.mark.parametrize(("model", "backbone", "message"), [
        ("nowhere:x", "", "unknown source 'nowhere', expected one of smp:, tv:, hf:, mmseg:, cirkd:, module:"),
        ("tv:nothing", "", "expected one of deeplabv3_mobilenet"),
        ("module:examples.espnet", "", "expected module:PACKAGE.FILE:CALLABLE"),
        ("module:examples.nothing:f", "", "No module named"), ("module:examples.espnet:nothing", "", "no attribute"),
        ("module:examples.espnet:DILATIONS", "", "not callable"), ("module:builtins:dict", "", "expected an nn.Module"),
        ("module:torch.nn:Identity", "", "module:torch.nn:Identity"), (ESP, "", "scores 4 classes, 5 were asked for"),
        ("deeplabv3", "timm:swin_tiny_patch4_window7_224", "cannot be dilated"),
        ("deeplabv3", "timm:nothing", "no such network"), ("deeplabv3", "vgg", "or timm:NAME"),
        ("alexnet", "", "or SOURCE:NAME")])
    def test_what_cannot_be_built_is_one_line(self, model, backbone, message) -> None:
        with pytest.raises(UserError, match=message) as refused:
            get_segmentation_model(model, backbone, CLASSES)
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize(("model", "backbone", "package"), [
        ("smp:Unet:resnet18", "", "segmentation_models_pytorch"), ("hf:x", "", "transformers"),
        ("deeplabv3", "timm:mobilenetv3_small_050", "timm")])
    def test_a_missing_library_is_named(self, model, backbone, package, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=f"{package} cannot be imported .*pip install"):
            get_segmentation_model(model, backbone, CLASSES)

    def test_options_that_have_no_meaning_are_refused(self) -> None:
        with pytest.raises(UserError, match="takes no backbone weights"):
            get_segmentation_model("module:examples.espnet:camvid", "", 11, pretrained_base="x.pth")
        with pytest.raises(UserError, match="only for networks of other libraries"):
            get_segmentation_model("deeplab_mobile", "mobilenetv2_w0.25", CLASSES, taps="c4=head")

    def test_segmentation_models_pytorch(self) -> None:
        import_torchvision()
        pytest.importorskip("segmentation_models_pytorch")
        net = get_segmentation_model("smp:FPN:resnet18", "", CLASSES).eval()
        assert net.strides == {"logits": 1, "c1": 4, "c2": 8, "c3": 16, "c4": 32, "head": 4}
        assert net(torch.randn(1, 3, 50, 70)).logits.shape[2:] == (50, 70)
        with pytest.raises(UserError, match="expected smp:ARCHITECTURE:ENCODER"):
            get_segmentation_model("smp:Nothing:resnet18", "", CLASSES)

    def test_a_folder_of_segmentation_models_pytorch(self, tmp_path) -> None:
        import_torchvision()
        package = pytest.importorskip("segmentation_models_pytorch")
        saved = package.create_model("FPN", "resnet18", encoder_weights=None, classes=CLASSES).eval()
        saved.save_pretrained(str(tmp_path / "left"))
        name = f"smp:{tmp_path / 'left'}"
        net, x = get_segmentation_model(name, "", CLASSES).eval(), torch.randn(1, 3, 64, 64)
        assert torch.equal(net(x).logits, saved(x)) and brings_weights(name) and not brings_weights("smp:FPN:resnet18")
        (tmp_path / "left" / "config.json").write_text("{}")
        with pytest.raises(UserError, match="or a folder of its save_pretrained"):
            get_segmentation_model(name, "", CLASSES)

    def test_torchvision(self, tmp_path) -> None:
        net = get_segmentation_model("tv:lraspp_mobilenet_v3_large", "", CLASSES)
        assert net.strides == {"logits": 1, "c3": 8, "c4": 16, "head": 16} and net.num_class == CLASSES
        with pytest.raises(UserError, match="w.pth: matches only 0 of the"):
            torch.save({"other": torch.zeros(1)}, tmp_path / "w.pth")
            load_weights(net, tmp_path / "w.pth", "backbone")
        torch.save({f"features.{k}": torch.full_like(v, 0.5) for k, v in net.net.backbone.state_dict().items()}
                   | {"classifier.0.weight": torch.zeros(1)}, tmp_path / "imagenet.pth")
        report = load_weights(net, tmp_path / "imagenet.pth", "backbone")
        assert not report.missing and all((v == 0.5).all() for v in net.net.backbone.parameters())

    def test_transformers(self, tmp_path) -> None:
        import_torchvision()  # which transformers imports
        transformers = pytest.importorskip("transformers")
        config = transformers.SegformerConfig(hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, num_labels=CLASSES,
                                              num_attention_heads=[1] * 4, decoder_hidden_size=16)
        transformers.SegformerForSemanticSegmentation(config).half().save_pretrained(tmp_path)
        (tmp_path / "preprocessor_config.json").write_text(
            '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "rescale_factor": 0.5}')
        net = get_segmentation_model(f"hf:{tmp_path}", "", CLASSES)
        assert net.strides == {"logits": 4, "c1": 4, "c2": 8, "c3": 16, "c4": 32, "head": 4}
        assert (net.preprocess.scale, net.preprocess.mean) == (2.0, (0.5, 0.5, 0.5))
        assert {value.dtype for value in net.parameters()} == {torch.float32} and net.architecture["depths"] == [1] * 4
        with pytest.raises(UserError, match=r"\(LABEL_0, .*: scores 5 classes, 7 were asked for"):
            get_segmentation_model(f"hf:{tmp_path}", "", 7)
        assert classes_of(NetworkChoice(f"hf:{tmp_path}", "")) == KnownClasses(5, tuple(f"LABEL_{k}" for k in range(5)))
        from safetensors.torch import load_file, save_file  # which transformers brings
        tensors = load_file(tmp_path / "model.safetensors")
        save_file({k: v for k, v in tensors.items() if "classifier" not in k}, tmp_path / "model.safetensors",
                  metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"2 tensors of the network are not in its files.*decode_head.classifier"):
            get_segmentation_model(f"hf:{tmp_path}", "", CLASSES)

    @pytest.mark.parametrize(("kind", "strides", "more"), [
        ("UperNet", {"logits": 1, "c1": 4, "c2": 8, "c3": 16, "c4": 32, "head": 4},
         {"hidden_size": 8, "pool_scales": [1, 2], "use_auxiliary_head": False}),
        ("Mask2Former", {"logits": 4, "c1": 4, "c2": 8, "c3": 16, "c4": 32, "head": 32},
         {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16,
          "dim_feedforward": 16, "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2,
          "num_queries": 6}),
        ("Eomt", {"logits": 4, "c4": 16, "head": 4},
         {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 128, "num_queries": 6,
          "num_blocks": 1, "num_upscale_blocks": 2})])
    def test_other_transformers(self, kind, strides, more, tmp_path) -> None:
        """What a random one puts out are scores of pixels at the image's size over the stride."""
        import_torchvision()
        transformers = pytest.importorskip("transformers")
        if kind != "Eomt":
            more = more | {"backbone_config": transformers.SwinConfig(
                embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4,
                out_features=["stage1", "stage2", "stage3", "stage4"])}
        getattr(transformers, f"{kind}Config")(num_labels=CLASSES, **more).save_pretrained(tmp_path)
        net = get_segmentation_model(f"hf:{tmp_path}", "", CLASSES).eval()
        assert net.strides == strides
        if kind == "Eomt":
            with pytest.raises(UserError, match="runs on images of 128x128, not on 32x96 .*--crop-size 128 128"):
                net(torch.zeros(2, 3, 32, 96))
        else:
            side = strides["logits"]
            assert net(torch.randn(2, 3, 32, 96)).logits.shape == (2, CLASSES, 32 // side, 96 // side)

    def test_masks_with_classes_become_scores_of_pixels(self) -> None:
        classes, masks = torch.randn(2, 4, CLASSES + 1), torch.randn(2, 4, 3, 5)
        scores = class_scores(SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks))
        expected = torch.zeros(2, CLASSES, 3, 5)
        for query in range(4):
            share = classes[:, query].softmax(-1)[:, :CLASSES]
            expected += share[:, :, None, None] * masks[:, query].sigmoid()[:, None]
        torch.testing.assert_close(scores.exp(), expected)

    def test_logits_are_found_in_what_a_network_returns(self) -> None:
        a, b = torch.zeros(1), torch.ones(1)
        assert first_tensor((a, b)) is a and first_tensor({"aux": a, "out": b}) is b
        with pytest.raises(UserError, match="without a tensor"):
            first_tensor("x")


class TestSizes:
    """The student's maps are resized to those of the teacher, for the methods that compare them by position."""
    FINE = NetInfo("fine", {"logits": 5, "c4": 6}, 5, 1, strides={"c4": 4})
    OURS = NetInfo("ours", {"logits": 5, "c4": 6}, 5)

    def test_which(self) -> None:
        assert taps_to_resize(Needs.both("logits", "c4", same_stride=True), self.OURS, self.FINE) == ("logits", "c4")
        assert taps_to_resize(Needs.both("c4"), self.OURS, self.FINE) == ()
        assert taps_to_resize(Needs(("c4", "head"), ("c4",), same_stride=True), self.OURS, self.FINE) == ("c4",)
        assert taps_to_resize(Needs.both("logits", same_classes=True), self.OURS, self.OURS) == ()

    def test_the_loss_is_that_of_the_resized_map(self) -> None:
        kd = KD(1.0)
        student, teacher = (SegOutput(torch.randn(2, 5, side, side), *[None] * 6) for side in (8, 64))
        net = nn.Module()
        net.forward = lambda images: student
        objective = Objective(net, {"kd": kd}, {"kd": 1.0}, resized={"kd": ("logits",)})
        target = torch.zeros(2, 64, 64, dtype=torch.long)
        got = objective(torch.zeros(2, 3, 64, 64), teacher, target, 0)["kd"]
        fitted = student._replace(logits=resize(student.logits, (64, 64)))
        assert torch.equal(got, kd(Batch(fitted, teacher, target, target, 0))["kd"])
        assert resize_maps(student, teacher, ()) == student


def test_it_takes_taps_below_a_class_map_too() -> None:
    net = espnet()
    mapped = MappedTeacher(net, ClassMap((0,), ((1,),), 2, CLASSES + 1))
    ours = get_segmentation_model("psp", "resnet18_w0.125", CLASSES)
    assert [NetInfo.of(one).takes_taps for one in (net, mapped, ours)] == [True, True, False]


def test_as_a_teacher_it_runs_whole_and_is_read_in_part() -> None:
    net, x = espnet().eval().requires_grad_(False), torch.randn(1, 3, 64, 64)
    whole = net(x)
    prepared = PreparedTeacher(net, {"c4"})
    out = prepared(x)
    assert torch.equal(out.c4, whole.c4) and out.logits is None and set(prepared.channels) == {"c4"}
    half = PreparedTeacher(net, {"c4"}, torch.bfloat16)(x).c4
    assert half.dtype == torch.bfloat16 and 0 < (half.float() - whole.c4).norm() / whole.c4.norm() < 0.1


def test_it_learns_teaches_and_is_evaluated(tmp_path, capsys, monkeypatch) -> None:
    """The student is ESPNet; then it teaches a student of ours."""
    data, save = write_folder_dataset(tmp_path / "data", train=4, val=2), tmp_path / "run"
    (tmp_path / "mine.py").write_text("from examples.espnet import ESPNet\n"
                                      f"def build():\n    return ESPNet({CLASSES + 1}, p=1, q=1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    flags = ["--max-iterations", "2", "--save-per-iters", "2", "--val-per-iters", "2"]
    student = ["--student-model", "module:mine:build"]
    teacher = distil_arguments(write_teacher(tmp_path / "t.pth"))
    assert train_kd.main(train_arguments(data, save, *teacher, *flags, *student)) == 0
    weights = save / "kd_module-mine-build_folder.pth"
    said = capsys.readouterr().out
    at_start = " ".join(said.split())
    assert f"--student-backbone {STUDENT} has no effect on the network: module:mine:build brings its own" in said
    assert "resized to the teacher's: logits from 64 x 64 to 8 x 8" in at_start and "--teacher-taps" not in at_start
    words = shlex.split(said[said.index("python eval.py"):].replace("\\\n", ""))
    assert "--backbone" not in words and evaluation.main([*words[2:], "--workers", "0"]) == 0
    assert "module:mine:build" in capsys.readouterr().out
    taught = ["--method", "kd", "--teacher-model", "module:mine:build", "--teacher-pretrained", str(weights)]
    assert train_kd.main(train_arguments(data, tmp_path / "two", *taught, *flags)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "resized to the teacher's: logits from 8 x 8 to 64 x 64 (--teacher-taps chooses smaller ones)" in said
    assert_refused(capsys, train_kd.main, train_arguments(data, tmp_path / "x", "--method", "none", *student,
                                                          "--head-lr-factor", "10"), "--head-lr-factor", "backbone")
    assert_refused(capsys, train_kd.main, train_arguments(data, tmp_path / "x", "--method", "none", *student, "--aux"),
                   "--aux: module:mine:build has no auxiliary head")
    assert train_kd.main(train_arguments(data, tmp_path / "x", *taught, "--list-taps")) == 0
    assert "encoder.b3" in capsys.readouterr().out
