"""The command-line parser and the wrapper of the programs."""
from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass

import pytest
from helpers import ROOT
from torch.distributed import TCPStore
from torch.utils.data import DataLoader

from utils.cli import ArgumentParser, describe_error, read_options, run_main
from utils.errors import UserError
from utils.options import OptionGroup, option, options_of


@dataclass(frozen=True)
class Losses(OptionGroup):
    rand_mask: bool = option(True, "random instead of centre mask")
    enhance_projector: bool = option(False, "two branches")
    no_cuda: bool = option(False, "run on the CPU")
    mask_ratio: float = option(0.75, "share of zeroed positions", at_least=0, at_most=1)
    crop_size: tuple[int, ...] = option((512, 1024), "height and width", at_least=1)
    save_dir: str | None = option(None, "where to write")
    only: tuple[str, ...] = option((), "may be repeated", nargs="append")
    pattern: str = option("50%", "100%% of it")
    tau: float = option(1.0, "temperature", above=0)
    amp: str = option("off", "half precision", choices=("off", "bf16"))


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="prog.py", description="a program")
    parser.add_options(parser.add_argument_group("losses"), Losses)
    return parser


@pytest.mark.parametrize(("argv", "expected"), [
    ([], True), (["--rand-mask"], True), (["--rand_mask"], True), (["--no-rand-mask"], False),
    (["--no_rand_mask"], False),
    (["--rand-mask", "False"], False), (["--rand_mask", "0"], False), (["--rand-mask=no"], False),
    (["--rand_mask=yes"], True), (["--rand-mask", "TRUE"], True), (["--no-rand-mask", "--rand-mask", "1"], True),
])
def test_booleans(argv: list[str], expected: bool) -> None:
    assert make_parser().parse_args(argv).rand_mask is expected


def test_flag_that_starts_with_no() -> None:
    assert make_parser().parse_args([]).no_cuda is False
    assert make_parser().parse_args(["--no_cuda"]).no_cuda is True
    assert make_parser().parse_args(["--no-cuda", "false"]).no_cuda is False


def test_both_spellings_take_values() -> None:
    argv = ["--crop_size", "64", "96", "--mask_ratio=0.5", "--save_dir=runs/a_b", "--enhance_projector"]
    args = make_parser().parse_args(argv)
    assert args.crop_size == [64, 96]
    assert args.mask_ratio == 0.5
    assert args.save_dir == "runs/a_b"
    assert args.enhance_projector is True


def test_every_option_in_both_spellings() -> None:
    parser = make_parser()
    for spelling, action in parser._option_string_actions.items():
        if spelling.startswith("--") and "-" in spelling[2:]:
            values = [] if action.nargs in ("?", 0) else ["1"]
            dashed, underscored = ([name, *values] for name in (spelling, "--" + spelling[2:].replace("-", "_")))
            assert parser.parse_args(dashed) == parser.parse_args(underscored)


@pytest.mark.parametrize(("argv", "said"), [
    (["--rand-msk"], "did you mean --rand-mask?"),
    (["--mask_ration=1"], "did you mean --mask-ratio?"),
    (["--zzz"], "unrecognized arguments: --zzz"),
    (["--save", "x"], "unrecognized arguments: --save x"),
    (["--rand-mask", "maybe"], "expected true or false, got 'maybe'"),
    (["--no-rand-mask", "true"], "--no-rand-mask takes no value"),
    (["--mask-ratio", "1.5"], "expected a number of at least 0 and of at most 1, got '1.5'"),
    (["--mask-ratio", "nan"], "got 'nan'"),
    (["--crop-size", "0"], "expected a whole number of at least 1, got '0'"),
    (["--crop-size", "2.5"], "expected a whole number"),
    (["--save-dir"], "expected one argument"),
    (["--amp", "bf61"], "did you mean bf16?"),
])
def test_errors_are_one_line(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args(argv)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("prog.py: error: ")
    assert said in captured.err


def test_open_lower_limit(capsys: pytest.CaptureFixture[str]) -> None:
    assert make_parser().parse_args(["--tau", "0.1"]).tau == 0.1
    with pytest.raises(SystemExit):
        make_parser().parse_args(["--tau", "0"])
    assert "a number above 0, got '0'" in capsys.readouterr().err


def test_settings_are_typed_and_checked_however_they_are_made() -> None:
    words = ["--crop-size", "64", "96", "--only", "a", "--only", "b"]
    given = read_options(vars(make_parser().parse_args(words)), Losses)
    assert (given.crop_size, given.only, given.rand_mask) == ((64, 96), ("a", "b"), True)
    assert Losses() == read_options(vars(make_parser().parse_args([])), Losses)
    for wrong, words in (({"tau": 0.0}, "tau 0.0: expected a number above 0"),
                         ({"mask_ratio": 2.0}, "mask ratio 2.0: expected a number of at least 0 and of at most 1"),
                         ({"crop_size": (64, 0)}, "crop size 0: expected a whole number of at least 1")):
        with pytest.raises(UserError, match=words) as refused:
            Losses(**wrong)
        assert refused.value.settings == tuple(wrong)


def test_inherited_settings_make_one_flag() -> None:
    @dataclass(frozen=True)
    class More(Losses):
        form: str = option("a", "which", choices=("a", "b"))

    parser = make_parser()
    parser.add_options(parser.add_argument_group("more"), More)
    assert read_options(vars(parser.parse_args(["--tau", "2", "--form", "b"])), More) == More(tau=2.0, form="b")
    assert [one.name for one in options_of(More)] == [*(one.name for one in options_of(Losses)), "form"]
    with pytest.raises(UserError, match="form 'c': expected one of a, b"):
        More(form="c")


def test_a_message_gets_the_flags_that_it_does_not_name() -> None:
    error = UserError("a 4x4 map: use --pool-size 1", settings=["pool_size", "crop_size"])
    assert describe_error(error) == "a 4x4 map: use --pool-size 1 (--crop-size)"
    assert describe_error(UserError("no\nfile")) == "no file"


def test_help_shows_groups_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert "losses:" in out
    assert "--rand-mask, --no-rand-mask" in out
    assert "(default: true)" in out and "(default: 512 1024)" in out and "(default: 0.75)" in out
    assert "100% of it (default: 50%)" in out
    assert "may be repeated\n" in out, "an empty default is not shown"
    assert out.startswith("usage: prog.py [options]\n")
    assert max(len(line) for line in out.splitlines()) <= 110


def test_a_reader_that_has_enough_ends_a_program_quietly() -> None:
    """As ``program | head -1``: no traceback, and the code that the shell gives."""
    program = "import sys; from utils.cli import run_main; sys.exit(run_main(lambda _: print('line\\n' * 100000)))"
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        assert process.stdout.readline() == "line\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_a_reader_that_has_gone_before_the_end_is_no_fault() -> None:
    """As ``program | head -1`` of a program that writes less than a buffer holds."""
    program = "import sys; from utils.cli import run_main; sys.exit(run_main(lambda _: print(input())))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, env=environment) as process:
        process.stdout.close()
        assert process.communicate("line\n")[1] == ""
    assert process.returncode == 141


def test_run_main(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)

    def fails(argv: list[str] | None) -> int:
        raise UserError("--data: folder 'x' does not exist,\n expected a dataset")

    def stopped(argv: list[str] | None) -> int:
        raise KeyboardInterrupt

    assert run_main(fails, [], prog="prog.py") == 2
    assert capsys.readouterr().err == "prog.py: error: --data: folder 'x' does not exist, expected a dataset\n"
    assert run_main(stopped, [], prog="prog.py") == 130
    assert capsys.readouterr().err == "prog.py: interrupted\n"
    assert run_main(lambda argv: None, []) == 0
    assert run_main(lambda argv: len(argv or []), ["a", "b", "c"]) == 3
    with pytest.raises(ZeroDivisionError):
        run_main(lambda argv: 1 // 0, [])


def test_processes_that_fail_alike_say_so_once(capsys: pytest.CaptureFixture[str],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as the launcher does
    launcher = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}

    def said(error: Exception | None, **environment: str) -> str:
        def fails(argv: list[str] | None) -> int:
            if error is None:
                make_parser().parse_args(["--zzz"])
            raise error

        for name, value in {"WORLD_SIZE": "4", "GROUP_RANK": "0", "TORCHELASTIC_RESTART_COUNT": "0", **launcher,
                            **environment}.items():
            monkeypatch.setenv(name, value)
        try:
            assert run_main(fails, [], prog="prog.py") == 2
        except SystemExit as stop:
            assert stop.code == 2
        return capsys.readouterr().err

    missing, broken = UserError("--data: folder 'ü' does not exist"), UserError("7.png: truncated file")
    first = "prog.py: error: --data: folder 'ü' does not exist\n"
    assert [said(missing, RANK=rank) for rank in "312"] == [first, "", ""]
    assert [said(broken, RANK=rank) for rank in "01"] == ["prog.py: error: 7.png: truncated file\n", ""]
    assert [said(None, RANK=rank) for rank in "01"] == ["prog.py: error: unrecognized arguments: --zzz\n", ""]
    lost = "prog.py: error: another process failed; its message is above or below\n"
    assert [said(RuntimeError("Broken pipe"), RANK=rank) for rank in "01"] == [lost, ""]
    assert said(missing, RANK="4", GROUP_RANK="1") == first, "every machine has a terminal of its own"
    assert said(missing, RANK="0", TORCHELASTIC_RESTART_COUNT="1") == first
    for elsewhere in ({"TORCHELASTIC_USE_AGENT_STORE": "False"}, {"MASTER_PORT": "none"}):
        assert said(missing, RANK="1", **elsewhere) == first, "in doubt it is said again"


def test_an_error_is_not_lost_with_the_store(capsys: pytest.CaptureFixture[str],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(argv: list[str] | None) -> int:
        raise UserError("7.png: truncated file")

    with socket.socket() as taken:  # bound and never listening: nothing answers there
        taken.bind(("127.0.0.1", 0))
        for name, value in {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True",
                            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("utils.cli.STORE_PATIENCE", 0.5)
        assert run_main(fails, [], prog="prog.py") == 2
    assert capsys.readouterr().err == "prog.py: error: 7.png: truncated file\n"


class Unreadable:
    """A data set whose files cannot be read."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        raise UserError(f"{index}.png: truncated file")


def test_error_of_a_loading_process_is_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(lambda argv: len(list(DataLoader(Unreadable(), num_workers=1))), [], prog="prog.py") == 2
    assert capsys.readouterr().err == "prog.py: error: 0.png: truncated file\n"
