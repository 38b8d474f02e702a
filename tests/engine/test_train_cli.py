"""The command line of ``train_kd.py``: the reference's flags and defaults, presets, and every kind of wrong input."""
from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_refused, distil_arguments, train_arguments, write_folder_dataset, write_teacher

import train_kd
from dataset.spec import list_datasets
from engine.presets import preset, published
from engine.settings import build_parser, parse_settings
from losses.core import methods
from models import list_models
from utils.errors import UserError

FLAGS = json.loads((Path(__file__).parent.parent / "reference" / "published_flags.json").read_text())["train_kd.py"]
#: accepted and without effect, in the reference too
DEAD = {"--start_epoch", "--save-epoch", "--val-epoch"}
#: folders outside of the working one: here they are in it, see docs/differences.md
FOLDERS = {"--save-dir", "--log-dir"}


def parse(*argv: str) -> SimpleNamespace:
    return SimpleNamespace(**parse_settings(["--teacher-pretrained", "t.pth", *argv]).flat())


class TestDefaults:
    @pytest.mark.parametrize("flag", sorted(set(FLAGS) - DEAD - FOLDERS - {"--aux"}))
    def test_reference_default(self, flag) -> None:
        action = build_parser()._option_string_actions[flag.replace("_", "-")]
        assert action.default == FLAGS[flag], flag

    def test_the_auxiliary_head_follows_the_backbone(self) -> None:
        # the reference has a flag with default False and overwrites it by the name of the backbone
        assert parse().aux is None and parse("--aux").aux is True and parse("--no-aux").aux is False

    @pytest.mark.parametrize("flag", sorted(DEAD))
    def test_dead_options_are_accepted(self, flag) -> None:
        parse(flag, "3")

    @pytest.mark.parametrize("flag", sorted(f for f in FLAGS if "-" in f[2:] and f not in DEAD))
    def test_both_spellings(self, flag) -> None:
        known = build_parser()
        assert known._normalize(["--" + flag[2:].replace("-", "_")]) == ["--" + flag[2:].replace("_", "-")]

    def test_help_names_every_group_and_default(self) -> None:
        text = build_parser().format_help()
        for word in ("networks", "data", "optimisation", "distillation", "running", "method afdcd", "--lambda-fd",
                     "(default: 4e-05)", "(default: 40000)"):
            assert word in text, word
        assert max(map(len, text.splitlines())) <= 120


class TestPresets:
    def test_without_method_the_weights_are_those_of_the_reference_parser(self) -> None:
        config = parse()
        assert (config.lambda_kd, config.lambda_fd, config.lambda_ctr) == (1.0, 4e-5, 1e-3)

    @pytest.mark.parametrize(("dataset", "kd", "fd", "ctr"), [
        ("citys", 1.0, 2e-6, 5e-3), ("voc", 1.0, 1e-6, 5e-3), ("camvid", 1.0, 8e-6, 1e-2),
        ("ade20k", 0.5, 1e-6, 4e-2), ("coco_stuff_164k", 0.5, 5e-6, 5e-3)])
    def test_afdcd_is_the_published_setting_of_the_data_set(self, dataset, kd, fd, ctr) -> None:
        config = parse("--method", "afdcd", "--dataset", dataset)
        assert (config.lambda_kd, config.lambda_fd, config.lambda_ctr) == (kd, fd, ctr)

    def test_an_explicit_flag_wins_wherever_it_stands(self) -> None:
        assert parse("--lambda-fd", "3", "--method", "afdcd").lambda_fd == 3
        assert parse("--method", "afdcd", "--lambda-fd", "3").lambda_fd == 3

    def test_another_method_leaves_only_its_own_terms(self) -> None:
        config = parse("--method", "kd")
        assert config.lambda_kd == 1.0 and config.lambda_fd == config.lambda_ctr == 0.0

    def test_methods_combine(self) -> None:
        assert parse("--method", "kd", "--lambda-ctr", "0.1").lambda_ctr == 0.1

    @pytest.mark.parametrize("name", methods())
    def test_every_preset_names_real_options_and_switches_something_on(self, name) -> None:
        known = {a.dest for a in build_parser()._actions}
        for values in methods()[name].preset.values():
            assert set(values) <= known
        config = parse("--method", name)
        assert any(getattr(config, t.setting) for t in methods()[name].terms)

    @pytest.mark.parametrize("name", methods())
    def test_every_preset_key_is_a_data_set_or_a_backbone(self, name) -> None:
        sets, backbones = {"*", *list_datasets()}, {"", *(f"/{backbone}" for _, backbone in list_models())}
        assert set(methods()[name].preset) <= {one + other for one in sets for other in backbones}

    @pytest.mark.parametrize(("dataset", "backbone", "weights"), [
        ("voc", "resnet50", (1.0, 10.0)), ("voc", "resnet18", (2.0, 10.0)), ("camvid", "resnet50", (3.0, 10.0)),
        ("camvid", "resnet18", (3.0, 20.0)), ("camvid", "resnet18_w0.25", (3.0, 20.0)),
        ("camvid", "resnet18_original", (3.0, 10.0))])
    def test_the_more_specific_entry_wins(self, monkeypatch, dataset, backbone, weights) -> None:
        entries = {"camvid/resnet18": {"aux_weight": 20.0}, "camvid": {"lambda_kd": 3.0},
                   "*/resnet18": {"lambda_kd": 2.0}, "*": {"lambda_kd": 1.0, "aux_weight": 10.0}}
        monkeypatch.setattr(methods()["kd"], "preset", entries)
        config = parse("--method", "kd", "--dataset", dataset, "--student-backbone", backbone)
        assert (config.lambda_kd, config.aux_weight) == weights
        assert published("kd", dataset, backbone) == dict(zip(("lambda_kd", "aux_weight"), weights, strict=True))
        assert preset("kd", dataset, backbone)["lambda_fd"] == 0.0

    @pytest.mark.parametrize("attribute", ["preset", "rows"])
    def test_a_setting_that_does_not_exist_is_named(self, monkeypatch, attribute) -> None:
        monkeypatch.setattr(methods()["kd"], attribute, {"*": {"lambda_kd": 1.0}, "voc": {"lambda_kt_logt": 1.0}})
        with pytest.raises(UserError, match=f"method 'kd': its {attribute} has under 'voc' the setting "
                                            "'lambda_kt_logt', which does not exist; did you mean lambda_kt_logit?"):
            parse("--method", "kd")
        assert parse("--method", "cwd").method == "cwd"

    @pytest.mark.parametrize(("dataset", "backbone", "rand_mask", "enhance_projector"), [
        ("citys", "resnet18", False, True), ("citys", "mobilenetv2", True, False), ("voc", "resnet18", True, False)])
    def test_afdcd_masks_and_projects_as_the_script_of_the_row(self, dataset, backbone, rand_mask,
                                                               enhance_projector) -> None:
        config = parse("--method", "afdcd", "--dataset", dataset, "--backbone", backbone)
        assert (config.rand_mask, config.enhance_projector) == (rand_mask, enhance_projector)
        assert parse("--dataset", dataset, "--backbone", backbone).rand_mask is True
        assert parse("--method", "afdcd", "--backbone", backbone, "--rand-mask").rand_mask is True

    @pytest.mark.parametrize(("backbone", "decay"), [("resnet18", 5e-4), ("mobilenetv2", 2e-4),
                                                     ("mobilenetv2_w0.5", 2e-4)])
    def test_weight_decay_of_maskd(self, backbone, decay) -> None:
        assert parse("--method", "maskd", "--backbone", backbone).weight_decay == decay

    def test_a_square_crop_takes_one_number(self) -> None:
        assert parse("--crop-size", "320").crop_size == (320, 320)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("cli")
    write_folder_dataset(base / "set", train=4, val=1)
    write_teacher(base / "teacher.pth")
    (base / "garbage.pth").write_bytes(b"not a checkpoint")
    (base / "hostile.pth").write_bytes(pickle.dumps(Path("x")))
    torch.save({"step": 3}, base / "other.pth")
    torch.save({"format": 1, "optimizer": {}, "model": []}, base / "hollow.pth")
    return base


WRONG = [
    (["--no-such-flag"], ["--no-such-flag"]),
    (["--lamda-kd", "1"], ["--lambda-kd"]),
    (["--method", "nonsense"], ["nonsense", "afdcd"]),
    (["--method", "afcd"], ["--method: invalid choice: 'afcd'", "; did you mean afdcd?"]),
    (["--method", "kd", "--method", "cwd"], ["--method kd --method cwd: expected one", "--lambda-cwd-feat"]),
    (["--method", "kd+cwd"], ["--method kd+cwd: expected one", "--lambda-kd, --lambda-cwd-feat"]),
    (["--dataset", "nonsense"], ["nonsense", "citys"]),
    (["--data", "{base}/missing"], ["missing"]),
    (["--student-model", "nonsense"], ["nonsense", "deeplabv3"]),
    (["--student-backbone", "nonsense"], ["nonsense"]),
    (["--teacher-pretrained", "None"], ["--teacher-pretrained", "afdcd", "--method none, --method lad"]),
    (["--teacher-pretrained", "{base}/missing.pth"], ["missing.pth"]),
    (["--teacher-pretrained", "{base}/garbage.pth"], ["garbage.pth"]),
    (["--teacher-pretrained", "{base}/hostile.pth"], ["hostile.pth"]),
    (["--teacher-pretrained", "{base}"], ["expected"]),
    (["--teacher-backbone", "mobilenetv2"], ["teacher.pth"]),
    (["--student-pretrained-base", "{base}/teacher.pth"], ["teacher.pth"]),
    (["--method", "none", "--lambda-kd", "1"], ["--lambda-kd", "--method none"]),
    (["--lambda-kd", "0", "--lambda-fd", "0", "--lambda-ctr", "0"], ["--method none"]),
    (["--lambda-kd", "-1"], ["--lambda-kd"]),
    (["--lr", "nan"], ["--lr"]),
    (["--lr", "0"], ["--lr"]),
    (["--momentum", "2"], ["--momentum"]),
    (["--batch-size", "0"], ["--batch-size"]),
    (["--batch-size", "1"], ["--batch-size"]),
    (["--crop-size", "1", "2", "3"], ["--crop-size"]),
    (["--crop-size", "8"], ["--crop-size"]),
    (["--pool-size", "8"], ["--pool-size", "--crop-size"]),
    (["--m-ocd", "7"], ["--m-ocd"]),
    (["--rand-mask", "perhaps"], ["--rand-mask"]),
    (["--resume", "{base}/missing.pth"], ["missing.pth"]),
    (["--resume", "{base}/garbage.pth"], ["garbage.pth"]),
    (["--resume", "{base}/hostile.pth"], ["hostile.pth"]),
    (["--resume", "{base}/other.pth"], ["other.pth"]),
    (["--resume", "{base}/teacher.pth"], ["--student-pretrained"]),
    (["--resume", "{base}/hollow.pth"], ["hollow.pth"]),
    (["--save-dir", "{base}/teacher.pth"], ["--save-dir", "folder"]),
    (["--log-dir", "{base}/teacher.pth/logs"], ["--log-dir"]),
    (["--selection-split", "nonsense"], ["nonsense", "val", "--skip-val"]),
    (["--train-list", "{base}/missing.lst"], ["missing.lst"]),
]


@pytest.mark.parametrize(("wrong", "words"), WRONG, ids=lambda v: " ".join(v) if isinstance(v, list) else None)
def test_wrong_input_is_one_line_and_writes_nothing(base, tmp_path, capsys, wrong, words) -> None:
    save = tmp_path / "run"
    argv = train_arguments(base / "set", save, *distil_arguments(base / "teacher.pth"))
    if "--method" in wrong and "none" in wrong:
        argv = train_arguments(base / "set", save)
    assert_refused(capsys, train_kd.main, [*argv, *(w.format(base=base) for w in wrong)], *words)
    assert not save.exists()


def test_an_image_that_breaks_during_training_is_one_line(base, tmp_path, capsys) -> None:
    data = write_folder_dataset(tmp_path / "set", train=4, val=1)
    path = data / "images" / "train" / "2.png"
    path.write_bytes(path.read_bytes()[:200])
    argv = train_arguments(data, tmp_path / "run", "--method", "none", "--workers", "1")
    assert_refused(capsys, train_kd.main, argv, "2.png")


def test_a_state_of_another_method_is_refused(base, tmp_path, capsys) -> None:
    argv = train_arguments(base / "set", tmp_path / "run", "--max-iterations", "1")
    assert train_kd.main([*argv, "--method", "none"]) == 0
    capsys.readouterr()
    assert_refused(capsys, train_kd.main, [*argv, *distil_arguments(base / "teacher.pth"), "--resume", "auto"],
                   "another model or method")


def test_settings_of_other_methods_do_not_stop_a_run_nor_small_crops_the_list(capsys) -> None:
    assert parse("--method", "kd", "--bpkd-kernel", "4", "--cwd-norm", "channel_mean").bpkd_kernel == 4
    assert train_kd.main(["--list-methods", "--crop-size", "16", "--bpkd-kernel", "4"]) == 0
    assert re.search(r"^kd  ", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(UserError, match="--crop-size 16 16: expected at least 32 pixels"):
        parse("--method", "kd", "--crop-size", "16")
