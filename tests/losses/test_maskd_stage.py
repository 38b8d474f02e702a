"""MasKD's stage before training: the tokens that it learns, its cache, its resume, several processes."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import CLASSES, distil_arguments, train_arguments, write_folder_dataset, write_teacher
from method_cases import make, preparation
from reference import fill
from torch import nn

import train_kd
from losses.core import NetInfo, Preparation
from losses.maskd import MasKD, mask_learning_losses
from losses.stages.stage import StageSettings, stage_digest
from losses.stages.tokens import initial_tokens, learn_tokens
from models.output import SegOutput
from utils.errors import UserError
from utils.randomness import seed_everything

NET = NetInfo("net", {"logits": 4}, 4)


class Modes(list):
    """Whether each pass was in train mode; a copy of the teacher writes into the same list."""

    def __deepcopy__(self, memo):
        return self


class Teacher(nn.Module):
    """Everything that makes train mode differ from eval mode."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(dropout),
                                    nn.Conv2d(6, 4, 3, stride=2, padding=1))
        fill.fill_module(self, 5).eval().requires_grad_(False)
        self.modes = Modes()

    def forward(self, images) -> SegOutput:
        self.modes.append(self.training)
        logits = self.layers(images)
        return SegOutput(logits, None, logits, logits, logits, logits, logits)


class Batches:
    """Batches that are a function of the step; raises at a chosen one."""

    def __init__(self, dies_at: int | None = None, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.dies_at, self.error, self.made = dies_at, error, 0

    def __call__(self, steps: int, batch_size: int, start: int, role: str = "teacher"):
        for step in range(start, steps):
            if step == self.dies_at:
                raise self.error
            self.made += 1
            yield (fill.tensor(f"images{step}", (batch_size, 3, 12, 16), 1),
                   fill.labels(f"labels{step}", (batch_size, 12, 16), 4, ignore_frac=0.2))


@pytest.fixture
def make_stage():
    def make_one(directory: Path, batches=None, teacher=None, main: bool = True, data: str = "") -> Preparation:
        lines: list[str] = []
        stage = preparation(teacher or Teacher(), directory, batches or Batches(), lines.append, main=main, data=data)
        object.__setattr__(stage, "lines", lines)
        return stage
    return make_one


def method(**options) -> MasKD:
    return make("maskd", NET, NET, **{"maskd_steps": 8, "maskd_batch_size": 2, "maskd_tokens": 3, "save_per_iters": 3,
                                      "group_size": 0, **options})


def learned(stage: Preparation, **options) -> torch.Tensor:
    built = method(**options)
    built.prepare(stage)
    return built.tokens


def test_the_stage_is_plain_sgd_on_the_frozen_teacher(tmp_path, make_stage):
    teacher = Teacher()
    got = learned(make_stage(tmp_path, teacher=teacher))
    tokens = nn.Parameter(method().tokens.clone())
    optimizer = torch.optim.SGD([tokens], lr=0.1, momentum=0.9, weight_decay=1e-3)
    for step, (images, target) in enumerate(Batches()(8, 2, 0)):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 8) ** 0.9
        optimizer.zero_grad()
        sum(mask_learning_losses(teacher(images).logits, tokens, target).values()).backward()
        optimizer.step()
    torch.testing.assert_close(got, tokens.detach(), rtol=1e-5, atol=1e-7)
    assert not any(teacher.modes)


def test_the_masks_learn(tmp_path, make_stage):
    class OneBatch(Batches):
        def __call__(self, steps, batch_size, start, role="teacher"):
            yield from [next(super().__call__(1, batch_size, 0))] * (steps - start)

    teacher, built = Teacher(), method(maskd_steps=100, maskd_lr=1.0)
    images, target = next(Batches()(1, 2, 0))
    before = mask_learning_losses(teacher(images).logits, built.tokens.clone(), target)
    built.prepare(make_stage(tmp_path, OneBatch(), teacher))
    after = mask_learning_losses(teacher(images).logits, built.tokens, target)
    assert before["dice"] > 0.95 and after["dice"] < 0.8 * before["dice"]
    assert sum(after.values()) < sum(before.values())


@pytest.mark.parametrize(("error", "step"), [(KeyboardInterrupt, 6), (SystemExit, 7)])
def test_a_stage_that_was_cut_off_goes_on_to_the_same_tokens(tmp_path, make_stage, error, step):
    """From its last save, or, when it was told to stop, from where it was."""
    whole = learned(make_stage(tmp_path / "whole"))
    with pytest.raises(error):
        learned(make_stage(tmp_path / "cut", Batches(dies_at=7, error=error)))
    (partial,) = (tmp_path / "cut").iterdir()
    assert partial.name.endswith("_partial.pth") and int(torch.load(partial, weights_only=True)["step"]) == step
    stage = make_stage(tmp_path / "cut")
    assert learned(stage).equal(whole)
    assert f"step {step} from" in stage.lines[0] and sum("step" in line for line in stage.lines[1:]) == 8 - step
    assert [p.name for p in (tmp_path / "cut").iterdir()] == [p.name for p in (tmp_path / "whole").iterdir()]


def test_the_cache_is_used_for_the_same_teacher_and_settings_only(tmp_path, make_stage):
    first = learned(make_stage(tmp_path))
    again = Batches()
    assert learned(make_stage(tmp_path, again), save_per_iters=5).equal(first) and again.made == 0
    (cached,) = tmp_path.iterdir()
    assert cached.name.startswith("maskd_masks_")
    assert make("maskd", NET, NET, maskd_masks=str(cached)).tokens.equal(first)
    other = Teacher()
    other.layers[1].running_mean += 0.1
    for teacher, options in ((other, {}), (None, {"maskd_lr": 0.2}), (None, {"maskd_tokens": 2}), (None, {"seed": 1}),
                             (None, {"maskd_steps": 7}), (None, {"maskd_batch_size": 3}),
                             (None, {"sampling": "epoch"})):
        count, batches = len(list(tmp_path.iterdir())), Batches()
        learned(make_stage(tmp_path, batches, teacher), **options)
        assert batches.made and len(list(tmp_path.iterdir())) == count + 1


@pytest.mark.parametrize(("settings", "digest"), [
    (StageSettings(8, 2, 0.1, True, 3, ("reference", -1, 2, 3, 5), 800, "maskd", "masks"), "ba1fa67d9f2a44fc"),
    (StageSettings(8, 2, 0.1, True, 3, ("reference", -1, 2, 3, 5), 5, "lad", "teacher", True, "lr"),
     "27e8c2dc0256c26a")])
def test_files_of_earlier_versions_are_found(settings, digest):
    net = nn.Conv2d(1, 2, 1)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([0.5, -1.0]).view(2, 1, 1, 1))
        net.bias.copy_(torch.tensor([0.25, 2.0]))
    assert stage_digest(net, settings, "data") == digest


def test_another_training_set_is_learned_anew(tmp_path, make_stage):
    learned(make_stage(tmp_path, data="a"))
    again, other = Batches(), Batches()
    learned(make_stage(tmp_path, again, data="a"))
    learned(make_stage(tmp_path, other, data="b"))
    assert not again.made and other.made


def test_a_broken_cache_is_named(tmp_path, make_stage):
    learned(make_stage(tmp_path))
    (cached,) = tmp_path.iterdir()
    for content in ({"tokens": torch.ones(3, 4)}, [1]):
        torch.save(content, cached)
        with pytest.raises(UserError, match=f"{cached.name}.*delete it"):
            learned(make_stage(tmp_path))
    cached.write_bytes(b"half a file")
    with pytest.raises(UserError, match=f"{cached.name}.*not readable"):
        learned(make_stage(tmp_path))


def test_compat_reference_learns_with_the_teacher_in_train_mode_and_leaves_it_as_it_was(tmp_path, make_stage):
    teacher, fixed = Teacher(), learned(make_stage(tmp_path))
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    got = learned(make_stage(tmp_path, teacher=teacher), compat="reference")
    assert teacher.modes == [True] * 8 and not any(m.training for m in teacher.modules())
    assert all(v.equal(before[k]) for k, v in teacher.state_dict().items())
    assert not torch.allclose(got, fixed, rtol=1e-3)
    torch.manual_seed(99)
    with pytest.raises(KeyboardInterrupt):
        learned(make_stage(tmp_path / "cut", Batches(dies_at=5)), compat="reference")
    assert learned(make_stage(tmp_path / "cut"), compat="reference").equal(got)
    with pytest.raises(UserError, match="maskd: .* a batch of 1 leaves one image per batch norm"):
        learned(make_stage(tmp_path), compat="reference", maskd_batch_size=1)


def test_compat_reference_equals_the_released_loop(tmp_path, make_stage):
    """The teacher in train mode on every batch, its statistics and dropout included; the tokens by plain SGD."""
    got = learned(make_stage(tmp_path), compat="reference")
    teacher, tokens = Teacher().train(), nn.Parameter(method().tokens.clone())
    optimizer = torch.optim.SGD([tokens], lr=0.1, momentum=0.9, weight_decay=1e-3)
    for step, (images, target) in enumerate(Batches()(8, 2, 0)):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 8) ** 0.9
        seed_everything(0, "maskd stage", step, 0)  # dropout as in the stage
        with torch.no_grad():
            logits = teacher(images).logits
        optimizer.zero_grad()
        sum(mask_learning_losses(logits, tokens, target).values()).backward()
        optimizer.step()
    torch.testing.assert_close(got, tokens.detach(), rtol=1e-5, atol=1e-7)


def test_only_the_main_process_writes(tmp_path, make_stage):
    expected = learned(make_stage(tmp_path / "main"))
    assert learned(make_stage(tmp_path / "other", main=False)).equal(expected)
    assert not (tmp_path / "other").exists()


def test_tokens_that_explode_are_not_cached(tmp_path, make_stage):
    def explode(logits, tokens, target):
        return {"ce": (tokens * float("inf")).sum()}

    settings = StageSettings(steps=4, batch_size=2, lr=0.1, method="maskd", result="masks")
    with pytest.raises(UserError, match="maskd: the masks became NaN or infinite") as refused:
        learn_tokens(make_stage(tmp_path), initial_tokens((3, 4), 0, "maskd"), settings, explode)
    assert refused.value.settings == ("maskd_lr",)
    assert not list(tmp_path.iterdir())


def test_given_masks_are_used_and_not_learned(tmp_path, make_stage):
    tokens = torch.randn(5, 4)
    for i, content in enumerate(({"mask_token": tokens}, {"state_dict": {"mask_module.mask_token": tokens}},
                                 {"tokens": tokens, "velocity": tokens, "step": torch.tensor(3)})):
        torch.save(content, tmp_path / f"{i}.pth")
        method = make("maskd", NET, NET, maskd_masks=str(tmp_path / f"{i}.pth"))
        method.prepare(make_stage(tmp_path / "stage"))
        assert method.tokens.equal(tokens) and not (tmp_path / "stage").exists()


@pytest.mark.parametrize(("content", "words"), [
    (None, "no such file"), (b"text", "not readable"), ({"weight": torch.ones(2, 4)}, "expected one tensor Tx4"),
    ({"tokens": torch.ones(4)}, "expected one tensor Tx4"), ({"tokens": torch.ones(2, 3)}, "tokens 2x3, expected Tx4"),
    ([torch.ones(2, 4)], "expected one tensor Tx4")])
def test_masks_that_do_not_fit_are_refused(tmp_path, content, words):
    path = tmp_path / "given.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=f"given.pth.*{words}"):
        make("maskd", NET, NET, maskd_masks=str(path))


#: two of these make a process group; the second sees an empty folder, so its tokens have to come from the first
PROGRAM = """
import importlib.util, sys
from pathlib import Path
import torch
import torch.distributed as dist

test_file, folder, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
sys.path.append(str(Path(test_file).parent.parent))
spec = importlib.util.spec_from_file_location("parts", test_file)
parts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parts)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

def batches(steps, batch_size, start, role):
    for images, target in parts.LabelledBatches()(steps, batch_size, start):
        yield images.chunk(2)[rank], target.chunk(2)[rank]

for run, compat in enumerate(("fixed", "fixed", "reference")):
    method = parts.method(maskd_steps=5, maskd_batch_size=4, compat=compat)
    teacher = parts.Teacher(dropout=0)  # that differs between processes
    method.prepare(parts.preparation(teacher, folder / ("cache", "empty")[rank], batches, main=rank == 0))
    torch.save(method.tokens, folder / f"tokens_{run}_{rank}.pth")
try:
    parts.method(maskd_batch_size=3).prepare(parts.preparation(parts.Teacher(), folder, batches, main=rank == 0))
except parts.UserError as error:
    (folder / f"refused_{rank}.txt").write_text(str(error))
dist.destroy_process_group()
"""


class LabelledBatches(Batches):
    """Every pixel labelled, so that the mean over processes is the mean over the batch."""

    def __call__(self, steps, batch_size, start, role="teacher"):
        for images, target in super().__call__(steps, batch_size, start):
            yield images, target.clamp(min=0)


def test_two_processes_learn_the_tokens_of_one(tmp_path, make_stage):
    root = Path(__file__).parent.parent.parent
    running = [subprocess.Popen([sys.executable, "-c", PROGRAM, __file__, str(tmp_path), str(rank)], cwd=root,
                                env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
               for rank in (0, 1)]
    for process in running:
        error = process.communicate(timeout=240)[1]
        assert process.returncode == 0, error[-3000:]
    found = [torch.load(tmp_path / f"tokens_{run}_{rank}.pth") for run in (0, 1, 2) for rank in (0, 1)]
    assert all(x.equal(found[0]) for x in found[:4]) and found[4].equal(found[5])
    assert not (tmp_path / "empty").exists()
    # in train mode too: the teacher's batch norm is synchronized
    for tokens, compat in ((found[0], "fixed"), (found[4], "reference")):
        one = learned(make_stage(tmp_path / "one", LabelledBatches(), Teacher(dropout=0)), maskd_steps=5,
                      maskd_batch_size=4, compat=compat)
        torch.testing.assert_close(tokens, one, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found[0], found[4], rtol=1e-2)
    assert "a batch of 3 does not divide by 2" in (tmp_path / "refused_1.txt").read_text()


def run_arguments(folder: Path) -> tuple[list[str], Path]:
    """(command line of two steps with MasKD, folder of the run)."""
    data, teacher = write_folder_dataset(folder / "set", val=1), write_teacher(folder / "teacher.pth")
    return train_arguments(data, folder / "run", *distil_arguments(
        teacher, "--lambda-fd", "0", "--lambda-ctr", "0", "--lambda-kd", "0", "--lambda-maskd", "1", "--maskd-steps",
        "3", "--maskd-batch-size", "4", "--max-iterations", "2", "--save-per-iters", "1", "--skip-val")), folder / "run"


def test_training_learns_the_masks_first_and_a_resumed_run_keeps_them(tmp_path):
    arguments, save = run_arguments(tmp_path)
    assert train_kd.main(arguments) == 0
    (cached,) = save.glob("maskd_masks_*")
    tokens = torch.load(cached, weights_only=True)["tokens"]
    (state,) = save.glob("*_state.pth")
    assert torch.load(state, weights_only=True)["distillers"]["maskd.tokens"].equal(tokens)
    cached.unlink()
    assert train_kd.main([*arguments, "--max-iterations", "3", "--resume", "auto"]) == 0
    assert not list(save.glob("maskd_masks_*"))
    assert torch.load(state, weights_only=True)["distillers"]["maskd.tokens"].equal(tokens)


@pytest.mark.parametrize("keeps_flag", [True, False])
def test_a_resumed_run_needs_no_file_of_tokens(tmp_path, keeps_flag):
    """Nor the flag: the state holds the tokens, and knows how many they are."""
    arguments, save = run_arguments(tmp_path)
    given = tmp_path / "given.pth"
    torch.save({"tokens": fill.tensor("tokens", (5, CLASSES), 1)}, given)
    assert train_kd.main([*arguments, "--maskd-masks", str(given)]) == 0
    given.unlink()
    flags = ["--maskd-masks", str(given)] if keeps_flag else []
    assert train_kd.main([*arguments, *flags, "--max-iterations", "3", "--resume", "auto"]) == 0
    (state,) = save.glob("*_state.pth")
    kept = torch.load(state, weights_only=True)
    assert kept["step"] == 3 and kept["distillers"]["maskd.tokens"].equal(fill.tensor("tokens", (5, CLASSES), 1))
